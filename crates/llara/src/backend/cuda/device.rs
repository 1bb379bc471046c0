//! The state that all operations share: the device's context, memory, kernels and cuBLASLt handle.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::blas::Blas;
use super::compile::Kernels;
use super::driver::{Context, version_text};
use super::memory::Memory;
use super::profile::Profile;
use super::tensor::CudaTensor;
use super::transfer::Staging;
use crate::Result;
use crate::backend::Dtype;

/// A kernel's only parameter: a struct that a file in `kernels/` declares with the same fields.
///
/// # Safety
/// The layout must be that of the struct of the same name in the kernel file; a test compares the fields.
pub(super) unsafe trait KernelArgs: Copy {
    /// Name of the struct.
    #[cfg(test)]
    const NAME: &str;
    /// Fields and their types, in order.
    #[cfg(test)]
    const FIELDS: &[(&str, &str)];
}

/// Declares the parameter of a kernel. Pointers are u64.
macro_rules! kernel_args {
    ($name:ident { $($field:ident: $type:ident),* $(,)? }) => {
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub(super) struct $name {
            $(pub(super) $field: $type),*
        }

        // SAFETY: declared with the same fields in `kernels/`; a test checks this.
        unsafe impl $crate::backend::cuda::device::KernelArgs for $name {
            #[cfg(test)]
            const NAME: &str = stringify!($name);
            #[cfg(test)]
            const FIELDS: &[(&str, &str)] = &[$((stringify!($field), stringify!($type))),*];
        }
    };
}
pub(super) use kernel_args;

/// Threads of a block, unless the kernel specifies another number.
pub(super) const BLOCK: u32 = 256;

/// The CUDA backend. Clones share one device.
#[derive(Clone)]
pub struct Cuda {
    pub(super) device: Arc<Device>,
}

/// A device with the state that operations need. Fields are dropped in this order: those that use the context
/// before the context.
pub(super) struct Device {
    pub(super) staging: Staging,
    pub(super) blas: Blas,
    pub(super) kernels: Kernels,
    pub(super) memory: Arc<Memory>,
    pub(super) context: Arc<Context>,
    /// Number of products that were computed by `kernels/gemm.cu` instead of cuBLASLt.
    pub(super) fallback_products: AtomicU64,
    pub(super) profile: Profile,
}

impl Device {
    pub(super) fn new(ordinal: usize) -> Result<Self> {
        let context = Context::new(ordinal)?;
        let kernels = Kernels::new(&context)?;
        let memory = Memory::new(context.clone())?;
        let blas = Blas::new(&memory)?;
        let staging = Staging::new(context.clone());
        let fallback_products = AtomicU64::new(0);
        let profile = Profile::from_environment();
        Ok(Device { staging, blas, kernels, memory, context, fallback_products, profile })
    }

    pub(super) fn description(&self) -> String {
        let Context { name, capability: (major, minor), .. } = &*self.context;
        format!(
            "{name}, compute capability {major}.{minor}, {:.1} GiB, driver for CUDA {}, NVRTC {}, cuBLASLt {}",
            self.context.total_memory as f64 / f64::from(1 << 30),
            version_text(self.context.driver_version),
            self.kernels.compiler,
            self.blas.version,
        )
    }

    pub(super) fn fallback_products(&self) -> u64 {
        self.fallback_products.load(Ordering::Relaxed)
    }

    /// A matrix with unspecified contents; the caller must write every element.
    pub(super) fn unspecified(&self, rows: usize, cols: usize, dtype: Dtype) -> Result<CudaTensor> {
        let buffer = self.memory.allocate(rows * cols * dtype.bytes())?;
        Ok(CudaTensor { buffer, rows, cols, dtype })
    }

    /// Launches one thread per item, in blocks of [`BLOCK`] threads; no launch if there are no items.
    pub(super) fn launch_items<A: KernelArgs>(
        &self,
        kernel: &str,
        items: usize,
        args: A,
    ) -> Result<()> {
        self.launch(kernel, [items.div_ceil(BLOCK as usize), 1], BLOCK, args)
    }

