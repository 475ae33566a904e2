//! Pooling.

use crate::error::NnError;
use tch::Tensor;

/// The largest value of each `kernel` × `kernel` window. Windows that reach over the edge count (ceil mode), as
/// in cuda-convnet and Caffe.
pub fn max_pool_ceil(x: &Tensor, kernel: i64, stride: i64) -> Result<Tensor, NnError> {
    Ok(x.f_max_pool2d([kernel; 2], [stride; 2], [0, 0], [1, 1], true)?)
}

/// The mean over all positions: [N, C, H, W] to [N, C].
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor, NnError> {
    Ok(x.f_mean_dim([2i64, 3].as_slice(), false, None)?)
}
