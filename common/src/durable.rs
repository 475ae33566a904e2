//! Files that are whole or absent, whenever the process dies.
//!
//! Everything is written under a temporary name beside its destination, flushed to the disk, renamed, and the
//! folder flushed too. A reader therefore never sees half a file. What a killed process leaves behind is
//! removed by [`sweep_temporary`]: a live writer holds a lock on its temporary file or folder, and the kernel
//! lets go of that lock when the process ends, however it ends.

use std::fs::{File, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Begins the name of every temporary file and folder.
const TEMPORARY_PREFIX: &str = ".lockstep-tmp-";

/// A failed operation on a file or folder, with its path and, where it is known, the way out.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} `{}`: {source}{}", path.display(), advice(source))]
pub struct FileError {
    /// What was tried, as a verb: `read`, `write`.
    pub action: &'static str,
    /// The file or folder.
    pub path: PathBuf,
    /// What the system said.
    pub source: io::Error,
}

impl FileError {
    /// An error of `action` (a verb) on `path`.
    pub fn new(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self { action, path: path.into(), source }
    }

    /// For `map_err`: wraps what the system said about `action` on `path`.
    pub fn on(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::new(action, path, source)
    }

    /// Whether the file or folder does not exist.
    pub fn is_not_found(&self) -> bool {
        self.source.kind() == io::ErrorKind::NotFound
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free space there or choose a folder on another disk"
        }
        io::ErrorKind::PermissionDenied => "; give this user access to it or choose another folder",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a folder that can be written",
        _ => "",
    }
}

/// Reads a whole file.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    std::fs::read(path).map_err(FileError::on("read", path))
}

/// Creates `dir` and the folders above it that are missing.
pub fn create_dir_all(dir: &Path) -> Result<(), FileError> {
    std::fs::create_dir_all(dir).map_err(FileError::on("create folder", dir))
}

/// Writes or replaces the file at `path`: afterwards it holds `bytes`, on disk, or is what it was before.
///
/// The permissions are what the process' umask allows.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_and_rename(path, bytes, 0o666, true)
}

/// [`write_atomic`] for keys and other secrets: only the owner may read the file.
pub fn write_atomic_private(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_and_rename(path, bytes, 0o600, true)
}

/// [`write_atomic`] for a file that must not be there yet; an existing one is left alone and is an error of
/// kind [`io::ErrorKind::AlreadyExists`].
pub fn create_atomic(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    write_and_rename(path, bytes, 0o666, false)
}

fn write_and_rename(path: &Path, bytes: &[u8], mode: u32, replace: bool) -> Result<(), FileError> {
    let parent = parent(path);
    let temporary = locked_temporary(parent, |dir| {
        let file = tempfile::Builder::new()
            .prefix(TEMPORARY_PREFIX)
            .permissions(Permissions::from_mode(mode))
            .tempfile_in(dir)?;
        let lock = file.as_file().try_clone()?;
        Ok((file, lock))
    })
    .map_err(FileError::on("write", path))?
    .0;
    // Of the file itself: errors of the temporary one's own methods name that.
    let mut file = temporary.as_file();
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(FileError::on("write", path))?;
    let persisted = if replace { temporary.persist(path) } else { temporary.persist_noclobber(path) };
    persisted.map_err(|e| FileError::new("write", path, e.error))?;
    sync_dir(parent)
}

/// What the system said, without the temporary name that `tempfile` adds and nobody has asked for.
fn cause(error: io::Error) -> io::Error {
    match error.to_string().split_once(" at path ") {
        Some((said, _)) => io::Error::new(error.kind(), said),
        None => error,
    }
}

/// A folder under a temporary name, removed when dropped; for building something that is later moved in place.
#[derive(Debug)]
pub struct TemporaryDir {
    dir: tempfile::TempDir,
    _lock: File,
}

impl TemporaryDir {
    /// Makes an empty temporary folder in `parent`, which is created if missing.
    pub fn new_in(parent: &Path) -> Result<Self, FileError> {
        create_dir_all(parent)?;
        let (dir, lock) = locked_temporary(parent, |parent| {
            let dir = tempfile::Builder::new()
                .prefix(TEMPORARY_PREFIX)
                .permissions(Permissions::from_mode(0o777))
                .tempdir_in(parent)?;
            let lock = File::open(dir.path())?;
            Ok((dir, lock))
        })
        .map_err(FileError::on("create a temporary folder in", parent))?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a new file into the folder and flushes it to the disk. `name` must be a plain file name.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        let path = self.path().join(name);
        File::create_new(&path)
            .and_then(|mut file| {
                file.write_all(bytes)?;
                file.sync_all()
            })
            .map_err(FileError::on("write", &path))
    }
}

/// A folder that becomes visible with all its files or not at all.
#[derive(Debug)]
pub struct AtomicDir {
    temporary: TemporaryDir,
    destination: PathBuf,
}

impl AtomicDir {
    /// Begins a folder that will appear at `destination`.
    pub fn new(destination: &Path) -> Result<Self, FileError> {
        let temporary = TemporaryDir::new_in(parent(destination))?;
        Ok(Self { temporary, destination: destination.to_path_buf() })
    }

    /// Writes a new file into the folder and flushes it to the disk. `name` must be a plain file name.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        self.temporary.write(name, bytes)
    }

    /// Makes the folder visible; whatever was at the destination is replaced.
    ///
    /// A folder cannot be replaced in one system call: a crash between the two renames leaves neither the old
    /// nor the new one, but never a mixture.
    pub fn commit(self) -> Result<(), FileError> {
        let parent = parent(&self.destination);
        sync_dir(self.temporary.path())?;
        remove_dir(&self.destination)?;
        std::fs::rename(self.temporary.path(), &self.destination)
            .map_err(FileError::on("make visible", &self.destination))?;
        let _renamed_away = self.temporary.dir.keep();
        sync_dir(parent)
    }
}

