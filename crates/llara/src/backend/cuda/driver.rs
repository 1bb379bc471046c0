//! The CUDA driver: one device with its context and one stream, events, modules and pinned memory.
//!
//! This is a thin, safe layer over the C functions of the driver. All work of a [`Context`] goes to
//! one stream, so it runs in the order of the calls.

use std::cell::Cell;
use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys as cu;

use crate::{Error, ErrorKind, Result};

/// The oldest driver that is accepted: CUDA 12.0.
const OLDEST_DRIVER: i32 = 12_000;
/// The lowest compute capability that the kernels are written for: bf16 tensor cores, `cp.async`.
const LOWEST_CAPABILITY: (i32, i32) = (8, 0);

/// An error of this backend.
pub(super) fn error(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Backend, what)
}

/// Converts a result of the driver; `doing` completes the message "cannot ...".
pub(super) fn check(result: cu::CUresult, doing: &str) -> Result<()> {
    use cu::cudaError_enum as E;
    if result == E::CUDA_SUCCESS {
        return Ok(());
    }
    let code = result as u32;
    let failure = error(format!("CUDA: cannot {doing}: {}", error_name(result)));
    Err(match result {
        E::CUDA_ERROR_OUT_OF_MEMORY => failure.hint(
            "the GPU is out of memory: compute in smaller chunks (--chunk-tokens), or in bf16",
        ),
        E::CUDA_ERROR_NO_BINARY_FOR_GPU | E::CUDA_ERROR_INVALID_IMAGE => failure
            .hint("the driver cannot load kernels compiled by this NVRTC: update the driver or use an NVRTC of its CUDA version"),
        _ if code >= 700 => failure.hint(
            "an earlier operation on the GPU failed and its context is lost: restart the program; `dmesg` may name the fault",
        ),
        _ => failure,
    })
}

