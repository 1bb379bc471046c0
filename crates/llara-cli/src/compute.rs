//! Options for the computation: device, threads, number format.

use clap::ValueEnum;
use llara::backend::{Cpu, Dtype};
use llara::{Error, ErrorKind, Result};

use super::talk::say;

/// More threads than this start slowly and compute no faster.
const MAX_THREADS_PER_CORE: usize = 4;

/// Device and threads.
#[derive(clap::Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct Compute {
    /// Device: only `cpu` is supported
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Number of threads, at most 4 per core [default: 1 per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Compute {
    /// Refuses unsupported devices and too many threads.
    pub(super) fn check(&self) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = MAX_THREADS_PER_CORE * cores;
        if let Some(threads) = self.threads.filter(|&threads| usize::from(threads) > most) {
            return Err(Error::new(ErrorKind::Argument, "too many threads")
                .expected(format!("at most {most}, 4 for each of {cores} cores"))
                .got(format!("--threads {threads}"))
                .hint("omit --threads to use one thread per core"));
        }
        match self.device.as_str() {
            "cpu" | "auto" => Cpu::check_environment(),
            device => {
                let what = format!("`--device {device}` is not supported");
                Err(Error::new(ErrorKind::Argument, what)
                    .expected("cpu")
                    .got(device)
                    .hint("omit --device"))
            }
        }
    }

    /// The device, once [`check`](Self::check) has passed.
    pub(super) fn start(&self) -> Cpu {
        if let Some(threads) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.into());
            // Fails only if the global thread pool was started before.
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
    /// Number format of activations and products: f32; bf16 (trained weights and the residual stream
    /// are still f32); or auto (bf16 if a short measurement shows that it is faster, otherwise f32)
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
    /// The number format of activations.
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

/// Describes which number format and instructions are used.
pub(super) fn describe(precision: Dtype) -> &'static str {
    match precision {
        Dtype::F32 => "computes in f32",
        Dtype::Bf16 if multiplies_bf16() => "computes in bf16, products by vdpbf16ps with f32 sums",
        Dtype::Bf16 => {
            "computes in bf16; products use the f32 kernel on operands rounded to bf16, because bf16 \
             products are not faster on this processor: bf16 saves memory, but no time"
        }
    }
}
