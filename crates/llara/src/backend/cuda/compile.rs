//! Kernels: their source text, compiled by NVRTC for the GPU, with a cache on disk.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use cudarc::nvrtc::sys as nvrtc;

use super::driver::{Context, Function, Module, error, version_text};
use crate::Result;

/// A file of kernels.
struct Unit {
    name: &'static str,
    text: &'static str,
}

/// Names a file in `kernels/`.
macro_rules! source {
    ($name:literal) => {
        Unit { name: $name, text: include_str!(concat!("kernels/", $name)) }
    };
}

/// The files that are compiled, each to a separate module.
const UNITS: &[Unit] = &[
    source!("rows.cu"),
    source!("norms.cu"),
    source!("pointwise.cu"),
    source!("objective.cu"),
    source!("gemm.cu"),
    source!("attention_plain.cu"),
    source!("attention_forward.cu"),
    source!("attention_backward.cu"),
];

/// The files that they include.
const HEADERS: &[Unit] =
    &[source!("prelude.cuh"), source!("elements.cuh"), source!("attention.cuh")];

/// The compiled kernels of a device.
pub(super) struct Kernels {
    modules: Vec<Module>,
    functions: Mutex<HashMap<String, Function>>,
    /// Version of NVRTC, for the log.
    pub(super) compiler: String,
}

impl Kernels {
    /// Compiles the files that are not in the disk cache, in parallel.
    ///
    /// # Errors
    /// If NVRTC is missing or does not support the GPU.
    pub(super) fn new(context: &Context) -> Result<Self> {
        let version = compiler_version()?;
        let (major, minor) = context.capability;
        let options = [
            format!("--gpu-architecture=sm_{major}{minor}"),
            "--std=c++17".to_owned(),
            "-default-device".to_owned(),
        ];
        let folder = cache_folder();
        let images: Vec<Result<Vec<u8>>> = std::thread::scope(|scope| {
            let compile = |unit: &'static Unit| {
                let (options, folder) = (&options, folder.as_deref());
                scope.spawn(move || image(unit, options, version, folder))
            };
            let tasks: Vec<_> = UNITS.iter().map(compile).collect();
            let failed = || Err(error("CUDA: compiling the kernels panicked"));
            tasks.into_iter().map(|task| task.join().unwrap_or_else(|_| failed())).collect()
        });
        let mut modules = Vec::new();
        for image in images {
            modules.push(Module::load(context, &image?)?);
        }
        let compiler = version_text(version.0 * 1000 + version.1 * 10);
        Ok(Kernels { modules, functions: Mutex::default(), compiler })
    }

    /// A kernel by its name. `shared_bytes` is the largest dynamic shared memory that it is launched with.
    pub(super) fn get(&self, name: &str, shared_bytes: usize) -> Result<Function> {
        // A panic in another thread cannot leave the map partially updated.
        let mut functions = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(&function) = functions.get(name) {
            return Ok(function);
        }
        let mut failure = None;
        for module in &self.modules {
            match module.function(name, shared_bytes) {
                Ok(function) => {
                    functions.insert(name.to_owned(), function);
                    return Ok(function);
                }
                Err(e) => failure = Some(e),
            }
        }
        Err(failure.unwrap_or_else(|| error(format!("CUDA: there is no kernel {name}"))))
    }
}

/// Major and minor version of NVRTC.
fn compiler_version() -> Result<(i32, i32)> {
    // SAFETY: loads the library and unloads it.
    if !unsafe { nvrtc::is_culib_present() } {
        return Err(error("CUDA: the kernel compiler NVRTC was not found")
            .expected("libnvrtc.so.12 or .13, with libnvrtc-builtins in the same folder")
            .hint("install NVRTC (Debian and Ubuntu: `cuda-nvrtc-12-x`; pip: `nvidia-cuda-nvrtc`) and add its folder to LD_LIBRARY_PATH"));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two numbers.
    check(unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) }, "read the version of NVRTC")?;
    Ok((major, minor))
}

fn check(result: nvrtc::nvrtcResult, doing: &str) -> Result<()> {
    if result == nvrtc::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: returns a static string that ends with a zero byte.
    let text = unsafe { CStr::from_ptr(nvrtc::nvrtcGetErrorString(result)) };
    Err(error(format!("CUDA: cannot {doing}: {}", text.to_string_lossy())))
}

/// A cubin, from the disk cache or compiled.
fn image(
    unit: &Unit,
    options: &[String],
    version: (i32, i32),
    folder: Option<&Path>,
) -> Result<Vec<u8>> {
    let cached = folder.map(|folder| folder.join(cache_name(unit, options, version)));
    if let Some(image) = cached.as_deref().and_then(read_cached) {
        return Ok(image);
    }
    let image = compile(unit, options)?;
    if let Some(path) = cached {
        // If the cache cannot be written, the next start compiles again.
        let _ = write_cached(&path, &image);
    }
    Ok(image)
}

/// The folder of compiled kernels: `LLARA_CUDA_CACHE`, else a folder in the user's cache.
fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let folder = set("LLARA_CUDA_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|cache| cache.join("llara/kernels")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/llara/kernels")))?;
    fs::create_dir_all(&folder).ok().map(|()| folder)
}

