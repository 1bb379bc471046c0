//! Matrix products by cuBLASLt: descriptors, the choice of an algorithm, the call.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::{result as lt, sys as lts};

use super::driver::{Context, error};
use super::memory::{ALIGNMENT, Buffer, Memory};
use super::tensor::Block;
use crate::Result;
use crate::backend::Dtype;

/// Scratch memory that an algorithm may use. Shared by all products, which run one after another.
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;

/// `out = alpha · left · right (+ onto)`; operands that are marked as transposed are transposed first. Left and right
/// have the same dtype, and so have onto and out.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub(super) left: Block,
    pub(super) left_transposed: bool,
    pub(super) right: Block,
    pub(super) right_transposed: bool,
    pub(super) alpha: f32,
    /// May be out itself.
    pub(super) onto: Option<Block>,
    pub(super) out: Block,
}

impl Product {
    /// Columns of the left operand, which are the rows of the right one.
    pub(super) fn inner(&self) -> usize {
        if self.left_transposed { self.left.rows } else { self.left.cols }
    }

    /// # Panics
    /// If the shapes or dtypes do not match.
    pub(super) fn check(&self) {
        let shape = |x: &Block, transposed| match transposed {
            true => (x.cols, x.rows),
            false => (x.rows, x.cols),
        };
        let (m, k) = shape(&self.left, self.left_transposed);
        let (inner, n) = shape(&self.right, self.right_transposed);
        assert_eq!((inner, m, n), (k, self.out.rows, self.out.cols), "product: shapes");
        assert_eq!(self.left.dtype, self.right.dtype, "product: dtypes");
        if let Some(onto) = &self.onto {
            assert_eq!((onto.shape(), onto.dtype), (self.out.shape(), self.out.dtype), "onto");
        }
    }
}

/// What the choice of an algorithm depends on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    dtypes: [Dtype; 2],
    transposed: [bool; 2],
    /// Shapes of left and right in memory; the rows of left may be rounded up.
    shape: [usize; 4],
    strides: [usize; 4],
    alignments: [u32; 4],
    adds: bool,
}

/// A handle of cuBLASLt with its workspace, and the algorithms found so far.
pub(super) struct Blas {
    handle: lts::cublasLtHandle_t,
    workspace: Buffer,
    /// `None`: cuBLASLt has no algorithm.
    algorithms: Mutex<HashMap<Key, Option<lts::cublasLtMatmulAlgo_t>>>,
    /// Version of the library, for the log.
    pub(super) version: String,
}

