//! Options for the computation: device, threads, number format.

use clap::ValueEnum;
use llara::backend::{Backend, Cpu, Cuda, Dtype};
use llara::{Error, ErrorKind, Result};

use super::talk::say;

/// More threads than this start slowly and compute no faster.
const MAX_THREADS_PER_CORE: usize = 4;

/// Device and threads.
#[derive(clap::Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct Compute {
    /// Device: cpu; cuda or cuda:N, an NVIDIA GPU; or auto, the first GPU if there is one that can be
    /// used, otherwise the CPU
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    #[command(flatten)]
    threads: Threads,
    /// The number of threads that is used without `--threads`; `None`: one per core.
    #[arg(skip)]
    default_threads: Option<usize>,
}

/// The number of threads.
#[derive(clap::Args)]
#[command(next_help_heading = "Compute")]
pub(super) struct Threads {
    /// Number of threads, at most 4 per core [default: 1 per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

impl Threads {
    /// Checks the number of threads.
    fn check(&self) -> Result<()> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = MAX_THREADS_PER_CORE * cores;
        match self.threads.filter(|&threads| usize::from(threads) > most) {
            Some(threads) => Err(Error::new(ErrorKind::Argument, "too many threads")
                .expected(format!("at most {most}, 4 for each of {cores} cores"))
                .got(format!("--threads {threads}"))
                .hint("omit --threads to use one thread per core")),
            None => Ok(()),
        }
    }

    /// Checks the number of threads and starts them.
    pub(super) fn start(&self) -> Result<()> {
        self.start_or(None)
    }

    /// [`start`](Self::start) with another default number of threads than one per core.
    fn start_or(&self, default: Option<usize>) -> Result<()> {
        self.check()?;
        // The environment variable is rayon's, and it means what --threads does.
        let default = default.filter(|_| std::env::var_os("RAYON_NUM_THREADS").is_none());
        if let Some(threads) = self.threads.map(usize::from).or(default) {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            // Fails only if the global thread pool was started before.
            if let Err(e) = pool.build_global() {
                say!("note: {threads} threads: {e}");
            }
        }
        Ok(())
    }
}

impl Compute {
    /// Sets the number of threads that is used without `--threads`.
    pub(super) fn set_default_threads(&mut self, threads: usize) {
        self.default_threads = Some(threads);
    }

    /// Checks the options, starts the threads and opens the device. Verbs call it through [`on_device`].
    pub(super) fn start(&self) -> Result<Device> {
        self.threads.check()?;
        let device = match self.device.as_str() {
            "cpu" => Device::Cpu(cpu()?),
            "cuda" => Device::Cuda(Cuda::new(0)?),
            "auto" => Cuda::new(0).map(Device::Cuda).or_else(|_| cpu().map(Device::Cpu))?,
            name => match name.strip_prefix("cuda:").map(str::parse) {
                Some(Ok(ordinal)) => Device::Cuda(Cuda::new(ordinal)?),
                _ => {
                    return Err(Error::new(ErrorKind::Argument, "unknown device")
                        .expected("cpu, cuda, cuda:N or auto")
                        .got(format!("--device {name}"))
                        .hint("omit --device to compute on the CPU"));
                }
            },
        };
        self.threads.start_or(self.default_threads)?;
        Ok(device)
    }
}

/// A device that `--device` names.
pub(super) enum Device {
    Cpu(Cpu),
    Cuda(Cuda),
}

fn cpu() -> Result<Cpu> {
    Cpu::check_environment()?;
    Ok(Cpu::new())
}

/// Evaluates `$body` with `$backend` as the device of `$compute`. This is the only place that knows which
/// devices there are.
macro_rules! on_device {
    ($compute:expr, $backend:ident => $body:expr) => {
        match $compute.start()? {
            $crate::compute::Device::Cpu($backend) => $body,
            $crate::compute::Device::Cuda($backend) => $body,
        }
    };
}
pub(super) use on_device;

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
    /// Whether the number format depends on the device.
    pub(super) fn is_auto(&self) -> bool {
        self.dtype == Choice::Auto
    }

    /// The number format of activations on a device.
    pub(super) fn dtype(&self, backend: &impl Backend) -> Dtype {
        match self.dtype {
            Choice::F32 => Dtype::F32,
            Choice::Bf16 => Dtype::Bf16,
            Choice::Auto => backend.fastest_dtype(),
        }
    }
}