/// A name that differs whenever the output of the compiler may differ.
fn cache_name(unit: &Unit, options: &[String], version: (i32, i32)) -> String {
    let mut hash = blake3::Hasher::new();
    let mut add = |part: &str| {
        hash.update(&(part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    };
    add(&format!("{version:?}"));
    options.iter().for_each(|option| add(option));
    HEADERS.iter().chain([unit]).for_each(|unit| {
        add(unit.name);
        add(unit.text);
    });
    format!("{}.cubin", hash.finalize().to_hex())
}

/// The image, whose hash precedes it in the file; `None` if the file is missing or damaged.
fn read_cached(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = fs::read(path).ok()?;
    let hash: [u8; 32] = bytes.get(..32)?.try_into().ok()?;
    let image = bytes.split_off(32);
    (*blake3::hash(&image).as_bytes() == hash && !image.is_empty()).then_some(image)
}

fn write_cached(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(blake3::hash(image).as_bytes())?;
    file.write_all(image)?;
    file.persist(path)?;
    Ok(())
}

/// A program of NVRTC; destroyed on drop.
struct Program(nvrtc::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created once; this value is the only owner.
        let _ = unsafe { nvrtc::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn compile(unit: &Unit, options: &[String]) -> Result<Vec<u8>> {
    let c_text = |text: &str| {
        CString::new(text).map_err(|e| error("CUDA: a zero byte in a kernel's text").because(e))
    };
    let (text, name) = (c_text(unit.text)?, c_text(unit.name)?);
    let headers = HEADERS.iter().map(|h| c_text(h.text)).collect::<Result<Vec<_>>>()?;
    let names = HEADERS.iter().map(|h| c_text(h.name)).collect::<Result<Vec<_>>>()?;
    let options = options.iter().map(|o| c_text(o)).collect::<Result<Vec<_>>>()?;
    let pointers = |texts: &[CString]| texts.iter().map(|t| t.as_ptr()).collect::<Vec<_>>();
    let (headers_at, names_at) = (pointers(&headers), pointers(&names));
    let options_at = pointers(&options);
    let mut program = Program(std::ptr::null_mut());
    // SAFETY: all texts end with a zero byte and outlive the call, and there are as many headers as names.
    let result = unsafe {
        nvrtc::nvrtcCreateProgram(
            &mut program.0,
            text.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
            headers_at.as_ptr().cast(),
            names_at.as_ptr().cast(),
        )
    };
    check(result, "create a program")?;
    // SAFETY: the program is alive, the options end with a zero byte.
    let result = unsafe {
        nvrtc::nvrtcCompileProgram(program.0, options.len() as i32, options_at.as_ptr().cast())
    };
    check(result, &format!("compile the kernels in {}", unit.name)).map_err(|e| {
        e.got(log(&program)).hint("an older NVRTC may not support this GPU: update it")
    })?;
    let mut bytes = 0;
    // SAFETY: writes one number.
    check(unsafe { nvrtc::nvrtcGetCUBINSize(program.0, &mut bytes) }, "read the compiled size")?;
    let mut image = vec![0u8; bytes];
    // SAFETY: the image has that many bytes.
    let result = unsafe { nvrtc::nvrtcGetCUBIN(program.0, image.as_mut_ptr().cast()) };
    check(result, "read the compiled kernels")?;
    Ok(image)
}

/// The log of the compiler.
fn log(program: &Program) -> String {
    let mut bytes = 0;
    // SAFETY: writes one number.
    let known = unsafe { nvrtc::nvrtcGetProgramLogSize(program.0, &mut bytes) };
    if check(known, "").is_err() {
        return String::new();
    }
    let mut text = vec![0u8; bytes];
    // SAFETY: the text has that many bytes.
    let known = unsafe { nvrtc::nvrtcGetProgramLog(program.0, text.as_mut_ptr().cast()) };
    if check(known, "").is_err() {
        return String::new();
    }
    String::from_utf8_lossy(&text).trim_end_matches('\0').trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_cache_entry_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.cubin");
        assert_eq!(read_cached(&path), None);
        write_cached(&path, b"an image").unwrap();
        assert_eq!(read_cached(&path).as_deref(), Some(&b"an image"[..]));
        let good = fs::read(&path).unwrap();
        for cut in [0, 31, 32, good.len() - 1] {
            fs::write(&path, &good[..cut]).unwrap();
            assert_eq!(read_cached(&path), None, "{cut} bytes");
        }
        for at in [0, 40 - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert_eq!(read_cached(&path), None, "byte {at}");
        }
    }

    #[test]
    fn cache_names_depend_on_all_inputs_of_the_compiler() {
        let options = |arch: &str| vec![format!("--gpu-architecture={arch}")];
        let name = |unit: &Unit, arch: &str, version| cache_name(unit, &options(arch), version);
        let names = [
            name(&UNITS[0], "sm_80", (13, 0)),
            name(&UNITS[1], "sm_80", (13, 0)),
            name(&UNITS[0], "sm_90", (13, 0)),
            name(&UNITS[0], "sm_80", (12, 9)),
        ];
        for (i, a) in names.iter().enumerate() {
            assert!(names[..i].iter().all(|b| a != b), "{names:?}");
        }
    }
}
