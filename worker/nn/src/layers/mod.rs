//! The layers that the architectures are made of.

mod activation;
mod batch_norm;
mod conv;
mod dropout;
mod linear;
mod pool;

pub use activation::{Maxout, relu};
pub use batch_norm::BatchNorm;
pub use conv::{Conv2d, ConvSpec};
pub use dropout::dropout;
pub use linear::Linear;
pub use pool::{global_avg_pool, max_pool_ceil};