    /// Launches a grid of blocks in x and y; no launch if it is empty.
    pub(super) fn launch<A: KernelArgs>(
        &self,
        kernel: &str,
        grid: [usize; 2],
        block: u32,
        args: A,
    ) -> Result<()> {
        self.launch_with_shared(kernel, [grid[0], grid[1], 1], block, 0, args)
    }

    /// The same with a third dimension and dynamic shared memory.
    pub(super) fn launch_with_shared<A: KernelArgs>(
        &self,
        kernel: &str,
        grid: [usize; 3],
        block: u32,
        shared_bytes: usize,
        args: A,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let [x, y, z] = grid.map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        assert!(x < 1 << 31 && y < 1 << 16 && z < 1 << 16, "{kernel}: a grid of {grid:?}");
        let function = self.kernels.get(kernel, shared_bytes)?;
        let launch = || {
            // SAFETY: the layout is that of `KernelArgs`; pointers and sizes in the arguments come from the
            // same tensors, whose shapes have been asserted.
            unsafe { self.context.launch(function.0, [x, y, z], block, shared_bytes as u32, &args) }
        };
        self.profile.measure(&self.context, || kernel.to_owned(), launch)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{attention, norms, objective, pointwise, products, rows};
    use super::KernelArgs;

    /// All kernel files.
    const SOURCES: [&str; 6] = [
        include_str!("kernels/rows.cu"),
        include_str!("kernels/norms.cu"),
        include_str!("kernels/pointwise.cu"),
        include_str!("kernels/objective.cu"),
        include_str!("kernels/gemm.cu"),
        include_str!("kernels/attention.cuh"),
    ];

    /// Names and Rust types of the fields of a struct in the kernel files.
    fn declared(name: &str) -> Vec<(String, String)> {
        let start = format!("struct {name} {{");
        let text = SOURCES.iter().find_map(|text| text.split_once(&start)).unwrap().1;
        let body = text.split_once("\n};").unwrap().0;
        let fields = body.lines().map(|line| line.split("//").next().unwrap().trim());
        fields
            .filter(|field| !field.is_empty())
            .map(|field| {
                let (kind, name) = field.strip_suffix(';').unwrap().rsplit_once(' ').unwrap();
                let kind = match kind {
                    pointer if pointer.ends_with('*') => "u64",
                    "float" => "f32",
                    "double" => "f64",
                    same => same,
                };
                (name.to_owned(), kind.to_owned())
            })
            .collect()
    }

    fn agrees<A: KernelArgs>() {
        let here: Vec<_> =
            A::FIELDS.iter().map(|&(name, kind)| (name.to_owned(), kind.to_owned())).collect();
        assert_eq!(here, declared(A::NAME), "{}", A::NAME);
        assert!(!here.is_empty());
    }

    #[test]
    fn kernel_arguments_match_their_rust_declarations() {
        agrees::<rows::CopyArgs>();
        agrees::<rows::AddScaledArgs>();
        agrees::<rows::GatherArgs>();
        agrees::<rows::ScatterArgs>();
        agrees::<rows::SegmentArgs>();
        agrees::<rows::ColumnSumArgs>();
        agrees::<rows::ColumnFinishArgs>();
        agrees::<norms::NormArgs>();
        agrees::<norms::NormBackwardArgs>();
        agrees::<norms::NormWeightArgs>();
        agrees::<norms::NormalizeArgs>();
        agrees::<norms::NormalizeBackwardArgs>();
        agrees::<pointwise::RopeArgs>();
        agrees::<pointwise::SwigluArgs>();
        agrees::<pointwise::DropoutArgs>();
        agrees::<objective::CrossEntropyArgs>();
        agrees::<objective::MaskScoresArgs>();
        agrees::<objective::DistillationArgs>();
        agrees::<objective::SquaresArgs>();
        agrees::<objective::TotalArgs>();
        agrees::<objective::ClipArgs>();
        agrees::<objective::AdamWArgs>();
        agrees::<products::GemmArgs>();
        agrees::<products::FinishArgs>();
        agrees::<attention::AttentionArgs>();
    }
}
