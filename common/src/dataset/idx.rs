//! The IDX format of the MNIST family: a big-endian header, then the elements, plain or in gzip.
//!
//! Header: two zero bytes, the element type, the number of dimensions, then each dimension as a u32
//! (Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database").

use super::DatasetError;
use crate::durable::FileError;
use flate2::read::MultiGzDecoder;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

const TYPE_U8: u8 = 0x08;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// No image of the formats read here is near this; a damaged header must not make us allocate more.
const MAX_RECORD_BYTES: u64 = 64 << 20;

/// What makes a file not the IDX file that was expected.
#[derive(Debug, thiserror::Error)]
pub enum IdxProblem {
    /// The first two bytes are not zero.
    #[error("it does not begin as an IDX file does (two zero bytes); download or unpack it again")]
    Magic,
    /// The elements are not unsigned bytes.
    #[error(
        "its elements have IDX type {found:#04x} and only unsigned bytes ({TYPE_U8:#04x}) can be imported"
    )]
    ElementType {
        /// The type's code in the file.
        found: u8,
    },
    /// Another number of dimensions than such a file has.
    #[error("it has {found} dimensions where {expected} belong; images need 3, labels 1")]
    Dimensions {
        /// How many the file has.
        found: u8,
        /// How many it should have.
        expected: u8,
    },
    /// A dimension is 0, or a record is too large to be an image.
    #[error("its dimensions {0:?} are empty or too large")]
    Size(Vec<u32>),
    /// The file ends too early.
    #[error("it is truncated: it ends in record {record} of {records}; download or copy it again")]
    Truncated {
        /// The record in which it ends, from 0.
        record: u32,
        /// How many records its header promises.
        records: u32,
    },
    /// The header itself is incomplete.
    #[error("it is truncated: its header is incomplete; download or copy it again")]
    TruncatedHeader,
    /// There is more than the header promises.
    #[error("it goes on after its {records} records; it is damaged or not the file its header describes")]
    TrailingBytes {
        /// How many records its header promises.
        records: u32,
    },
    /// Images and labels do not match.
    #[error("it has {labels} labels and `{}` has {images} images; they must be of the same set", images_path.display())]
    CountMismatch {
        /// How many labels there are.
        labels: u32,
        /// How many images there are.
        images: u32,
        /// The file of the images.
        images_path: PathBuf,
    },
    /// The decompressor gave up.
    #[error("its gzip data is damaged ({0}); download or copy it again")]
    Gzip(io::Error),
}

/// Reads an IDX file of unsigned bytes record by record.
pub(super) struct IdxReader {
    path: PathBuf,
    reader: Box<dyn Read>,
    dimensions: Vec<u32>,
    next_record: u32,
}

impl IdxReader {
    /// Opens `path`, which must have `dimensions` dimensions, the records' count among them.
    pub(super) fn open(path: &Path, dimensions: u8) -> Result<Self, DatasetError> {
        let mut file = BufReader::new(File::open(path).map_err(FileError::on("read", path))?);
        let is_gzip = file.fill_buf().map_err(FileError::on("read", path))?.starts_with(&GZIP_MAGIC);
        let reader: Box<dyn Read> =
            if is_gzip { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(file) };
        let mut idx = Self { path: path.to_path_buf(), reader, dimensions: Vec::new(), next_record: 0 };

        let mut magic = [0; 4];
        idx.read(&mut magic, IdxProblem::TruncatedHeader)?;
        let [zero, zero_too, element_type, found] = magic;
        if (zero, zero_too) != (0, 0) {
            return Err(idx.error(IdxProblem::Magic));
        }
        if element_type != TYPE_U8 {
            return Err(idx.error(IdxProblem::ElementType { found: element_type }));
        }
        if found != dimensions {
            return Err(idx.error(IdxProblem::Dimensions { found, expected: dimensions }));
        }
        for _ in 0..dimensions {
            let mut size = [0; 4];
            idx.read(&mut size, IdxProblem::TruncatedHeader)?;
            idx.dimensions.push(u32::from_be_bytes(size));
        }
        let record_bytes = idx.sizes().iter().try_fold(1u64, |n, &d| n.checked_mul(u64::from(d)));
        if idx.records() == 0 || !record_bytes.is_some_and(|n| (1..=MAX_RECORD_BYTES).contains(&n)) {
            return Err(idx.error(IdxProblem::Size(idx.dimensions.clone())));
        }
        Ok(idx)
    }

    /// How many records the header promises.
    pub(super) fn records(&self) -> u32 {
        self.dimensions[0]
    }

    /// The dimensions of one record.
    pub(super) fn sizes(&self) -> &[u32] {
        &self.dimensions[1..]
    }

    /// The bytes of one record.
    pub(super) fn record_bytes(&self) -> usize {
        self.sizes().iter().map(|&d| d as usize).product()
    }

    /// Reads the next record into `record`, which must have [`IdxReader::record_bytes`] bytes.
    pub(super) fn next(&mut self, record: &mut [u8]) -> Result<(), DatasetError> {
        let truncated = IdxProblem::Truncated { record: self.next_record, records: self.records() };
        self.read(record, truncated)?;
        self.next_record += 1;
        Ok(())
    }

    /// Checks that the file ends here. For gzip this is also where the checksum is checked.
    pub(super) fn finish(mut self) -> Result<(), DatasetError> {
        let records = self.records();
        let mut byte = [0];
        match self.reader.read(&mut byte) {
            Ok(0) => Ok(()),
            Ok(_) => Err(self.error(IdxProblem::TrailingBytes { records })),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                Err(self.error(IdxProblem::Truncated { record: records.saturating_sub(1), records }))
            }
            Err(e) => Err(self.read_error(e)),
        }
    }

    /// This file's error.
    pub(super) fn error(&self, problem: IdxProblem) -> DatasetError {
        DatasetError::Idx { path: self.path.clone(), problem }
    }

    fn read(&mut self, buffer: &mut [u8], truncated: IdxProblem) -> Result<(), DatasetError> {
        self.reader.read_exact(buffer).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => self.error(truncated),
            _ => self.read_error(e),
        })
    }

    /// flate2 reports damage as invalid input or data; all else is the system's.
    fn read_error(&self, error: io::Error) -> DatasetError {
        match error.kind() {
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => self.error(IdxProblem::Gzip(error)),
            _ => FileError::new("read", &self.path, error).into(),
        }
    }
}
