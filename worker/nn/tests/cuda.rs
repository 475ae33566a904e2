//! CUDA is optional: its absence is a reason to print, not a crash.

use lockstep_nn::shim::load_cuda;

#[test]
fn cuda_loads_or_the_loader_says_which_library_is_missing() {
    match load_cuda() {
        Ok(()) => assert!(load_cuda().is_ok(), "loading twice is harmless"),
        Err(e) => assert!(e.to_string().contains(".so"), "{e}"),
    }
}
