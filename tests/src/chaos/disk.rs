//! A small disk of its own for the checkpoints, so that it can be filled.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Room for a few checkpoints of the demo's networks.
const MIB: u32 = 512;

/// A file system in memory; dropping it unmounts it.
pub struct SmallDisk {
    root: PathBuf,
}

impl SmallDisk {
    /// Mounts one at `root`. `None` where that is not allowed.
    pub fn mount(root: &Path) -> Option<Self> {
        fs::create_dir_all(root).expect("the folder for a disk");
        let options = format!("size={MIB}m");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "chaos"]).arg(root);
        let mounted = mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        mounted.then(|| Self { root: root.to_owned() })
    }

    /// A folder on it, which is made if it is missing.
    pub fn folder(&self, name: &str) -> PathBuf {
        let folder = self.root.join(name);
        fs::create_dir_all(&folder).expect("a folder on the small disk");
        folder
    }

    /// Leaves no free byte.
    pub fn fill(&self) {
        let mut file = File::create(self.ballast()).expect("a file on the small disk");
        let block = [0xa5; 64 << 10];
        loop {
            match file.write(&block) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::StorageFull => return,
                Err(e) => panic!("the small disk: {e}"),
            }
        }
    }

    /// Undoes [`Self::fill`].
    pub fn free(&self) {
        fs::remove_file(self.ballast()).expect("the ballast is there");
    }

    fn ballast(&self) -> PathBuf {
        self.root.join("ballast")
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: programs that are being killed may still have files open.
        let _ = Command::new("umount").arg("--lazy").arg(&self.root).status();
    }
}
