//! From dataset shards to tensors.

pub(crate) mod batch;
pub(crate) mod loader;
pub(crate) mod pool;
pub(crate) mod preparation;
pub(crate) mod source;
pub(crate) mod whitening;
