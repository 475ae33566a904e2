//! CUDA is optional: its absence is a reason to print, not a crash.

use lockstep_nn::shim::{SideStream, copy_async, load_cuda, pinned};
use tch::{Device, Kind, Tensor};

#[test]
fn cuda_loads_or_the_loader_says_which_library_is_missing() {
    match load_cuda() {
        Ok(()) => assert!(load_cuda().is_ok(), "loading twice is harmless"),
        Err(e) => assert!(e.to_string().contains(".so"), "{e}"),
    }
}

#[test]
fn streams_and_pinned_memory_work_or_say_why_not() {
    let from = Tensor::from_slice(&[1.0f32, 2.0, 3.0]);
    let mut to = Tensor::zeros([3], (Kind::Float, Device::Cpu));
    copy_async(&mut to, &from).unwrap();
    assert_eq!(to, from, "on a CPU a copy is done at once");
    assert!(copy_async(&mut Tensor::zeros([2], (Kind::Float, Device::Cpu)), &from).is_err());
    if load_cuda().is_err() || tch::Cuda::device_count() < 1 {
        eprintln!("skipped: no GPU here");
        assert!(SideStream::new(0).is_err() && pinned(&from, 3).is_err());
        return;
    }
    let device = Device::Cuda(0);
    let mut gpu = Tensor::zeros([3], (Kind::Float, device));
    let side = SideStream::new(0).unwrap();
    assert!(!side.handle().is_null());
    let sum = side.run(|| {
        copy_async(&mut gpu, &from)?;
        Ok((&gpu + &gpu).to_device(Device::Cpu))
    });
    assert_eq!(sum.unwrap(), Tensor::from_slice(&[2.0f32, 4.0, 6.0]));
    let mut host = pinned(&gpu, 3).unwrap();
    copy_async(&mut host, &gpu).unwrap();
    tch::Cuda::synchronize(0);
    assert_eq!(host, from);
}
