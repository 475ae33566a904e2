//! Lets the binary and the tests start without environment variables: libtorch's folders go into their rpath.

fn main() {
    let folders = std::env::var("DEP_LOCKSTEP_SHIM_RPATH").unwrap_or_default();
    for folder in folders.split(':').filter(|folder| !folder.is_empty()) {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{folder}");
    }
}
