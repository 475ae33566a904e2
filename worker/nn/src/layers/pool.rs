//! Pooling and local response normalization.

use crate::error::NnError;
use crate::shim::on_device;
use tch::{Device, Kind, Tensor};

/// The largest value of each `kernel` × `kernel` window that lies within the image.
pub fn max_pool(x: &Tensor, kernel: i64, stride: i64) -> Result<Tensor, NnError> {
    Ok(x.f_max_pool2d([kernel; 2], [stride; 2], [0, 0], [1, 1], false)?)
}

/// The largest value of each `kernel` × `kernel` window. Windows that reach over the edge count (ceil mode), as
/// in cuda-convnet and Caffe.
pub fn max_pool_ceil(x: &Tensor, kernel: i64, stride: i64) -> Result<Tensor, NnError> {
    Ok(x.f_max_pool2d([kernel; 2], [stride; 2], [0, 0], [1, 1], true)?)
}

/// The largest value of the 3 × 3 window around each position: the size stays.
pub fn max_pool_around(x: &Tensor) -> Result<Tensor, NnError> {
    Ok(x.f_max_pool2d([3, 3], [1, 1], [1, 1], [1, 1], false)?)
}

/// The mean of the 3 × 3 window around each position: the size stays. `count_edge` says whether the zeros beyond
/// the edge count as values.
pub fn avg_pool_around(x: &Tensor, count_edge: bool) -> Result<Tensor, NnError> {
    Ok(x.f_avg_pool2d([3, 3], [1, 1], [1, 1], false, count_edge, None)?)
}

/// The mean of each `kernel` × `kernel` window that lies within the image.
pub fn avg_pool(x: &Tensor, kernel: i64, stride: i64) -> Result<Tensor, NnError> {
    Ok(x.f_avg_pool2d([kernel; 2], [stride; 2], [0, 0], false, true, None)?)
}

/// Means over `side` × `side` windows that share the image out: [N, C, H, W] to [N, C, `side`, `side`].
pub fn avg_pool_to(x: &Tensor, side: i64) -> Result<Tensor, NnError> {
    if x.device() == Device::Cpu {
        return Ok(x.f_adaptive_avg_pool2d([side; 2])?);
    }
    // On a GPU libtorch's gradient of windows that overlap is added up in any order.
    mean_by_products(x, side)
}

/// The same as two products with matrices, in single precision at least.
fn mean_by_products(x: &Tensor, side: i64) -> Result<Tensor, NnError> {
    let [.., height, width] = x.size()[..] else {
        return Err(NnError::Torch(format!("pooling needs [N, C, H, W], got {:?}", x.size())));
    };
    let kind = if x.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
    let means = |size| -> Result<Tensor, NnError> {
        let means = on_device(&window_means(size, side), x.device())?;
        Ok(means.f_view([side, size])?.f_to_kind(kind)?)
    };
    let (rows, columns) = (means(height)?, means(width)?.f_transpose(0, 1)?);
    Ok(tch::autocast(false, || rows.f_matmul(&x.f_to_kind(kind)?.f_matmul(&columns)?))?)
}

/// A matrix [`side`, `size`] that takes `size` values to the means of `side` windows that share them out.
fn window_means(size: i64, side: i64) -> Vec<f64> {
    let window = |i: i64| (i * size / side, ((i + 1) * size + side - 1) / side);
    let mean = |i: i64, at: i64| {
        let (start, end) = window(i);
        if (start..end).contains(&at) { 1.0 / (end - start) as f64 } else { 0.0 }
    };
    (0..side).flat_map(|i| (0..size).map(move |at| mean(i, at))).collect()
}

/// The mean over all positions: [N, C, H, W] to [N, C].
pub fn global_avg_pool(x: &Tensor) -> Result<Tensor, NnError> {
    Ok(x.f_mean_dim([2i64, 3].as_slice(), false, None)?)
}

/// Local response normalization across channels (Krizhevsky et al. 2012, section 3.3), as Caffe has it:
/// x / (1 + α / `size` · Σ x²)^β, the sum over the `size` channels around each one.
pub fn local_response_norm(x: &Tensor, size: i64, alpha: f64, beta: f64) -> Result<Tensor, NnError> {
    let channels = x.size()[1];
    let before = size / 2;
    let squares = x.f_square()?.f_constant_pad_nd([0, 0, 0, 0, before, size - 1 - before])?;
    let mut sum = squares.f_narrow(1, 0, channels)?;
    for offset in 1..size {
        sum = sum.f_add(&squares.f_narrow(1, offset, channels)?)?;
    }
    let scale = sum.f_mul_scalar(alpha / size as f64)?.f_add_scalar(1.0)?;
    Ok(x.f_div(&scale.f_pow_tensor_scalar(beta)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_give_the_means_of_windows_that_share_an_image_out() {
        for (height, width, side) in [(14, 14, 4), (7, 9, 3), (4, 4, 4), (2, 3, 4), (8, 12, 4)] {
            let x = Tensor::randn([2, 3, height, width], (Kind::Double, Device::Cpu));
            let error = (mean_by_products(&x, side).unwrap() - x.adaptive_avg_pool2d([side; 2])).abs().max();
            assert!(error.double_value(&[]) < 1e-14, "{height} x {width} to {side}");
        }
    }
}
