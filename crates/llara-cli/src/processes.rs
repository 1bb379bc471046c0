//! The processes of a run that `mpirun` or `srun` started: choices and errors that all of them share, and the end of
//! all of them.

use std::path::Path;
use std::process::exit;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use std::{fmt, fs};

use llara::backend::{Backend, Dtype};
use llara::dist::{Collective, Launch, MpiRank, MpiWorld, Placement, Solo};
use llara::{Error, ErrorKind, Result};

use super::interrupt::{self, Stopped};
use super::talk;

/// The exit code of all processes when one of them has failed alone.
const FAILURE: u8 = 1;

/// The file by which processes find out whether they share a folder.
const SHARED_FILE: &str = ".llara.shared";

/// This process, and those that were started with it.
pub(super) struct Processes {
    /// `None`: there is one process, which needs no MPI.
    world: Option<Arc<MpiWorld>>,
    placement: Placement,
}

/// The error of a run whose message was printed, by this process or another one.
#[derive(Debug)]
pub(super) struct Reported;

impl fmt::Display for Reported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the run failed")
    }
}

impl std::error::Error for Reported {}

/// The option of verbs that run on several processes.
#[derive(clap::Args)]
#[command(next_help_heading = "Several processes (mpirun, srun)")]
pub(super) struct CollectiveArgs {
    /// End the run if a process does not take part in communication for this time, such as 30m or 90s; what one
    /// process does alone, such as saving, must take less
    #[arg(long, value_name = "TIME", value_parser = timeout, default_value = "30m")]
    pub(super) collective_timeout: Duration,
}

/// The longest timeout: beyond this, a clock could not count.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(30 * 24 * 3600);

fn timeout(text: &str) -> std::result::Result<Duration, String> {
    let timeout = crate::values::duration(text)?;
    match timeout <= LONGEST_TIMEOUT {
        true => Ok(timeout),
        false => Err("expected at most 720h".to_owned()),
    }
}

/// Refuses to run a verb in several processes, each of which would do the same work and write the same files.
pub(super) fn refuse_several() -> Result<()> {
    match Launch::from_environment()? {
        None => Ok(()),
        Some(launch) => Err(Error::new(ErrorKind::Argument, "this verb runs in one process")
            .got(format!("{} processes, started by {}", launch.size, launch.launcher))
            .hint("start it without mpirun or srun; `llara finetune`, `pretrain`, `encode` and `evaluate` use several \
                   processes")),
    }
}

