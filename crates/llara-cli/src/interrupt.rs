//! Ctrl-C (SIGINT), SIGTERM and SIGUSR1: a training run saves a checkpoint after the current step and stops.
//! Encoding stops immediately at Ctrl-C and SIGTERM. Both print which results exist and how to continue. The
//! exit code is 128 + the signal's number.
//!
//! The crate `signal-hook` delivers signals to an ordinary thread, which may print and take locks; a
//! signal handler may not.

use std::fmt;
use std::process::exit;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, OnceLock};

use llara::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::Signals;

use super::talk::{self, say};

/// The first signal; 0: none yet.
static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// What this process of several is doing, in words.
static DESCRIBE: OnceLock<Box<dyn Fn() -> String + Send + Sync>> = OnceLock::new();

/// The exit code of a run that `--max-time` stopped: EX_TEMPFAIL of sysexits.h, a failure that a repetition
/// of the command may not have.
const TIME_LIMIT: u8 = 75;

/// The error of a training run that was stopped and can be continued.
#[derive(Debug)]
pub(super) struct Stopped {
    /// The exit code.
    pub(super) code: u8,
}

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stopped, exit code {}", self.code)
    }
}

impl std::error::Error for Stopped {}

impl Stopped {
    /// By the signal that was received, if there was one.
    pub(super) fn by_signal() -> Option<Self> {
        signal_code().map(|code| Stopped { code })
    }

    /// By the time limit.
    pub(super) fn by_time_limit() -> Self {
        Stopped { code: TIME_LIMIT }
    }
}

/// Prints what `describe` returns at every first signal: a launcher ends all processes when one has failed, and
/// their messages say what each was waiting for.
pub(super) fn describe_with(describe: impl Fn() -> String + Send + Sync + 'static) {
    // Set once, by the one call in a process.
    let _ = DESCRIBE.set(Box::new(describe));
}

/// Lets a write beyond the limit of a file's size (`ulimit -f`) fail with an error, instead of ending the process.
///
/// # Errors
/// When signals cannot be received.
pub(super) fn report_file_size_limit() -> Result<()> {
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGXFSZ, ignored).map(drop).map_err(cannot_receive)
}

fn cannot_receive(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "cannot receive signals (Ctrl-C)").because(error)
}

/// Makes [`received`] return true after a signal. A second signal ends the program immediately.
///
/// # Errors
/// When signals cannot be received.
pub(super) fn stop_after_step() -> Result<()> {
    on_signal(&[SIGINT, SIGTERM, SIGUSR1], |signal, first| match first {
        true => {
            if let Some(describe) = DESCRIBE.get() {
                talk::report(&format!("received signal {signal}: {}", describe()));
            }
            say!(
                "interrupted: saving a checkpoint after this step, then stopping; repeat to stop \
                 immediately"
            );
        }
        false => exit(128 + signal),
    })
}

/// Ends the program at a signal, after printing the result of `message`.
///
/// # Errors
/// When signals cannot be received.
pub(super) fn stop_at_once(message: impl Fn() -> String + Send + 'static) -> Result<()> {
    on_signal(&[SIGINT, SIGTERM], move |signal, _| {
        say!("interrupted: {}", message());
        exit(128 + signal)
    })
}

/// Calls `act` with each of these signals and whether it is the first.
fn on_signal(signals: &[i32], act: impl Fn(i32, bool) + Send + 'static) -> Result<()> {
    let mut signals = Signals::new(signals).map_err(cannot_receive)?;
    let listen = move || {
        for signal in signals.forever() {
            let before = RECEIVED.swap(signal, Ordering::SeqCst);
            act(signal, before == 0);
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(listen)
        .map(drop)
        .map_err(cannot_receive)
}

/// Whether a signal was received.
pub(super) fn received() -> bool {
    RECEIVED.load(Ordering::SeqCst) != 0
}

/// The exit code of a program that was stopped by a signal.
fn signal_code() -> Option<u8> {
    match RECEIVED.load(Ordering::SeqCst) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}
