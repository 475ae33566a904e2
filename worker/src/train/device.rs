//! The CPU or a GPU.

use crate::cli::DeviceArg;
use anyhow::{Result, bail};
use tch::Device;

/// Brings libtorch's CUDA half into the process and checks that the GPU is there.
pub(crate) fn enable_cuda(index: usize) -> Result<()> {
    if let Err(error) = lockstep_nn::shim::load_cuda() {
        bail!(
            "no CUDA here: {error}; compute on `cpu`, or with a LIBTORCH that has CUDA and an NVIDIA driver"
        );
    }
    let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
    if index >= count {
        bail!("there is no `cuda:{index}`: this machine has {count} CUDA devices");
    }
    Ok(())
}

/// The device as libtorch names it.
pub(crate) fn device(arg: DeviceArg) -> Device {
    match arg {
        DeviceArg::Cpu => Device::Cpu,
        DeviceArg::Cuda(index) => Device::Cuda(index),
    }
}
