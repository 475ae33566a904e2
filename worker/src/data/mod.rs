//! From dataset shards to tensors.

pub(crate) mod augment;
pub(crate) mod batch;
pub(crate) mod loader;
pub(crate) mod source;
