//! The functions of an MPI library, which is loaded at run time, behind safe methods.
//!
//! The program does not link MPI: one binary runs with and without it. The binary interface is Open MPI's (major
//! versions 4 and 5), where handles are addresses of objects in the library. MPICH and its descendants have another
//! one and are refused by name.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::{Error, ErrorKind, Result};

/// Environment variable with the path of the library.
pub(super) const LIBRARY_VARIABLE: &str = "LLARA_MPI_LIBRARY";
/// File names of the library, the ones with Open MPI's interface first.
const NAMES: [&str; 5] =
    ["libmpi.so.40", "libmpi.so", "libmpi.40.dylib", "libmpi.so.12", "libmpich.so.12"];

/// `MPI_THREAD_FUNNELED`: only the thread that initialized MPI calls it.
const THREAD_FUNNELED: c_int = 1;
/// `MPI_ANY_SOURCE`.
const ANY_SOURCE: c_int = -1;
const SUCCESS: c_int = 0;
/// `MPI_MAX_ERROR_STRING` and `MPI_MAX_LIBRARY_VERSION_STRING` are 256; newer versions may have more.
const TEXT_BYTES: usize = 8192;
/// `MPI_STATUS_IGNORE`.
const STATUS_IGNORE: *mut c_void = ptr::null_mut();

/// The most bytes of one message: MPI counts in `int`.
pub(super) const MAX_MESSAGE_BYTES: usize = 1 << 30;

/// An object of the library: communicator, datatype, error handler or request.
type Handle = *mut c_void;

/// The functions of the library that are used.
struct Functions {
    init_thread: unsafe extern "C" fn(*mut c_int, *mut c_void, c_int, *mut c_int) -> c_int,
    comm_rank: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_size: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    comm_set_errhandler: unsafe extern "C" fn(Handle, Handle) -> c_int,
    error_string: unsafe extern "C" fn(c_int, *mut c_char, *mut c_int) -> c_int,
    isend: unsafe extern "C" fn(
        *const c_void,
        c_int,
        Handle,
        c_int,
        c_int,
        Handle,
        *mut Handle,
    ) -> c_int,
    irecv: unsafe extern "C" fn(
        *mut c_void,
        c_int,
        Handle,
        c_int,
        c_int,
        Handle,
        *mut Handle,
    ) -> c_int,
    test: unsafe extern "C" fn(*mut Handle, *mut c_int, *mut c_void) -> c_int,
    cancel: unsafe extern "C" fn(*mut Handle) -> c_int,
    wait: unsafe extern "C" fn(*mut Handle, *mut c_void) -> c_int,
    abort: unsafe extern "C" fn(Handle, c_int) -> c_int,
    finalize: unsafe extern "C" fn() -> c_int,
}

/// The addresses of the library's predefined objects.
struct Objects {
    /// `MPI_COMM_WORLD`
    world: Handle,
    /// `MPI_BYTE`
    byte: Handle,
    /// `MPI_ERRORS_RETURN`
    errors_return: Handle,
}

/// The initialized library: all processes that were started together.
///
/// Neither `Send` nor `Sync`: MPI is called only by the thread that initialized it.
pub(super) struct Communicator {
    functions: Functions,
    objects: Objects,
    rank: usize,
    size: usize,
    /// Never unloaded: the library keeps threads and handlers of its own.
    _library: ManuallyDrop<Library>,
    _of_one_thread: PhantomData<*const ()>,
}

/// The buffer of a message that is on its way. MPI reads or writes it until the request is complete.
enum Buffer {
    /// Shared, because one buffer may be sent to several ranks.
    Sent {
        _data: Arc<Vec<u8>>,
    },
    Received(Box<[u8]>),
}

/// A message that is being sent or received. If it is dropped before it is complete, its buffer is leaked.
pub(super) struct Request {
    handle: Handle,
    buffer: ManuallyDrop<Buffer>,
    is_complete: bool,
}

