//! Writing shards into a staging folder.

use crate::dataset::manifest::ShardEntry;
use crate::dataset::shard::ShardBuilder;
use crate::digest::blake3_hex;
use crate::durable::{FileError, TemporaryDir};

/// A shard is closed when it reaches this size: small enough to be fetched in a moment, large enough that a
/// dataset of 100 GB has only some ten thousands of them.
const SHARD_BYTES: usize = 4 << 20;

/// Writes shards of [`SHARD_BYTES`] into a temporary folder.
pub(in crate::dataset) struct ShardWriter {
    staging: TemporaryDir,
    builder: ShardBuilder,
    entries: Vec<ShardEntry>,
    written: u64,
}

impl ShardWriter {
    pub(in crate::dataset) fn new(staging: TemporaryDir) -> Self {
        Self { staging, builder: ShardBuilder::default(), entries: Vec::new(), written: 0 }
    }

    /// Appends a record; true if that completed a shard.
    pub(in crate::dataset) fn push(&mut self, label: u32, payload: &[u8]) -> Result<bool, FileError> {
        self.builder.push(&[label], payload);
        if self.builder.bytes() < SHARD_BYTES {
            return Ok(false);
        }
        self.flush()?;
        Ok(true)
    }

    fn flush(&mut self) -> Result<(), FileError> {
        let samples = self.builder.len() as u64;
        let bytes = self.builder.finish();
        let hash = blake3_hex(&bytes);
        // Two shards of one dataset may be the same to the byte; the file is then written once.
        if self.entries.iter().all(|e| e.hash != hash) {
            self.staging.write(&hash, &bytes)?;
        }
        let (bytes, first_sample) = (bytes.len() as u64, self.written);
        self.entries.push(ShardEntry { hash, bytes, first_sample, samples });
        self.written += samples;
        Ok(())
    }

    pub(in crate::dataset) fn finish(mut self) -> Result<(TemporaryDir, Vec<ShardEntry>), FileError> {
        if self.builder.len() > 0 {
            self.flush()?;
        }
        Ok((self.staging, self.entries))
    }
}
