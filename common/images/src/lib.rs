//! Images: decoding, resizing and augmentation, to the same bits on every machine.
//!
//! A run's result depends on its job file only, so a pixel must not depend on who decodes it. Decoding, resizing and
//! colour conversion are integer arithmetic that the libraries do alike with any instruction set; what is
//! floating-point here is written out operation by operation, with `libm` for functions; random numbers are the
//! caller's [`Stream`](lockstep_common::rng::Stream).
//!
//! Nothing here knows files, datasets' shards or tensors.

mod augment;
mod crops;
mod decode;
mod error;
mod inspect;
mod orientation;
mod picture;
mod pipeline;
mod resize;

pub use augment::crop::random_resized_crop;
pub use crops::CropPlan;
pub use decode::{Decoded, Decoder, Encoded, MAX_PIXELS};
pub use error::ImageError;
pub use inspect::Inspector;
pub use picture::{Picture, Region};
pub use pipeline::{Pipeline, Source, Workbench};
pub use resize::Resizer;
