//! Which processes share a host and its cores.

use std::fs;
use std::thread::available_parallelism;

use super::world::MpiWorld;
use crate::Result;

/// What the processes on the host of a process share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Processes on this host.
    pub local_processes: usize,
    /// The number of threads with which these processes together use each core once.
    pub threads: usize,
}

impl MpiWorld {
    /// Finds out which processes are on the same host, and which of them may run on the same cores: a launcher may
    /// bind each process to cores of its own, or leave all of them on all cores.
    ///
    /// # Errors
    /// See [`Collective`](crate::dist::Collective).
    pub fn placement(&self) -> Result<Placement> {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mut own = vec![host()];
        own.extend(allowed_cores(&status));
        let all = self.all_gather_words(&own)?;
        let cores = available_parallelism().map_or(1, usize::from);
        Ok(placement(&all, self.rank(), cores))
    }
}

/// The placement of a rank with `cores` cores. The words of each rank are its host and the mask of its cores.
fn placement(all: &[Vec<u64>], rank: usize, cores: usize) -> Placement {
    let own = &all[rank];
    let local: Vec<_> = all.iter().filter(|words| words.first() == own.first()).collect();
    let overlaps = |words: &&&Vec<u64>| {
        let pairs = words.iter().zip(own).skip(1);
        // Without masks, all processes may use all cores.
        own.len() == 1 || pairs.into_iter().any(|(a, b)| a & b != 0)
    };
    let sharing = local.iter().filter(overlaps).count().max(1);
    Placement { local_processes: local.len().max(1), threads: (cores / sharing).max(1) }
}

/// A number that is the same for all processes of a host, whatever container they are in.
fn host() -> u64 {
    let id = fs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    // FNV-1a
    id.iter().fold(0xCBF2_9CE4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3)
    })
}

/// The mask of allowed cores in `/proc/self/status`, the lowest cores first; empty if it is not there.
fn allowed_cores(status: &str) -> Vec<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed:"));
    let words = mask.unwrap_or_default().trim().rsplit(',');
    words.map_while(|word| u64::from_str_radix(word, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_divided_among_processes_that_share_them() {
        let of = |all: &[&[u64]], rank, cores| {
            let all: Vec<_> = all.iter().map(|words| words.to_vec()).collect();
            let Placement { local_processes, threads } = placement(&all, rank, cores);
            (local_processes, threads)
        };
        // Two hosts; on the first one, both processes may use all of 8 cores.
        let hosts: &[&[u64]] = &[&[1, 0xFF], &[1, 0xFF], &[2, 0xFF]];
        assert_eq!([of(hosts, 0, 8), of(hosts, 2, 8)], [(2, 4), (1, 8)]);
        // Bound to cores of their own.
        let bound: &[&[u64]] = &[&[1, 0x0F], &[1, 0xF0]];
        assert_eq!(of(bound, 1, 4), (2, 4));
        // More processes than cores, and no masks.
        let shared: [&[u64]; 4] = [&[1, 1]; 4];
        assert_eq!(of(&shared, 3, 1), (4, 1));
        let unknown: [&[u64]; 4] = [&[1]; 4];
        assert_eq!(of(&unknown, 0, 8), (4, 2));
    }

    #[test]
    fn masks_are_parsed() {
        let status = "Name:\tllara\nCpus_allowed:\t3,ffffffff\nCpus_allowed_list:\t0-33\n";
        assert_eq!(allowed_cores(status), [0xFFFF_FFFF, 3]);
        assert_eq!(allowed_cores("Name: x"), [0u64; 0]);
        assert_eq!(allowed_cores("Cpus_allowed:\txyz"), [0u64; 0]);
    }
}
