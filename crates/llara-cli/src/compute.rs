//! Options of the computation: device, threads, number format.

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
    /// Device that computes: only `cpu` is supported
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Threads that compute, at most 4 for each core [default: 1 for each core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Compute {
    /// Refuses unsupported devices and more threads than could be of use.
    pub(super) fn check(&self) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = MAX_THREADS_PER_CORE * cores;
        if let Some(threads) = self.threads.filter(|&threads| usize::from(threads) > most) {
            return Err(Error::new(ErrorKind::Argument, "too many threads")
                .expected(format!("at most {most}, 4 for each of {cores} cores"))
                .got(format!("--threads {threads}"))
                .hint("leave --threads out for one thread for each core"));
        }
        match self.device.as_str() {
            "cpu" | "auto" => Cpu::check_environment(),
            device => {
                let what = format!("`--device {device}` is not supported");
                Err(Error::new(ErrorKind::Argument, what)
                    .expected("cpu")
                    .got(device)
                    .hint("leave --device out"))
            }
        }
    }

    /// The number of threads that compute.
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
    /// Number format of the computation: f32; bf16 (trained weights and the residual stream stay
    /// f32); or auto: bf16 if a short measurement finds its products faster, else f32
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
    /// Whether the number format is chosen by a measurement.
    pub(super) fn is_auto(&self) -> bool {
        self.dtype == Choice::Auto
    }

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
            "computes in bf16, products by the f32 kernel on operands rounded to bf16, because this \
             processor multiplies bf16 no faster: less memory, but no faster than --dtype f32"
        }
    }
}
