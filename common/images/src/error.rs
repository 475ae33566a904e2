//! Why an image cannot be used.

use crate::decode::MAX_PIXELS;

/// Why an image cannot be used, as the end of a sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Neither of the known formats.
    #[error("it is neither JPEG nor PNG; it begins with {0}")]
    Format(String),
    /// More pixels than are decoded.
    #[error("it has {width} x {height} pixels, more than the {MAX_PIXELS} that are read")]
    TooLarge {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// What libjpeg-turbo says.
    #[error("damaged JPEG: {0}")]
    Jpeg(String),
    /// What the PNG decoder says.
    #[error("damaged PNG: {0}")]
    Png(String),
    /// A kind of JPEG that is not read.
    #[error("a JPEG with {0} is not read; save it as a baseline or progressive JPEG of 8 bits")]
    Unsupported(&'static str),
    /// More pixels than are made.
    #[error(
        "a resize would give it {width} x {height} pixels, more than the {MAX_PIXELS} that are made; crop it, or leave it out"
    )]
    Enlarged {
        /// Columns.
        width: usize,
        /// Rows.
        height: usize,
    },
    /// A buffer of another size than its dimensions say.
    #[error("{0}")]
    Shape(String),
}