/// Removes the folder at `path` with all it holds, so that no reader sees it half removed. A folder that does
/// not exist is not an error.
pub fn remove_dir(path: &Path) -> Result<(), FileError> {
    if !path.exists() {
        return Ok(());
    }
    let parent = parent(path);
    let grave = TemporaryDir::new_in(parent)?;
    std::fs::rename(path, grave.path().join("removed")).map_err(FileError::on("remove", path))?;
    sync_dir(parent)
}

/// Removes the temporary files and folders that dead processes left in `dir`, and says how many there were.
///
/// Those of a live process are locked and stay; so do all of them on a file system without locks. A folder
/// that does not exist has none.
pub fn sweep_temporary(dir: &Path) -> Result<usize, FileError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(FileError::new("list", dir, e)),
    };
    let mut removed = 0;
    for entry in entries {
        let entry = entry.map_err(FileError::on("list", dir))?;
        if !entry.file_name().as_encoded_bytes().starts_with(TEMPORARY_PREFIX.as_bytes()) {
            continue;
        }
        let path = entry.path();
        match File::open(&path).map(|file| file.try_lock().map(|()| file)) {
            Ok(Ok(_lock)) => {
                let result =
                    if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
                result.map_err(FileError::on("remove", &path))?;
                removed += 1;
            }
            Ok(Err(TryLockError::WouldBlock)) => {}
            Ok(Err(TryLockError::Error(e))) | Err(e) => {
                tracing::debug!(path = %path.display(), error = %e, "temporary file left in place");
            }
        }
    }
    Ok(removed)
}

/// Flushes the entries of a folder, so that renames in it survive a power cut.
pub fn sync_dir(dir: &Path) -> Result<(), FileError> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(FileError::on("flush folder", dir))
}

/// Makes something temporary in `parent` and locks it. A sweeper may remove it between the two; then again.
fn locked_temporary<T: AsRef<Path>>(
    parent: &Path,
    make: impl Fn(&Path) -> io::Result<(T, File)>,
) -> io::Result<(T, File)> {
    loop {
        let (made, lock) = make(parent).map_err(cause)?;
        match lock.lock() {
            Err(e) if e.kind() != io::ErrorKind::Unsupported => return Err(e),
            _ => {}
        }
        if made.as_ref().exists() {
            return Ok((made, lock));
        }
    }
}

/// The folder that holds `path`; `.` for a bare name.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn write_atomic_replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn an_error_names_the_file_and_no_temporary_one() {
        let dir = tempfile::tempdir().unwrap();
        let check = |error: FileError, path: &Path, cause: &str| {
            let said = format!("{error} {}", std::error::Error::source(&error).unwrap());
            assert!(said.contains(&path.display().to_string()) && said.contains(cause), "{said}");
            assert!(!said.contains(TEMPORARY_PREFIX), "{said}");
        };
        let path = dir.path().join("none/a");
        check(write_atomic(&path, b"one").unwrap_err(), &path, "No such file");
        // Nobody, not even root, makes anything there.
        let path = Path::new("/proc/self");
        check(TemporaryDir::new_in(path).unwrap_err(), path, "No such file");
    }

    #[test]
    fn private_files_are_the_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        write_atomic_private(&path, b"secret").unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn create_atomic_leaves_an_existing_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        create_atomic(&path, b"one").unwrap();
        let error = create_atomic(&path, b"two").unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn atomic_dir_is_invisible_until_commit_and_absent_when_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let destination = dir.path().join("d");
        let first = AtomicDir::new(&destination).unwrap();
        first.write("f", b"1").unwrap();
        assert!(!destination.exists());
        drop(first);
        assert_eq!(names(dir.path()), [""; 0]);

        for content in [b"1", b"2"] {
            let d = AtomicDir::new(&destination).unwrap();
            d.write("f", content).unwrap();
            d.commit().unwrap();
            assert_eq!(std::fs::read(destination.join("f")).unwrap(), content);
            assert_eq!(names(dir.path()), ["d"]);
        }
    }

    #[test]
    fn sweep_removes_what_the_dead_left_and_spares_the_living() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kept"), b"").unwrap();
        std::fs::write(dir.path().join(format!("{TEMPORARY_PREFIX}dead-file")), b"").unwrap();
        let dead = dir.path().join(format!("{TEMPORARY_PREFIX}dead-dir"));
        std::fs::create_dir(&dead).unwrap();
        std::fs::write(dead.join("part"), b"").unwrap();
        let living = AtomicDir::new(&dir.path().join("d")).unwrap();

        assert_eq!(sweep_temporary(dir.path()).unwrap(), 2);
        living.write("f", b"1").unwrap();
        living.commit().unwrap();
        assert_eq!(names(dir.path()), ["d", "kept"]);
        assert_eq!(sweep_temporary(&dir.path().join("absent")).unwrap(), 0);
    }

    #[test]
    fn errors_name_the_path_and_the_way_out() {
        let full = FileError::new("write", "/data/x", io::ErrorKind::StorageFull.into()).to_string();
        assert!(full.contains("`/data/x`") && full.contains("free space"), "{full}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("no/such/folder");
        let error = write_atomic(&path, b"").unwrap_err();
        assert!(error.is_not_found() && error.to_string().contains("no/such/folder"), "{error}");
    }
}