impl Request {
    /// The received bytes; empty for a message that was sent.
    ///
    /// # Panics
    /// If the request is not complete.
    pub(super) fn into_received(mut self) -> Box<[u8]> {
        assert!(self.is_complete, "a message that has not arrived");
        match &mut *self.buffer {
            Buffer::Received(bytes) => std::mem::take(bytes),
            Buffer::Sent { .. } => Box::default(),
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.is_complete
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if self.is_complete {
            // SAFETY: the request is complete, so MPI no longer uses the buffer, and it is dropped only here.
            unsafe { ManuallyDrop::drop(&mut self.buffer) }
        }
    }
}

fn error(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Distributed, what)
}

impl Communicator {
    /// Loads the library and initializes it for the calling thread.
    ///
    /// # Errors
    /// If there is no library, if it has another binary interface than Open MPI's, or if it cannot be
    /// initialized.
    pub(super) fn initialize() -> Result<Self> {
        let library = load()?;
        let objects = Objects::of(&library)?;
        let functions = Functions::of(&library)?;
        let mut communicator = Communicator {
            functions,
            objects,
            rank: 0,
            size: 0,
            _library: ManuallyDrop::new(library),
            _of_one_thread: PhantomData,
        };
        communicator.start()?;
        Ok(communicator)
    }

