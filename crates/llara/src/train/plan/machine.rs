//! The memory of the machine, or of a device, and of this process.

use std::fs;
use std::path::{Path, PathBuf};

use crate::Result;
use crate::backend::Backend;

/// Fraction of the free memory that is reserved for other programs.
const RESERVED: f64 = 0.1;

/// Memory of this process before it reads weights, if the system does not report it.
const PROCESS_BYTES: u64 = 64 << 20;

/// Additional memory of this process during training, in addition to tensors and workspace: program pages that
/// are used for the first time, threads, the next batch, the log. Measured on Linux: 10 to 17 MiB.
const GROWTH_BYTES: u64 = 17 << 20;

/// Memory in bytes; `None` if the system does not report it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineMemory {
    /// Total memory of the machine, or the limit of this process's control group if it is lower.
    pub total: Option<u64>,
    /// Free memory, without the memory of this process.
    pub available: Option<u64>,
    /// Memory of this process.
    pub process: u64,
}

impl MachineMemory {
    /// Reads the current values. On Linux, from `/proc` and the limits of control groups.
    pub fn read() -> Self {
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let groups = groups();
        let least = |machine: Option<u64>, of_group: fn(&Group) -> u64| {
            machine.into_iter().chain(groups.iter().map(of_group)).min()
        };
        MachineMemory {
            total: least(kibibytes(&meminfo, "MemTotal:"), |group| group.limit),
            available: least(kibibytes(&meminfo, "MemAvailable:"), Group::available),
            process: kibibytes(&status, "VmRSS:").unwrap_or(PROCESS_BYTES),
        }
    }

    /// The memory in which `backend` stores tensors: that of the device, or of the machine.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn of<B: Backend>(backend: &B) -> Result<Self> {
        Ok(match backend.free_and_total_bytes()? {
            None => Self::read(),
            Some((free, total)) => MachineMemory {
                total: Some(total as u64),
                available: Some(free as u64),
                // Memory that is already in use is not free; the plan counts it as workspace.
                process: backend.memory().fixed_bytes as u64,
            },
        })
    }

    /// The part of one of `processes` on this machine that need as much memory each.
    #[must_use]
    pub fn shared_by(self, processes: usize) -> Self {
        let part = |bytes: u64| bytes / processes.max(1) as u64;
        MachineMemory {
            total: self.total.map(part),
            available: self.available.map(part),
            process: self.process,
        }
    }

    /// Peak resident memory of this process in bytes; `None` if the system does not report it.
    pub fn peak_of_process() -> Option<u64> {
        kibibytes(&fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
    }

    /// Memory of this process during training, without tensors and workspace.
    pub fn process_in_training(&self) -> u64 {
        self.process + GROWTH_BYTES
    }

    /// The memory that this process can use: its present memory and 90 % of the free memory.
    pub fn usable(&self) -> Option<u64> {
        let free = self.available? as f64 * (1.0 - RESERVED);
        Some(self.process + free as u64)
    }
}

/// The value of a line such as `MemTotal:  16316412 kB`, in bytes.
fn kibibytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Memory limit and usage of a control group.
struct Group {
    limit: u64,
    used: u64,
}

impl Group {
    fn available(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    /// Reads the files of a control group of version 2 or 1; `None` if it has no limit.
    fn read(dir: &Path) -> Option<Self> {
        let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok();
        let first = |names: [&str; 2]| names.into_iter().find_map(number);
        let limit = first(["memory.max", "memory.limit_in_bytes"])?;
        let used: u64 = first(["memory.current", "memory.usage_in_bytes"])?;
        // The page cache counts as used memory, but is freed when memory is needed.
        let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix("inactive_file "));
        let cached = cached.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
        Some(Group { limit, used: used.saturating_sub(cached) })
    }
}

/// The control groups of this process and their ancestors that have limits.
fn groups() -> Vec<Group> {
    let text = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mut dirs = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let root = match controllers {
            "" => "/sys/fs/cgroup",
            c if c.split(',').any(|c| c == "memory") => "/sys/fs/cgroup/memory",
            _ => continue,
        };
        let path = PathBuf::from(root).join(path.trim_start_matches('/'));
        dirs.extend(path.ancestors().take_while(|dir| dir.starts_with(root)).map(Path::to_owned));
    }
    dirs.iter().filter_map(|dir| Group::read(dir)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc_are_read() {
        let text = "MemTotal:       16316412 kB\nMemFree: 5 kB\nHugePages_Total:       0\n";
        assert_eq!(kibibytes(text, "MemTotal:"), Some(16_316_412 * 1024));
        assert_eq!(kibibytes(text, "HugePages_Total:"), None);
        assert_eq!(kibibytes(text, "MemAvailable:"), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_fits_in_this_machine() {
        let memory = MachineMemory::read();
        assert!(memory.process > 1 << 20);
        assert!(memory.total.unwrap() >= memory.process);
        assert!(memory.usable().unwrap() >= memory.process);
    }

    #[test]
    fn a_group_without_a_limit_is_none() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.max"), "max\n").unwrap();
        fs::write(dir.path().join("memory.current"), "700\n").unwrap();
        assert!(Group::read(dir.path()).is_none());
        fs::write(dir.path().join("memory.max"), "1000\n").unwrap();
        fs::write(dir.path().join("memory.stat"), "anon 400\ninactive_file 300\n").unwrap();
        assert_eq!(Group::read(dir.path()).unwrap().available(), 600);
    }
}
