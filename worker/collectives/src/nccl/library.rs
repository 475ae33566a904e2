//! The process's one libnccl.
//!
//! libtorch_cuda brings a libnccl of its own. A second one in the same process shares global state with it by
//! accident: all-reduces were seen to hang or to fail with "corrupted comm object". cudarc would open
//! `libnccl.so` by name, which is the system's copy if there is one, while PyPI's wheel has `libnccl.so.2` only.
//! So the functions are taken here from the very file that is loaded, and of cudarc come the types.

use super::error::NcclError;
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclResult_t, ncclUniqueId};
use libloading::os::unix::Library as Handle;
use std::collections::BTreeSet;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// Flags of `dlopen` that libloading does not name, as Linux defines them.
const RTLD_NOW: c_int = 0x2;
/// Never unloaded: NCCL has threads of its own.
const RTLD_NODELETE: c_int = 0x1000;

/// `ncclResult_t` as a number: a newer NCCL may return values that cudarc's enum does not have.
pub(super) type Code = c_int;
pub(super) const SUCCESS: Code = ncclResult_t::ncclSuccess as Code;
const IN_PROGRESS: Code = ncclResult_t::ncclInProgress as Code;

/// Functions of NCCL, as its header declares them.
#[derive(Clone, Copy)]
pub(super) struct Functions {
    pub(super) get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    pub(super) get_unique_id: unsafe extern "C" fn(*mut ncclUniqueId) -> Code,
    pub(super) init_rank:
        unsafe extern "C" fn(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> Code,
    pub(super) async_error: unsafe extern "C" fn(ncclComm_t, *mut Code) -> Code,
    pub(super) finalize: unsafe extern "C" fn(ncclComm_t) -> Code,
    pub(super) destroy: unsafe extern "C" fn(ncclComm_t) -> Code,
    pub(super) abort: unsafe extern "C" fn(ncclComm_t) -> Code,
    pub(super) group_start: unsafe extern "C" fn() -> Code,
    pub(super) group_end: unsafe extern "C" fn() -> Code,
    pub(super) all_reduce: unsafe extern "C" fn(
        *const c_void,
        *mut c_void,
        usize,
        c_int,
        c_int,
        ncclComm_t,
        *mut c_void,
    ) -> Code,
    pub(super) send:
        unsafe extern "C" fn(*const c_void, usize, c_int, c_int, ncclComm_t, *mut c_void) -> Code,
    pub(super) recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, ncclComm_t, *mut c_void) -> Code,
    last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
    error_string: unsafe extern "C" fn(Code) -> *const c_char,
}

/// NCCL as it is loaded in this process.
#[derive(Clone)]
pub struct Library {
    pub(super) functions: Functions,
    path: PathBuf,
    version: i32,
}

impl Library {
    /// NCCL: the copy that is loaded already, else the one beside the libtorch in use. Refuses, in one line, where
    /// there is none or where a second copy would come into the process.
    pub fn open() -> Result<Self, NcclError> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let path = pick(&Loaded::read(&maps), |path| path.exists()).map_err(NcclError::Unavailable)?;
        Self::load(&path)
    }

    fn load(path: &Path) -> Result<Self, NcclError> {
        let unusable = |e: libloading::Error| {
            NcclError::Unavailable(format!("`{}` cannot be used: {}", path.display(), root_cause(&e)))
        };
        // SAFETY: a file that is loaded already runs nothing; otherwise its initializers run, as libtorch's would.
        let handle = unsafe { Handle::open(Some(path), RTLD_NOW | RTLD_NODELETE) }.map_err(unusable)?;
        // SAFETY: the types are those of nccl.h, and the library is never unloaded.
        let functions = unsafe { Functions::of(&handle) }.map_err(unusable)?;
        let mut version = 0;
        // SAFETY: writes one integer.
        let code = unsafe { (functions.get_version)(&raw mut version) };
        let library = Self { functions, path: path.to_owned(), version };
        library.check("telling its version", code).map(|_| library)
    }

    /// The version as NCCL encodes it: 22809 is 2.28.9.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the call is done; `false` while a non-blocking communicator still works on it.
    pub(super) fn check(&self, doing: &'static str, code: Code) -> Result<bool, NcclError> {
        match code {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(NcclError::Nccl { doing, reason: self.words(code) }),
        }
    }

    /// What NCCL says about `code`, on one line.
    fn words(&self, code: Code) -> String {
        // SAFETY: both return null or a string of NCCL's that ends with a zero byte; a null communicator asks for
        // the last error of any.
        let (general, last) = unsafe {
            let text = |p: *const c_char| {
                if p.is_null() { String::new() } else { CStr::from_ptr(p).to_string_lossy().into_owned() }
            };
            (
                text((self.functions.error_string)(code)),
                text((self.functions.last_error)(std::ptr::null_mut())),
            )
        };
        let last = last.lines().map(str::trim).find(|line| !line.is_empty()).map(str::to_owned);
        last.map_or(general.clone(), |last| format!("{general} ({last})"))
    }
}

