//! Ctrl-C and SIGTERM: a training run stops after the current step, encoding stops immediately. Both print
//! which results exist and how to continue. The exit code is 128 + the signal's number.
//!
//! The crate `signal-hook` delivers signals to an ordinary thread, which may print and take locks; a
//! signal handler may not.

use std::process::exit;
use std::sync::atomic::{AtomicI32, Ordering};

use llara::{Error, ErrorKind, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::talk::say;

/// The first signal; 0: none yet.
static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// Makes [`check`] fail after a signal. A second signal ends the program immediately.
///
/// # Errors
/// When signals cannot be received.
pub(super) fn stop_after_step() -> Result<()> {
    on_signal(|signal, first| match first {
        true => say!("interrupted: stopping after this step; repeat to stop immediately"),
        false => exit(128 + signal),
    })
}

/// Ends the program at a signal, after printing the result of `message`.
///
/// # Errors
/// When signals cannot be received.
pub(super) fn stop_at_once(message: impl Fn() -> String + Send + 'static) -> Result<()> {
    on_signal(move |signal, _| {
        say!("interrupted: {}", message());
        exit(128 + signal)
    })
}

/// Calls `act` with each signal and whether it is the first.
fn on_signal(act: impl Fn(i32, bool) + Send + 'static) -> Result<()> {
    let failed =
        |e: std::io::Error| Error::new(ErrorKind::Io, "cannot receive signals (Ctrl-C)").because(e);
    let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(failed)?;
    let listen = move || {
        for signal in signals.forever() {
            let before = RECEIVED.swap(signal, Ordering::SeqCst);
            act(signal, before == 0);
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(listen).map(drop).map_err(failed)
}

/// # Errors
/// After a signal.
pub(super) fn check() -> Result<()> {
    match exit_code() {
        None => Ok(()),
        Some(_) => Err(Error::new(ErrorKind::Io, "interrupted by a signal")),
    }
}

/// The exit code of a program that was stopped by a signal.
pub(super) fn exit_code() -> Option<u8> {
    match RECEIVED.load(Ordering::SeqCst) {
        0 => None,
        signal => u8::try_from(128 + signal).ok(),
    }
}