fn error_name(result: cu::CUresult) -> String {
    let mut name = std::ptr::null();
    // SAFETY: `name` is written with a pointer to a static string, or null for an unknown code.
    let known = unsafe { cu::cuGetErrorName(result, &mut name) } == cu::CUresult::CUDA_SUCCESS;
    if !known || name.is_null() {
        return format!("error {}", result as u32);
    }
    // SAFETY: the driver's names are static and end with a zero byte.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// A device, its primary context and one stream.
pub(super) struct Context {
    device: cu::CUdevice,
    context: cu::CUcontext,
    stream: cu::CUstream,
    /// Marketing name, such as `NVIDIA H100 80GB HBM3`.
    pub(super) name: String,
    /// Compute capability, major and minor.
    pub(super) capability: (i32, i32),
    /// Version of CUDA that the driver supports, `1000 · major + 10 · minor`.
    pub(super) driver_version: i32,
    /// Total memory of the device in bytes.
    pub(super) total_memory: usize,
}

// SAFETY: contexts and streams of the driver may be used from any thread that has made the context
// current, which `enter` does.
unsafe impl Send for Context {}
// SAFETY: as above; the driver's functions are thread-safe.
unsafe impl Sync for Context {}

thread_local! {
    /// The context that this thread made current most recently.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

impl Context {
    /// Opens a device.
    ///
    /// # Errors
    /// If there is no driver or no such device, or either is too old.
    pub(super) fn new(ordinal: usize) -> Result<Arc<Self>> {
        // SAFETY: loads the library and unloads it.
        if !unsafe { cu::is_culib_present() } {
            return Err(error("CUDA: no NVIDIA driver found")
                .expected("the library libcuda.so.1, which the driver's package installs")
                .hint("install the NVIDIA driver, or compute on the CPU"));
        }
        // SAFETY: called before any other function of the driver.
        check(unsafe { cu::cuInit(0) }, "initialize the driver")
            .map_err(|e| e.hint("run `nvidia-smi` to check whether the driver finds a GPU"))?;
        let mut driver_version = 0;
        // SAFETY: writes one number.
        check(unsafe { cu::cuDriverGetVersion(&mut driver_version) }, "read the driver's version")?;
        if driver_version < OLDEST_DRIVER {
            return Err(error("CUDA: the NVIDIA driver is too old")
                .expected(format!("CUDA {} or later", version_text(OLDEST_DRIVER)))
                .got(format!("CUDA {}", version_text(driver_version)))
                .hint("update the NVIDIA driver"));
        }
        let mut count = 0;
        // SAFETY: writes one number.
        check(unsafe { cu::cuDeviceGetCount(&mut count) }, "count the devices")?;
        if ordinal >= count as usize {
            return Err(error(format!("CUDA: there is no GPU {ordinal}"))
                .expected(match count {
                    0 => "at least one GPU".to_owned(),
                    count => format!("a number from 0 to {}", count - 1),
                })
                .hint("`nvidia-smi -L` lists the GPUs; CUDA_VISIBLE_DEVICES may hide some"));
        }
        let mut device = 0;
        // SAFETY: writes one number.
        check(unsafe { cu::cuDeviceGet(&mut device, ordinal as i32) }, "find the device")?;
        Self::open(device, driver_version).map(Arc::new)
    }

    fn open(device: cu::CUdevice, driver_version: i32) -> Result<Self> {
        use cu::CUdevice_attribute_enum as A;
        let mut name = [0i8; 256];
        // SAFETY: writes at most 256 bytes, with a zero at the end.
        let named = unsafe { cu::cuDeviceGetName(name.as_mut_ptr().cast(), 256, device) };
        check(named, "read its name")?;
        // SAFETY: the driver ended it with a zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr().cast()) }.to_string_lossy().into_owned();
        let capability = (
            attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < LOWEST_CAPABILITY {
            let (major, minor) = capability;
            return Err(error(format!("CUDA: {name} is too old"))
                .expected("compute capability 8.0 or higher (Ampere or later)")
                .got(format!("{major}.{minor}"))
                .hint("compute on the CPU, or choose another GPU with cuda:N"));
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: writes a handle that `drop` releases.
        check(unsafe { cu::cuDevicePrimaryCtxRetain(&mut context, device) }, "open the device")?;
        let mut this = Context {
            device,
            context,
            stream: std::ptr::null_mut(),
            name,
            capability,
            driver_version,
            total_memory: 0,
        };
        this.enter()?;
        const NON_BLOCKING: u32 = 1;
        // SAFETY: writes a handle that `drop` releases.
        check(unsafe { cu::cuStreamCreate(&mut this.stream, NON_BLOCKING) }, "make a stream")?;
        this.total_memory = this.memory_info()?.1;
        Ok(this)
    }

    /// Makes the context current on this thread.
    pub(super) fn enter(&self) -> Result<()> {
        let id = self.context as usize;
        if CURRENT.get() != id {
            // SAFETY: the context lives as long as `self`.
            check(unsafe { cu::cuCtxSetCurrent(self.context) }, "enter the context")?;
            CURRENT.set(id);
        }
        Ok(())
    }

    pub(super) fn device(&self) -> cu::CUdevice {
        self.device
    }

    /// The stream, for libraries that enqueue work on it.
    pub(super) fn stream(&self) -> cu::CUstream {
        self.stream
    }

    /// Free and total bytes of the device.
    pub(super) fn memory_info(&self) -> Result<(usize, usize)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        check(unsafe { cu::cuMemGetInfo_v2(&mut free, &mut total) }, "read the free memory")?;
        Ok((free, total))
    }

    /// Whether the device has a capability that the driver reports as a flag.
    pub(super) fn has(&self, ability: cu::CUdevice_attribute) -> bool {
        attribute(self.device, ability).is_ok_and(|value| value != 0)
    }

    /// Waits for all work enqueued so far.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as `self`.
        check(unsafe { cu::cuStreamSynchronize(self.stream) }, "finish the work on the GPU")
    }

    /// Records an event after all work enqueued so far.
    pub(super) fn record(&self, event: &Event) -> Result<()> {
        self.enter()?;
        // SAFETY: event and stream are alive and of one context.
        check(unsafe { cu::cuEventRecord(event.event, self.stream) }, "record an event")
    }

    /// Launches a kernel; `args` is its only parameter.
    ///
    /// # Safety
    /// The parameter of the kernel must have the layout of `A`, and every pointer in it must be valid for the
    /// elements that the kernel accesses.
    pub(super) unsafe fn launch<A: Copy>(
        &self,
        function: cu::CUfunction,
        grid: [u32; 3],
        block: u32,
        shared_bytes: u32,
        args: &A,
    ) -> Result<()> {
        self.enter()?;
        let mut parameters = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
        let [x, y, z] = grid;
        // SAFETY: the driver copies the parameter before it returns; the rest is guaranteed by the caller.
        let result = unsafe {
            cu::cuLaunchKernel(
                function,
                x,
                y,
                z,
                block,
                1,
                1,
                shared_bytes,
                self.stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(result, "launch a kernel")
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Failures cannot be reported here, and the device is no longer used.
        let _ = self.enter();
        // SAFETY: this value is the only owner of the stream; the context was retained once.
        unsafe {
            if !self.stream.is_null() {
                let _ = cu::cuStreamSynchronize(self.stream);
                let _ = cu::cuStreamDestroy_v2(self.stream);
            }
            let _ = cu::cuDevicePrimaryCtxRelease_v2(self.device);
        }
        CURRENT.set(0);
    }
}

fn attribute(device: cu::CUdevice, which: cu::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: writes one number.
    check(unsafe { cu::cuDeviceGetAttribute(&mut value, which, device) }, "read an attribute")?;
    Ok(value)
}

/// `13.0` for 13000.
pub(super) fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// A point in the stream that the host can wait for.
pub(super) struct Event {
    event: cu::CUevent,
    context: Arc<Context>,
}

// SAFETY: the driver's functions on events are thread-safe.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self> {
        context.enter()?;
        const DISABLE_TIMING: u32 = 2;
        let mut event = std::ptr::null_mut();
        // SAFETY: writes a handle that `drop` releases.
        check(unsafe { cu::cuEventCreate(&mut event, DISABLE_TIMING) }, "make an event")?;
        Ok(Event { event, context: context.clone() })
    }

    /// Waits until the device has reached the event.
    pub(super) fn wait(&self) -> Result<()> {
        self.context.enter()?;
        // SAFETY: the event is alive.
        check(unsafe { cu::cuEventSynchronize(self.event) }, "finish the work on the GPU")
    }

    /// Whether the device has reached the event.
    pub(super) fn is_reached(&self) -> Result<bool> {
        self.context.enter()?;
        // SAFETY: the event is alive.
        match unsafe { cu::cuEventQuery(self.event) } {
            cu::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check(result, "query the progress of the GPU").map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: this value is the only owner; the driver keeps the event until the device has reached it.
        let _ = unsafe { cu::cuEventDestroy_v2(self.event) };
    }
}

/// Page-locked host memory, which the device copies from and to asynchronously.
pub(super) struct Pinned {
    start: *mut u8,
    bytes: usize,
    context: Arc<Context>,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read it.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Zeroed, so that it may be read.
    pub(super) fn new(context: &Arc<Context>, bytes: usize) -> Result<Self> {
        context.enter()?;
        let bytes = bytes.max(1);
        let mut start = std::ptr::null_mut();
        // SAFETY: writes a pointer to `bytes` bytes that `drop` releases.
        check(unsafe { cu::cuMemHostAlloc(&mut start, bytes, 0) }, "allocate pinned host memory")
            .map_err(|e| e.hint("the host is out of memory, or `ulimit -l` is too low"))?;
        // SAFETY: the allocation has this size.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { start: start.cast(), bytes, context: context.clone() })
    }

    pub(super) fn capacity(&self) -> usize {
        self.bytes
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: this value owns these bytes, which are initialized. Callers wait for the device before they read.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut c_void {
        self.start.cast()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _ = self.context.enter();
        // SAFETY: this value is the only owner; callers wait for the device before they drop it.
        let _ = unsafe { cu::cuMemFreeHost(self.start.cast()) };
    }
}

/// Compiled kernels on the device.
pub(super) struct Module(cu::CUmodule);

// SAFETY: modules are used through thread-safe functions of the driver.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// A kernel.
#[derive(Clone, Copy)]
pub(super) struct Function(pub(super) cu::CUfunction);

// SAFETY: a handle that is used through thread-safe functions of the driver.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// Loads a cubin.
    pub(super) fn load(context: &Context, image: &[u8]) -> Result<Self> {
        context.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: a cubin contains its length; the driver copies it.
        let result = unsafe { cu::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
        check(result, "load the kernels")?;
        Ok(Module(module))
    }

    /// A kernel that may use `shared_bytes` bytes of dynamic shared memory.
    pub(super) fn function(&self, name: &str, shared_bytes: usize) -> Result<Function> {
        let text = CString::new(name).map_err(|e| error("CUDA: a kernel's name").because(e))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the module is alive, the name ends with a zero byte.
        let result = unsafe { cu::cuModuleGetFunction(&mut function, self.0, text.as_ptr()) };
        check(result, &format!("find the kernel {name}"))?;
        if shared_bytes > 48 << 10 {
            use cu::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as MOST;
            // SAFETY: the function is alive.
            let result = unsafe { cu::cuFuncSetAttribute(function, MOST, shared_bytes as i32) };
            check(
                result,
                &format!("give the kernel {name} {shared_bytes} bytes of shared memory"),
            )?;
        }
        Ok(Function(function))
    }
}
