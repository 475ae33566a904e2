//! The layers that the architectures are made of.

mod activation;
mod batch_norm;
mod conv;
mod conv_norm;
mod dropout;
mod linear;
mod pool;

pub use activation::{Maxout, relu};
pub use batch_norm::{BatchNorm, NormSpec};
pub use conv::{Conv2d, ConvSpec};
pub use conv_norm::{ConvNorm, Naming, Units};
pub use dropout::dropout;
pub use linear::Linear;
pub use pool::{
    avg_pool, avg_pool_around, avg_pool_to, global_avg_pool, local_response_norm, max_pool, max_pool_around,
    max_pool_ceil,
};
