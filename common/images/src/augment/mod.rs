//! What is done to single pictures.

pub(crate) mod color;
pub(crate) mod crop;
pub(crate) mod flip;
