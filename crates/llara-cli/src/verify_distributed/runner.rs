//! Starts the program, alone or on several processes, and waits for its results.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llara::{Error, ErrorKind, Result};
use tempfile::TempDir;

use super::case::Case;
use super::compare::Finished;
use crate::interrupt;

/// Time between two looks at a run.
const POLL: Duration = Duration::from_millis(20);
/// Lines of a failed run that are shown.
const SHOWN_LINES: usize = 12;

/// A command that starts several processes, as words; one contains `{}`.
#[derive(Debug, Clone)]
pub(super) struct Launcher(Vec<String>);

impl FromStr for Launcher {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        match words.iter().skip(1).any(|word| word.contains("{}")) {
            true => Ok(Launcher(words)),
            false => Err("expected a command with {} for the number of processes".into()),
        }
    }
}

/// Makes runs with the options of this program and those of a case.
pub(super) struct Runner {
    launcher: Launcher,
    /// The folder for results; it is removed at the end.
    folder: TempDir,
    /// The run that is being made, to be ended when this program is interrupted.
    running: Arc<Mutex<Option<Child>>>,
}

impl Runner {
    /// Makes a folder for the results in `work_dir`.
    ///
    /// # Errors
    /// The folder cannot be made, or signals cannot be received.
    pub(super) fn new(work_dir: PathBuf, launcher: Launcher) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("llara-verify-")
            .tempdir_in(&work_dir)
            .map_err(|e| Error::io("create a folder in", &work_dir, e))?;
        let running: Arc<Mutex<Option<Child>>> = Arc::default();
        let (child, path) = (Arc::clone(&running), folder.path().to_owned());
        interrupt::stop_at_once(move || {
            if let Some(child) = &mut *child.lock().unwrap_or_else(PoisonError::into_inner) {
                // An error means that it has ended.
                let _ = child.kill();
            }
            let _ = fs::remove_dir_all(&path);
            "nothing was saved".into()
        })?;
        Ok(Runner { launcher, folder, running })
    }

    /// Makes a run.
    ///
    /// # Errors
    /// It cannot be started, or fails; with its last messages.
    pub(super) fn run(&self, case: &Case) -> Result<Finished> {
        let results = tempfile::Builder::new()
            .tempdir_in(self.folder.path())
            .map_err(|e| Error::io("create a folder in", self.folder.path(), e))?;
        let log = results.path().join("messages.txt");
        let messages = || File::create(&log).map_err(|e| Error::io("create", &log, e));
        let mut command = self.command(case)?;
        command.arg(format!("--results={}", results.path().display()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages()?);

        let lock = || self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn().map_err(|e| self.cannot_start(case, e))?;
        *lock() = Some(child);
        let status = loop {
            match lock().as_mut().map(Child::try_wait) {
                Some(Ok(Some(status))) => break status,
                Some(Ok(None)) => {}
                Some(Err(e)) => return Err(Error::new(ErrorKind::Io, "wait for a run").because(e)),
                None => unreachable!("only this function takes the child"),
            }
            std::thread::sleep(POLL);
        };
        *lock() = None;
        if !status.success() {
            let text = fs::read(&log).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
            let last = lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n    ");
            return Err(Error::new(ErrorKind::Distributed, format!("a run failed: {case}"))
                .got(format!("{status}, with the messages\n    {last}")));
        }
        Finished::read(results, case.processes)
    }

    /// This program with its own arguments, which the options of the case override.
    fn command(&self, case: &Case) -> Result<Command> {
        let program = std::env::current_exe()
            .map_err(|e| Error::new(ErrorKind::Io, "find this program").because(e))?;
        let mut command = match case.processes {
            1 => Command::new(program),
            processes => {
                let words = self.launcher.0.iter();
                let mut words = words.map(|word| word.replace("{}", &processes.to_string()));
                let mut command = Command::new(words.next().unwrap_or_default());
                command.args(words).arg(program);
                command
            }
        };
        command.args(std::env::args_os().skip(1)).args(case.options());
        Ok(command)
    }

    fn cannot_start(&self, case: &Case, error: std::io::Error) -> Error {
        let launcher = self.launcher.0.join(" ");
        let error = Error::new(ErrorKind::Distributed, format!("cannot start a run: {case}"))
            .because(error);
        if case.processes == 1 {
            return error;
        }
        error.got(format!("--launcher '{launcher}'")).hint(
            "install Open MPI, for example with `apt-get install openmpi-bin`, or give another --launcher",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_names_the_number_of_processes() {
        let Launcher(words) = "srun  --mpi=pmix -n{}".parse().unwrap();
        assert_eq!(words, ["srun", "--mpi=pmix", "-n{}"]);
        for text in ["", "mpirun -n 4", "{}"] {
            assert!(text.parse::<Launcher>().is_err(), "{text}");
        }
    }
}
