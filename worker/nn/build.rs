//! Builds the C++ shim against the libtorch that `LIBTORCH` names.
//!
//! Dependents read `DEP_LOCKSTEP_SHIM_RPATH`, the folders (separated by `:`) that a binary needs in its rpath
//! to start without any environment variable.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    for name in ["LIBTORCH", "LIBTORCH_INCLUDE", "LIBTORCH_LIB"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=shim");
    match Libtorch::locate() {
        Ok(libtorch) => libtorch.build(),
        Err(message) => {
            println!("cargo::error={message}");
        }
    }
}

struct Libtorch {
    include: PathBuf,
    lib: PathBuf,
    root: PathBuf,
}

impl Libtorch {
    fn locate() -> Result<Self, String> {
        let root = PathBuf::from(env::var_os("LIBTORCH").unwrap_or_default());
        let folder = |name| env::var_os(name).map_or_else(|| root.clone(), PathBuf::from);
        let found = Self {
            include: folder("LIBTORCH_INCLUDE").join("include"),
            lib: folder("LIBTORCH_LIB").join("lib"),
            root: root.clone(),
        };
        if found.include.join("torch/csrc/api/include/torch/torch.h").exists() && found.lib.exists() {
            Ok(found)
        } else {
            Err(format!("libtorch not found at `{}`; run `make libtorch` or set LIBTORCH", root.display()))
        }
    }

    fn build(&self) {
        self.compiler()
            .files([
                "shim/autocast.cpp",
                "shim/hooks.cpp",
                "shim/batch_norm.cpp",
                "shim/cuda.cpp",
                "shim/device_norm.cpp",
                "shim/layout.cpp",
                "shim/many.cpp",
                "shim/merge.cpp",
                "shim/streams.cpp",
            ])
            .compile("lockstep_shim");
        // After the shim, which calls them: a linker takes static libraries in one pass. The instruction sets
        // compute the same bits; the program chooses among them when it starts.
        kernels("generic", &[]);
        if env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64") {
            kernels("avx2", &["-mavx2"]);
            kernels("avx512", &["-mavx512f"]);
        }

        let folders = self.rpath();
        for folder in &folders {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
        }
        println!("cargo:rpath={}", folders.join(":"));
    }

    fn compiler(&self) -> cc::Build {
        let mut build = base();
        build
            .flag("-isystem")
            .flag(self.include.as_os_str())
            .flag("-isystem")
            .flag(self.include.join("torch/csrc/api/include").as_os_str())
            .define("_GLIBCXX_USE_CXX11_ABI", "1");
        build
    }

    /// libtorch's own folder and, for PyPI's wheels, the one of the CUDA runtime that libtorch links to.
    fn rpath(&self) -> Vec<String> {
        let wheel = self.root.parent().unwrap_or(Path::new("")).join("nvidia/cu13/lib");
        [self.lib.clone(), wheel]
            .iter()
            .filter(|folder| folder.exists())
            .map(|folder| folder.display().to_string())
            .collect()
    }
}

/// No contraction: a fused multiply-add would make the bits depend on the instruction set.
fn base() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").opt_level(3).flag("-ffp-contract=off").warnings(true);
    build
}

fn kernels(isa: &str, flags: &[&str]) {
    let mut build = base();
    // The wide vector types never cross a call, so the calling convention that GCC notes does not matter.
    build.files(["shim/kernels.cpp", "shim/rows.cpp"]).define("LOCKSTEP_ISA", isa).flag("-Wno-psabi");
    for flag in flags {
        build.flag(flag);
    }
    build.compile(&format!("lockstep_kernels_{isa}"));
}