    fn start(&mut self) -> Result<()> {
        let mut provided = 0;
        // SAFETY: MPI allows null for the program's arguments; `provided` is written before the call returns. MPI
        // was not initialized before: `MpiWorld` starts it once in a process.
        let code = unsafe {
            (self.functions.init_thread)(
                ptr::null_mut(),
                ptr::null_mut(),
                THREAD_FUNNELED,
                &mut provided,
            )
        };
        self.check(code, "initialize MPI")?;
        if provided < THREAD_FUNNELED {
            return Err(error("the MPI library does not support threads")
                .expected("MPI_THREAD_FUNNELED or more")
                .got(format!("level {provided}"))
                .hint("install a build of Open MPI with support for threads"));
        }
        let Objects { world, errors_return, .. } = self.objects;
        // SAFETY: MPI is initialized; both handles are predefined objects. Failures then return codes instead of
        // ending the process.
        let code = unsafe { (self.functions.comm_set_errhandler)(world, errors_return) };
        self.check(code, "set MPI's error handler")?;
        let (mut rank, mut size) = (0, 0);
        // SAFETY: MPI is initialized, and the number is written before the call returns.
        let code = unsafe { (self.functions.comm_rank)(world, &mut rank) };
        self.check(code, "read the rank")?;
        // SAFETY: as above.
        let code = unsafe { (self.functions.comm_size)(world, &mut size) };
        self.check(code, "read the number of processes")?;
        let number = |n: c_int| usize::try_from(n).map_err(|_| error("MPI has a negative rank"));
        (self.rank, self.size) = (number(rank)?, number(size)?);
        Ok(())
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Starts sending the bytes `range` of `data` to a rank.
    ///
    /// # Errors
    /// If MPI reports one.
    ///
    /// # Panics
    /// If the range is outside the data or has more than [`MAX_MESSAGE_BYTES`] bytes.
    pub(super) fn send(
        &self,
        data: &Arc<Vec<u8>>,
        range: Range<usize>,
        to: usize,
        tag: u16,
    ) -> Result<Request> {
        let bytes = &data[range];
        let mut request = Request {
            handle: ptr::null_mut(),
            buffer: ManuallyDrop::new(Buffer::Sent { _data: Arc::clone(data) }),
            is_complete: false,
        };
        // SAFETY: the buffer has `bytes.len()` bytes, is kept and not changed by the request until it is complete,
        // and the handle is written before the call returns.
        let code = unsafe {
            (self.functions.isend)(
                bytes.as_ptr().cast(),
                count(bytes.len()),
                self.objects.byte,
                rank(to),
                c_int::from(tag),
                self.objects.world,
                &mut request.handle,
            )
        };
        self.check(code, &format!("send to rank {to}"))?;
        Ok(request)
    }

    /// Starts receiving `length` bytes from a rank, or from any rank with `None`.
    ///
    /// # Errors
    /// If MPI reports one.
    ///
    /// # Panics
    /// If `length` is more than [`MAX_MESSAGE_BYTES`].
    pub(super) fn receive(&self, length: usize, from: Option<usize>, tag: u16) -> Result<Request> {
        let mut bytes = vec![0; length].into_boxed_slice();
        let start = bytes.as_mut_ptr();
        let mut request = Request {
            handle: ptr::null_mut(),
            buffer: ManuallyDrop::new(Buffer::Received(bytes)),
            is_complete: false,
        };
        // SAFETY: the buffer has `length` bytes, nothing else reads or writes it until the request is complete
        // (moving the box does not move the bytes), and the handle is written before the call returns.
        let code = unsafe {
            (self.functions.irecv)(
                start.cast(),
                count(length),
                self.objects.byte,
                from.map_or(ANY_SOURCE, rank),
                c_int::from(tag),
                self.objects.world,
                &mut request.handle,
            )
        };
        self.check(code, "receive")?;
        Ok(request)
    }

    /// Whether a message has been sent or has arrived. Also lets MPI make progress with all messages.
    ///
    /// # Errors
    /// If MPI reports one.
    pub(super) fn test(&self, request: &mut Request) -> Result<bool> {
        if request.is_complete {
            return Ok(true);
        }
        let mut flag = 0;
        // SAFETY: the handle is that of a request that is not complete, and `flag` is written before the call
        // returns.
        let code = unsafe { (self.functions.test)(&mut request.handle, &mut flag, STATUS_IGNORE) };
        self.check(code, "exchange messages")?;
        request.is_complete = flag != 0;
        Ok(request.is_complete)
    }

    /// Withdraws a receive that is not needed any more.
    ///
    /// # Errors
    /// If MPI reports one; the request's buffer is then leaked.
    pub(super) fn cancel(&self, mut request: Request) -> Result<()> {
        if request.is_complete {
            return Ok(());
        }
        // SAFETY: the handle is that of a receive that is not complete.
        let code = unsafe { (self.functions.cancel)(&mut request.handle) };
        self.check(code, "cancel a message")?;
        // SAFETY: as above. A cancelled receive completes without a message, so this does not block.
        let code = unsafe { (self.functions.wait)(&mut request.handle, STATUS_IGNORE) };
        self.check(code, "cancel a message")?;
        request.is_complete = true;
        Ok(())
    }

    /// Ends all processes. Returns only if MPI fails to do so.
    pub(super) fn abort(&self, exit_code: u8) {
        // SAFETY: MPI is initialized. There is nothing to do about a failure.
        let _ = unsafe { (self.functions.abort)(self.objects.world, c_int::from(exit_code)) };
    }

    /// Shuts MPI down. Every process must do this, and no message may be on its way.
    ///
    /// # Errors
    /// If MPI reports one.
    pub(super) fn finalize(self) -> Result<()> {
        // SAFETY: MPI is initialized, and this is called once, because it consumes the communicator.
        let code = unsafe { (self.functions.finalize)() };
        self.check(code, "shut MPI down")
    }

    /// Converts the result of a function; `doing` completes the message "cannot ...".
    fn check(&self, code: c_int, doing: &str) -> Result<()> {
        if code == SUCCESS {
            return Ok(());
        }
        let mut text = [0; TEXT_BYTES];
        let mut length = 0;
        // SAFETY: the buffer is larger than `MPI_MAX_ERROR_STRING`. This function may be called at any time in MPI
        // 3.1 and newer.
        let known = unsafe {
            (self.functions.error_string)(code, text.as_mut_ptr(), &mut length) == SUCCESS
        };
        let text = match known {
            true => text_of(&text),
            false => format!("error {code}"),
        };
        Err(error(format!("MPI: cannot {doing}: {text}")))
    }
}

fn count(bytes: usize) -> c_int {
    assert!(bytes <= MAX_MESSAGE_BYTES, "a message of {bytes} bytes");
    bytes as c_int
}

fn rank(rank: usize) -> c_int {
    c_int::try_from(rank).unwrap_or_else(|_| panic!("rank {rank}"))
}

/// The text before the first zero byte.
fn text_of(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> = buffer.iter().map(|&c| c as u8).collect();
    match CStr::from_bytes_until_nul(&bytes) {
        Ok(text) => text.to_string_lossy().trim().to_owned(),
        Err(_) => "no description".to_owned(),
    }
}

/// The first library that can be loaded: that of the environment variable, or one of [`NAMES`].
fn load() -> Result<Library> {
    let named = std::env::var(LIBRARY_VARIABLE).ok().filter(|path| !path.is_empty());
    let names: Vec<&str> = match &named {
        Some(path) => vec![path],
        None => NAMES.to_vec(),
    };
    let mut failures = Vec::new();
    for name in names {
        // SAFETY: the initializers of an MPI library have no requirements. `RTLD_GLOBAL`, because Open MPI
        // loads its components at run time, and they use the symbols of the library.
        match unsafe { Library::open(Some(name), RTLD_NOW | RTLD_GLOBAL) } {
            Ok(library) => return Ok(library),
            Err(e) => failures.push(match std::error::Error::source(&e) {
                Some(source) => format!("{name}: {e}: {source}"),
                None => format!("{name}: {e}"),
            }),
        }
    }
    Err(error("this process was started as one of several, and no MPI library can be loaded")
        .expected("Open MPI 4 or 5, as in Debian's package openmpi-bin")
        .got(failures.join("; "))
        .hint(format!("install Open MPI, or set {LIBRARY_VARIABLE} to the path of its libmpi")))
}

impl Objects {
    fn of(library: &Library) -> Result<Self> {
        let object = |name: &str| -> Option<Handle> {
            // SAFETY: only the address of the symbol is used, so its type does not matter.
            let symbol = unsafe { library.get::<Handle>(name.as_bytes()) }.ok()?;
            Some(*symbol)
        };
        let all = || {
            Some(Objects {
                world: object("ompi_mpi_comm_world")?,
                byte: object("ompi_mpi_byte")?,
                errors_return: object("ompi_mpi_errors_return")?,
            })
        };
        all().ok_or_else(|| {
            error("the MPI library has an unsupported binary interface")
                .expected("Open MPI 4 or 5")
                .got(version(library))
                .hint(format!(
                    "start the run with Open MPI's mpirun; {LIBRARY_VARIABLE} selects one of several libraries"
                ))
        })
    }
}

/// What a library says about itself.
fn version(library: &Library) -> String {
    type GetVersion = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;
    // SAFETY: this is the function's type in every MPI library.
    let Ok(get) = (unsafe { library.get::<GetVersion>(b"MPI_Get_library_version") }) else {
        return "a library without MPI_Get_library_version".to_owned();
    };
    let mut text = [0; TEXT_BYTES];
    let mut length = 0;
    // SAFETY: the buffer is at least as large as `MPI_MAX_LIBRARY_VERSION_STRING` of every implementation (8192 in
    // MPICH). The function may be called before MPI is initialized.
    unsafe { get(text.as_mut_ptr(), &mut length) };
    text_of(&text).lines().next().unwrap_or_default().to_owned()
}

impl Functions {
    fn of(library: &Library) -> Result<Self> {
        /// The function of this name.
        ///
        /// # Safety
        /// It must have the type `F`.
        unsafe fn function<F: Copy>(library: &Library, name: &str) -> Result<F> {
            // SAFETY: promised by the caller.
            match unsafe { library.get::<F>(name.as_bytes()) } {
                Ok(symbol) => Ok(*symbol),
                Err(e) => Err(error(format!("the MPI library has no function {name}")).because(e)),
            }
        }
        // SAFETY: these are the functions' types in `mpi.h` of Open MPI; `Objects::of` has found out that the
        // library has its binary interface.
        unsafe {
            Ok(Functions {
                init_thread: function(library, "MPI_Init_thread")?,
                comm_rank: function(library, "MPI_Comm_rank")?,
                comm_size: function(library, "MPI_Comm_size")?,
                comm_set_errhandler: function(library, "MPI_Comm_set_errhandler")?,
                error_string: function(library, "MPI_Error_string")?,
                isend: function(library, "MPI_Isend")?,
                irecv: function(library, "MPI_Irecv")?,
                test: function(library, "MPI_Test")?,
                cancel: function(library, "MPI_Cancel")?,
                wait: function(library, "MPI_Wait")?,
                abort: function(library, "MPI_Abort")?,
                finalize: function(library, "MPI_Finalize")?,
            })
        }
    }
}