// SAFETY: the handle may be used from any thread; calls of one stream share the workspace in order.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn new(memory: &Arc<Memory>) -> Result<Self> {
        // SAFETY: loads the library and unloads it.
        if !unsafe { lts::is_culib_present() } {
            return Err(error("CUDA: the library cuBLASLt, for matrix products, was not found")
                .expected("libcublasLt.so.12 or .13")
                .hint("install cuBLAS (Debian and Ubuntu: `libcublas-12-x`; pip: `nvidia-cublas`) and add its folder to LD_LIBRARY_PATH"));
        }
        let workspace = memory.allocate(WORKSPACE_BYTES)?;
        let handle = lt::create_handle().map_err(|e| failed("open cuBLASLt", e))?;
        // SAFETY: takes nothing and returns a number.
        let version = unsafe { lts::cublasLtGetVersion() };
        // 13.1.0 is 130100, 12.9.1 is 120901.
        let version = format!("{}.{}", version / 10_000, version / 100 % 100);
        Ok(Blas { handle, workspace, algorithms: Mutex::default(), version })
    }

    /// Computes a product whose dimensions are all positive. Returns false, and computes nothing, if cuBLASLt has
    /// no algorithm for it.
    pub(super) fn multiply(&self, context: &Context, product: &Product) -> Result<bool> {
        context.enter()?;
        let call = Call::new(product)?;
        // The number of tokens changes from step to step; the algorithm for a slightly larger number is reused.
        let rounded = self.algorithm(product, key(product, rounded_rows(product.left.rows)))?;
        if let Some(algorithm) = rounded
            && self.run(context, product, &call, &algorithm).is_ok()
        {
            return Ok(true);
        }
        let exact = self.algorithm(product, key(product, product.left.rows))?;
        let Some(algorithm) = exact else { return Ok(false) };
        match self.run(context, product, &call, &algorithm) {
            Ok(()) => Ok(true),
            Err(e) if is_unsupported(&e) => Ok(false),
            Err(e) => Err(failed("multiply", e)),
        }
    }

    fn algorithm(&self, product: &Product, key: Key) -> Result<Option<lts::cublasLtMatmulAlgo_t>> {
        // A panic in another thread cannot leave the map partially updated.
        let mut known = self.algorithms.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = known.get(&key) {
            return Ok(*found);
        }
        let found = self.find(product, &key)?;
        known.insert(key, found);
        Ok(found)
    }

    fn find(&self, product: &Product, key: &Key) -> Result<Option<lts::cublasLtMatmulAlgo_t>> {
        use lts::cublasLtMatmulPreferenceAttributes_t as P;
        let mut like = *product;
        like.left.rows = key.shape[0];
        if product.left_transposed {
            like.right.rows = key.shape[0];
        } else {
            like.out.rows = key.shape[0];
            like.onto = like.onto.map(|onto| Block { rows: key.shape[0], ..onto });
        }
        let call = Call::new(&like)?;
        let preference = Preference::new()?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES)?;
        // Partial sums of a split inner dimension stay f32, and are added in a fixed order.
        let reduction =
            lts::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        preference.set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &reduction)?;
        // cuBLASLt's A is our right operand.
        let [left, right, onto, out] = key.alignments;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &right)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &left)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &onto)?;
        preference.set(P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out)?;
        // SAFETY: all descriptors are alive.
        let found = unsafe {
            lt::get_matmul_algo_heuristic(
                self.handle,
                call.description.0,
                call.a.0,
                call.b.0,
                call.c.0,
                call.d.0,
                preference.0,
            )
        };
        match found {
            Ok(found) => Ok(Some(found.algo)),
            Err(e) if is_unsupported(&e) => Ok(None),
            Err(e) => Err(failed("choose an algorithm for a product", e)),
        }
    }

    fn run(
        &self,
        context: &Context,
        product: &Product,
        call: &Call,
        algorithm: &lts::cublasLtMatmulAlgo_t,
    ) -> std::result::Result<(), lt::CublasError> {
        let alpha = product.alpha;
        let beta = if product.onto.is_some() { 1.0f32 } else { 0.0 };
        let onto = product.onto.unwrap_or(product.out);
        let address = |x: Block| x.pointer as *mut c_void;
        // SAFETY: the descriptors describe the blocks, which are inside their buffers; alpha and beta
        // are read before the call returns; the workspace has the given size.
        unsafe {
            lt::matmul(
                self.handle,
                call.description.0,
                std::ptr::from_ref(&alpha).cast(),
                std::ptr::from_ref(&beta).cast(),
                address(product.right),
                call.a.0,
                address(product.left),
                call.b.0,
                address(onto),
                call.c.0,
                address(product.out),
                call.d.0,
                algorithm,
                self.workspace.pointer() as *mut c_void,
                self.workspace.bytes(),
                context.stream().cast(),
            )
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: created once; this value is the only owner.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

fn key(product: &Product, left_rows: usize) -> Key {
    let Product { left, right, out, onto, .. } = product;
    let onto = onto.unwrap_or(*out);
    let right_rows = if product.left_transposed { left_rows } else { right.rows };
    let alignment = |x: &Block| (1 << x.pointer.trailing_zeros().min(8)).min(ALIGNMENT as u32);
    Key {
        dtypes: [left.dtype, out.dtype],
        transposed: [product.left_transposed, product.right_transposed],
        shape: [left_rows, left.cols, right_rows, right.cols],
        strides: [left.stride, right.stride, onto.stride, out.stride],
        alignments: [alignment(left), alignment(right), alignment(&onto), alignment(out)],
        adds: product.onto.is_some(),
    }
}

/// Numbers of rows that share an algorithm.
fn rounded_rows(rows: usize) -> usize {
    rows.next_multiple_of(if rows < 1024 { 64 } else { 256 })
}

fn is_unsupported(e: &lt::CublasError) -> bool {
    use lts::cublasStatus_t as S;
    matches!(e.0, S::CUBLAS_STATUS_NOT_SUPPORTED | S::CUBLAS_STATUS_INVALID_VALUE)
}

fn failed(doing: &str, e: lt::CublasError) -> crate::Error {
    error(format!("CUDA: cannot {doing}: {:?}", e.0))
}

/// Descriptors of a product. cuBLASLt's matrices are column-major, so every matrix is transposed for it, and
/// `outᵀ = rightᵀ · leftᵀ`: its A is the right operand of the product, its B the left one.
struct Call {
    description: Description,
    a: Layout,
    b: Layout,
    c: Layout,
    d: Layout,
}

impl Call {
    fn new(product: &Product) -> Result<Self> {
        use lts::cublasLtMatmulDescAttributes_t as D;
        let description = Description::new()?;
        let transpose = |transposed| i32::from(transposed); // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
        description.set(D::CUBLASLT_MATMUL_DESC_TRANSA, transpose(product.right_transposed))?;
        description.set(D::CUBLASLT_MATMUL_DESC_TRANSB, transpose(product.left_transposed))?;
        Ok(Call {
            description,
            a: Layout::new(&product.right)?,
            b: Layout::new(&product.left)?,
            c: Layout::new(product.onto.as_ref().unwrap_or(&product.out))?,
            d: Layout::new(&product.out)?,
        })
    }
}

/// The type of a matrix in cuBLASLt's terms.
fn data_type(dtype: Dtype) -> lts::cudaDataType {
    match dtype {
        Dtype::F32 => lts::cudaDataType_t::CUDA_R_32F,
        Dtype::Bf16 => lts::cudaDataType_t::CUDA_R_16BF,
    }
}

struct Layout(lts::cublasLtMatrixLayout_t);

impl Layout {
    fn new(x: &Block) -> Result<Self> {
        lt::create_matrix_layout(data_type(x.dtype), x.cols as u64, x.rows as u64, x.stride as i64)
            .map(Layout)
            .map_err(|e| failed("describe a matrix", e))
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created once; this value is the only owner.
        let _ = unsafe { lt::destroy_matrix_layout(self.0) };
    }
}

struct Description(lts::cublasLtMatmulDesc_t);

impl Description {
    /// Sums in true f32: no TF32 for f32 operands.
    fn new() -> Result<Self> {
        lt::create_matmul_desc(
            lts::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            lts::cudaDataType_t::CUDA_R_32F,
        )
        .map(Description)
        .map_err(|e| failed("describe a product", e))
    }

    fn set(&self, attribute: lts::cublasLtMatmulDescAttributes_t, value: i32) -> Result<()> {
        // SAFETY: these attributes are 32-bit numbers, which are read before the call returns.
        let result = unsafe {
            lt::set_matmul_desc_attribute(self.0, attribute, std::ptr::from_ref(&value).cast(), 4)
        };
        result.map_err(|e| failed("describe a product", e))
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: created once; this value is the only owner.
        let _ = unsafe { lt::destroy_matmul_desc(self.0) };
    }
}

struct Preference(lts::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self> {
        lt::create_matmul_pref().map(Preference).map_err(|e| failed("describe a preference", e))
    }

    fn set<V>(
        &self,
        attribute: lts::cublasLtMatmulPreferenceAttributes_t,
        value: &V,
    ) -> Result<()> {
        // SAFETY: callers pass the attribute's type, which is read before the call returns.
        let result = unsafe {
            lt::set_matmul_pref_attribute(
                self.0,
                attribute,
                std::ptr::from_ref(value).cast(),
                size_of::<V>(),
            )
        };
        result.map_err(|e| failed("describe a preference", e))
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once; this value is the only owner.
        let _ = unsafe { lt::destroy_matmul_pref(self.0) };
    }
}
