//! What computes: device, number format, threads.

use llara::backend::Cpu;
use llara::{Error, ErrorKind, Result};

use super::talk::say;

/// Device, number format, threads.
#[derive(clap::Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct Compute {
    /// Device that computes; cpu is the one that there is
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Number format of the computation; f32 is the one that there is
    #[arg(long, value_name = "DTYPE", default_value = "f32")]
    dtype: String,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Compute {
    /// Refuses what cannot be computed here.
    pub(super) fn check(&self) -> Result<()> {
        let refuse = |option: &str, got: &str, expected: &str| {
            Err(Error::new(ErrorKind::Argument, format!("`{option} {got}` is not in this version"))
                .expected(expected)
                .got(got)
                .hint(format!("leave {option} out")))
        };
        match (self.device.as_str(), self.dtype.as_str()) {
            ("cpu" | "auto", "f32" | "float32") => Ok(()),
            ("cpu" | "auto", dtype) => refuse("--dtype", dtype, "f32"),
            (device, _) => refuse("--device", device, "cpu"),
        }
    }

    /// The device, once [`check`](Self::check) has passed.
    pub(super) fn start(&self) -> Cpu {
        if let Some(threads) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
            // Fails only where threads were started before.
            if let Err(e) = pool.build_global() {
                say!("note: --threads {threads}: {e}");
            }
        }
        Cpu::new()
    }
}