impl Processes {
    /// One process.
    pub(super) fn one() -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Processes { world: None, placement: Placement { local_processes: 1, threads } }
    }

    /// Connects to the processes that were started with this one. From here on, only the first one prints
    /// messages and results.
    ///
    /// # Errors
    /// If the environment contradicts itself, or MPI cannot be started.
    pub(super) fn start(timeout: Duration) -> Result<Self> {
        let Some(launch) = Launch::from_environment()? else { return Ok(Self::one()) };
        talk::set_rank(launch.rank);
        let world = MpiWorld::start(&launch, timeout).inspect_err(|error| {
            if MpiWorld::is_initializing() {
                talk::report(&format!("error: {error}"));
                std::process::abort();
            }
        })?;
        let placement = world.placement()?;
        let described = Arc::clone(&world);
        interrupt::describe_with(move || described.describe());
        Ok(Processes { world: Some(world), placement })
    }

    /// Number of processes.
    pub(super) fn size(&self) -> usize {
        self.world.as_ref().map_or(1, |world| world.size())
    }

    /// Bytes of all messages that this process has sent.
    pub(super) fn bytes_sent(&self) -> u64 {
        self.world.as_ref().map_or(0, |world| world.bytes_sent())
    }

    /// Whether this is the process that prints, logs and saves.
    pub(super) fn is_first(&self) -> bool {
        self.world.as_ref().is_none_or(|world| world.rank() == 0)
    }

    /// What the processes on this host share.
    pub(super) fn placement(&self) -> Placement {
        self.placement
    }

    /// The group of all processes, for tensors of `backend`.
    pub(super) fn collective<B: Backend>(&self, backend: &B) -> Arc<dyn Collective<B>> {
        match &self.world {
            None => Arc::new(Solo),
            Some(world) => Arc::new(MpiRank::new(Arc::clone(world), backend.clone())),
        }
    }

    /// The result of this process if all have one; else an error on every process.
    pub(super) fn agree<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        let Some(world) = &self.world else { return result };
        let status = match &result {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.downcast_ref::<Error>() {
                Some(known) => Error::new(known.kind(), known.to_string()),
                None => Error::new(ErrorKind::Argument, error.to_string()),
            }),
        };
        let agreed = world.agree(status);
        let value = result?;
        agreed?;
        Ok(value)
    }

    /// What the first process does alone, while the others wait: `None` there.
    pub(super) fn first<T>(
        &self,
        act: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<Option<T>> {
        let result = if self.is_first() { act().map(Some) } else { Ok(None) };
        self.agree(result)
    }

    /// Refuses processes of which one has another hash of `what` than the first one.
    pub(super) fn check_same(
        &self,
        what: &str,
        own: impl FnOnce() -> Result<u64>,
    ) -> anyhow::Result<()> {
        let Some(world) = &self.world else { return Ok(()) };
        let own = self.agree(own().map_err(Into::into))?;
        let all = world.all_gather_words(&[own])?;
        match all.iter().position(|hash| *hash != all[0]) {
            None => Ok(()),
            Some(rank) => self.agree(Err(Error::new(
                ErrorKind::Distributed,
                format!("rank {rank} has another {what} than rank 0"),
            )
            .expected("the same files and options in every process")
            .hint("start all processes with one command line; on several hosts, compare the files")
            .into())),
        }
    }

    /// Checks that all processes see the folder of the first one.
    pub(super) fn check_shared(&self, folder: &Path) -> anyhow::Result<()> {
        if self.size() == 1 {
            return Ok(());
        }
        let path = folder.join(SHARED_FILE);
        let io = |act, e| Error::io(act, &path, e);
        let own = format!("{} {:?}", std::process::id(), SystemTime::now());
        let written = self.first(|| Ok(fs::write(&path, &own).map_err(|e| io("write", e))?));
        let expected = written.and_then(|_| Ok(self.choose(own)?))?;
        let read = fs::read_to_string(&path);
        let checked = match read {
            Ok(found) if found == expected => Ok(()),
            _ => Err(Error::new(ErrorKind::Distributed, "this process has another output folder")
                .file(folder)
                .expected("the folder of the first process, on a file system that all hosts share")
                .hint("give all processes the same --output-dir; the current folder counts, too")
                .into()),
        };
        let checked = self.agree(checked);
        if self.is_first() {
            // The error of the check is more important.
            let _ = fs::remove_file(&path);
        }
        checked
    }

    /// The choice of the first process, on every process.
    pub(super) fn choose(&self, own: String) -> Result<String> {
        match &self.world {
            None => Ok(own),
            Some(world) => world.choose(&own),
        }
    }

    /// The number format of activations, and the kernels for it: those of the first process, which may have measured
    /// which are the fastest.
    pub(super) fn shared_precision(&self, own: Dtype, backend: &impl Backend) -> Result<Dtype> {
        if self.size() == 1 {
            return Ok(own);
        }
        let name = |dtype| if dtype == Dtype::Bf16 { "bf16" } else { "f32" };
        let chosen = self.choose(name(own).to_owned())?;
        let dtype = if chosen == name(Dtype::Bf16) { Dtype::Bf16 } else { Dtype::F32 };
        // The kernels for f32 do not depend on a measurement, so there is nothing to choose.
        if dtype == Dtype::Bf16 {
            let kernels = self.choose(backend.kernels(dtype))?;
            backend.use_kernels(&kernels);
        }
        Ok(dtype)
    }

    /// The smallest values of all processes.
    pub(super) fn smallest<const N: usize>(&self, own: [usize; N]) -> Result<[usize; N]> {
        let Some(world) = &self.world else { return Ok(own) };
        let all = world.all_gather_words(&own.map(|value| value as u64))?;
        let least = |at: usize| all.iter().filter_map(|of_rank| of_rank.get(at)).min();
        Ok(std::array::from_fn(|at| least(at).map_or(own[at], |&value| value as usize)))
    }

    /// The error of a run that was stopped: the exit code is the same for all processes, that of the first one
    /// that received a signal.
    pub(super) fn stopped(&self) -> anyhow::Error {
        let own = Stopped::by_signal().map_or(0, |stopped| u64::from(stopped.code));
        let codes = match &self.world {
            None => Ok(vec![vec![own]]),
            Some(world) => world.all_gather_words(&[own]),
        };
        match codes {
            Ok(codes) => {
                let first = codes.iter().flatten().find(|code| **code != 0);
                let code = first.and_then(|&code| u8::try_from(code).ok());
                code.map_or(Stopped::by_time_limit(), |code| Stopped { code }).into()
            }
            Err(error) => error.into(),
        }
    }

    /// Ends the group, and prints the error if this process is to print it. If this process has failed alone, all
    /// others are told why and are ended.
    pub(super) fn end(self, result: anyhow::Result<()>) -> anyhow::Result<()> {
        let Some(world) = &self.world else { return result };
        let Err(error) = result else { return Ok(world.finish()?) };
        let is_stop = error.downcast_ref::<Stopped>().is_some();
        if !world.has_failed() && (is_stop || world.has_agreed_on_error()) {
            if !is_stop && !world.is_reported_elsewhere() {
                talk::report(&format!("error: {error}"));
            }
            world.finish()?;
            return Err(if is_stop { error } else { Reported.into() });
        }
        talk::report(&format!("error: {error}"));
        world.abort(&error.to_string(), FAILURE);
        exit(FAILURE.into())
    }
}