impl Functions {
    /// # Safety
    /// `handle` is NCCL, and stays loaded.
    unsafe fn of(handle: &Handle) -> Result<Self, libloading::Error> {
        /// # Safety
        /// `F` is the type of the function `name`.
        unsafe fn symbol<F: Copy>(handle: &Handle, name: &str) -> Result<F, libloading::Error> {
            // SAFETY: as the caller promises.
            unsafe { handle.get::<F>(name).map(|symbol| *symbol) }
        }
        // SAFETY: each name has the type that nccl.h gives it.
        unsafe {
            Ok(Self {
                get_version: symbol(handle, "ncclGetVersion")?,
                get_unique_id: symbol(handle, "ncclGetUniqueId")?,
                init_rank: symbol(handle, "ncclCommInitRankConfig")?,
                async_error: symbol(handle, "ncclCommGetAsyncError")?,
                finalize: symbol(handle, "ncclCommFinalize")?,
                destroy: symbol(handle, "ncclCommDestroy")?,
                abort: symbol(handle, "ncclCommAbort")?,
                group_start: symbol(handle, "ncclGroupStart")?,
                group_end: symbol(handle, "ncclGroupEnd")?,
                all_reduce: symbol(handle, "ncclAllReduce")?,
                send: symbol(handle, "ncclSend")?,
                recv: symbol(handle, "ncclRecv")?,
                last_error: symbol(handle, "ncclGetLastError")?,
                error_string: symbol(handle, "ncclGetErrorString")?,
            })
        }
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| source.to_string())
}

/// What a process has mapped, as far as NCCL is concerned.
#[derive(Debug, Default)]
struct Loaded {
    nccl: BTreeSet<PathBuf>,
    libtorch: Option<PathBuf>,
}

impl Loaded {
    /// From the text of `/proc/self/maps`: address, permissions, offset, device, inode, path.
    fn read(maps: &str) -> Self {
        let mut loaded = Self::default();
        for path in maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..]))) {
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            if name == "libnccl.so" || name.starts_with("libnccl.so.") {
                loaded.nccl.insert(path.to_owned());
            } else if name == "libtorch_cuda.so" {
                loaded.libtorch = Some(path.to_owned());
            }
        }
        loaded
    }
}

/// The file to take NCCL from, or why there is none.
fn pick(loaded: &Loaded, exists: impl Fn(&Path) -> bool) -> Result<PathBuf, String> {
    let mut files = loaded.nccl.iter();
    match (files.next(), files.next()) {
        (Some(first), Some(second)) => {
            return Err(format!(
                "two copies of NCCL are loaded, `{}` and `{}`, which corrupt each other: take the one that is not \
                 libtorch's out of LD_PRELOAD and LD_LIBRARY_PATH",
                first.display(),
                second.display()
            ));
        }
        (Some(only), None) => return Ok(only.clone()),
        (None, _) => {}
    }
    let Some(libtorch) = &loaded.libtorch else {
        return Err("no NCCL here: libtorch's CUDA half, which brings it, is not loaded".to_owned());
    };
    // PyPI's wheels: torch/lib/libtorch_cuda.so beside nvidia/nccl/lib/libnccl.so.2.
    let beside = libtorch.ancestors().nth(3).unwrap_or(Path::new("/")).join("nvidia/nccl/lib/libnccl.so.2");
    if exists(&beside) {
        Ok(beside)
    } else {
        Err(format!(
            "no NCCL here: `{}` came without it and `{}` does not exist; install the wheel nvidia-nccl-cu13 there",
            libtorch.display(),
            beside.display()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TORCH: &str = "7f00-7f01 r-xp 00000000 08:01 11 /opt/py/torch/lib/libtorch_cuda.so\n7f02-7f03 r--p 0 08:01 11 /opt/py/torch/lib/libtorch_cuda.so\n";
    const WHEEL: &str = "7f04-7f05 r-xp 00000000 08:01 12 /opt/py/nvidia/nccl/lib/libnccl.so.2\n7f06-7f07 rw-p 0 08:01 12 /opt/py/nvidia/nccl/lib/libnccl.so.2\n";
    const SYSTEM: &str = "7f08-7f09 r-xp 00000000 08:01 13 /usr/lib/x86_64-linux-gnu/libnccl.so.2.28.9\n";
    const OTHER: &str =
        "7f10-7f11 rw-p 0 00:00 0 [heap]\n7f12-7f13 r-xp 0 08:01 14 /usr/lib/libnccl-net.so\n";

    fn picked(maps: &[&str], exists: bool) -> Result<PathBuf, String> {
        pick(&Loaded::read(&maps.concat()), |_| exists)
    }

    #[test]
    fn the_loaded_copy_is_taken_whatever_else_there_is() {
        let wheel = Ok(PathBuf::from("/opt/py/nvidia/nccl/lib/libnccl.so.2"));
        assert_eq!(picked(&[OTHER, TORCH, WHEEL], true), wheel);
        assert_eq!(picked(&[WHEEL], false), wheel);
        assert_eq!(picked(&[TORCH, OTHER], true), wheel, "the copy beside libtorch");
    }

    #[test]
    fn a_second_copy_is_refused_with_both_names() {
        let refusal = picked(&[TORCH, WHEEL, SYSTEM], true).unwrap_err();
        assert!(refusal.contains("`/opt/py/nvidia/nccl/lib/libnccl.so.2`"), "{refusal}");
        assert!(refusal.contains("`/usr/lib/x86_64-linux-gnu/libnccl.so.2.28.9`"), "{refusal}");
        assert_eq!(refusal.lines().count(), 1);
    }

    #[test]
    fn a_missing_library_is_named() {
        assert!(picked(&[OTHER], true).unwrap_err().contains("libtorch's CUDA half"));
        let refusal = picked(&[TORCH], false).unwrap_err();
        assert!(refusal.contains("`/opt/py/nvidia/nccl/lib/libnccl.so.2` does not exist"), "{refusal}");
    }

    #[test]
    fn a_file_that_is_not_nccl_is_refused_in_one_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let Err(refusal) = Library::load(file.path()) else { panic!("an empty file was loaded") };
        assert!(refusal.to_string().contains("cannot be used"), "{refusal}");
        assert_eq!(refusal.to_string().lines().count(), 1);
    }
}
