//! What computes: device, threads, number format.

use clap::ValueEnum;
use llara::backend::{Cpu, Dtype};
use llara::{Error, ErrorKind, Result};

use super::talk::say;

/// Device and threads.
#[derive(clap::Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct Compute {
    /// Device that computes; cpu is the one that there is
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Threads that compute [default: one for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Compute {
    /// Refuses what cannot be computed here.
    pub(super) fn check(&self) -> Result<()> {
        match self.device.as_str() {
            "cpu" | "auto" => Cpu::check_environment(),
            device => {
                let what = format!("`--device {device}` is not in this version");
                Err(Error::new(ErrorKind::Argument, what)
                    .expected("cpu")
                    .got(device)
                    .hint("leave --device out"))
            }
        }
    }

    /// How many threads compute.
    pub(super) fn threads(&self) -> usize {
        self.threads.map_or_else(rayon::current_num_threads, usize::from)
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

/// Number format of the computation.
#[derive(clap::Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct Precision {
    /// Number format of the computation: f32; bf16, where what learns and the residual stream stay
    /// f32; or auto: bf16 where a short measurement finds its products faster, else f32
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t = Choice::F32)]
    #[arg(hide_possible_values = true)]
    dtype: Choice,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
    Auto,
}

impl Precision {
    /// What activations are computed in.
    pub(super) fn dtype(&self) -> Dtype {
        match self.dtype {
            Choice::F32 => Dtype::F32,
            Choice::Bf16 => Dtype::Bf16,
            Choice::Auto if multiplies_bf16() => Dtype::Bf16,
            Choice::Auto => Dtype::F32,
        }
    }
}

fn multiplies_bf16() -> bool {
    Cpu::multiplies_bf16_faster()
}

/// Which path computes, honestly.
pub(super) fn describe(precision: Dtype) -> &'static str {
    match precision {
        Dtype::F32 => "computes in f32",
        Dtype::Bf16 if multiplies_bf16() => "computes in bf16, products by vdpbf16ps with f32 sums",
        Dtype::Bf16 => {
            "computes in bf16, products by the f32 kernel on operands rounded to bf16, because this \
             processor multiplies bf16 no faster: less memory, but no faster than --dtype f32"
        }
    }
}
