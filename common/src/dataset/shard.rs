//! The shard file: records with random access by index.
//!
//! All numbers are little-endian.
//! ```text
//! magic    8 bytes  "LKSTSHRD"
//! version  u32      1
//! count    u32      records in this shard
//! offsets  u64 × (count + 1)   of each record's start, and of the end, from the start of the file
//! records  u32 n, then n × u32 labels, then the payload up to the next offset
//! ```

use crate::digest::blake3_prefix;
use std::ops::Range;

const MAGIC: &[u8; 8] = b"LKSTSHRD";
const VERSION: u32 = 1;
/// Magic, version and count.
const HEADER_BYTES: usize = 8 + 4 + 4;
/// One offset.
const OFFSET_BYTES: usize = 8;

/// What makes bytes not a shard.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShardProblem {
    /// The first bytes are not a shard's.
    #[error("it does not begin as a shard does")]
    Magic,
    /// Another release wrote it.
    #[error("it has shard format {0} and this release reads format {VERSION}")]
    Version(u32),
    /// The table or a record reaches past the end, or runs backwards.
    #[error("its table of records is damaged")]
    Table,
    /// Record `0` is too short for its labels.
    #[error("its record {0} is damaged")]
    Record(usize),
}

/// Collects records into one shard.
#[derive(Debug, Default)]
pub(super) struct ShardBuilder {
    ends: Vec<u64>,
    records: Vec<u8>,
}

impl ShardBuilder {
    /// Appends a record.
    pub(super) fn push(&mut self, labels: &[u32], payload: &[u8]) {
        self.records.extend_from_slice(&(labels.len() as u32).to_le_bytes());
        for label in labels {
            self.records.extend_from_slice(&label.to_le_bytes());
        }
        self.records.extend_from_slice(payload);
        self.ends.push(self.records.len() as u64);
    }

    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes that the shard will have.
    pub(super) fn bytes(&self) -> usize {
        HEADER_BYTES + (self.ends.len() + 1) * OFFSET_BYTES + self.records.len()
    }

    /// The shard's bytes; the builder is empty afterwards.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.bytes());
        let first = (HEADER_BYTES + (self.ends.len() + 1) * OFFSET_BYTES) as u64;
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.ends.len() as u32).to_le_bytes());
        for offset in std::iter::once(0).chain(self.ends.drain(..)) {
            out.extend_from_slice(&(first + offset).to_le_bytes());
        }
        out.append(&mut self.records);
        out
    }
}

/// A shard in memory whose table and records have been checked.
#[derive(Debug)]
pub struct ShardFile {
    bytes: Vec<u8>,
    count: usize,
}

/// One record of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The labels: one for classification.
    pub labels: Vec<u32>,
    /// Where the payload lies in [`ShardFile::bytes`].
    pub payload: Range<usize>,
}

impl ShardFile {
    /// Takes a shard's bytes after checking that every record lies within them.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, ShardProblem> {
        if bytes.len() < HEADER_BYTES || &bytes[..8] != MAGIC {
            return Err(ShardProblem::Magic);
        }
        let version = u32_at(&bytes, 8).ok_or(ShardProblem::Magic)?;
        if version != VERSION {
            return Err(ShardProblem::Version(version));
        }
        let count = u32_at(&bytes, 12).ok_or(ShardProblem::Table)? as usize;
        let shard = Self { bytes, count };
        let mut end = HEADER_BYTES + (count + 1) * OFFSET_BYTES;
        for index in 0..count {
            let range = shard.range(index).ok_or(ShardProblem::Table)?;
            if range.start != end {
                return Err(ShardProblem::Table);
            }
            shard.parse_record(range.clone()).ok_or(ShardProblem::Record(index))?;
            end = range.end;
        }
        if end != shard.bytes.len() {
            return Err(ShardProblem::Table);
        }
        Ok(shard)
    }

    /// How many records there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are no records.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Record `index`, or `None` past the end.
    pub fn record(&self, index: usize) -> Option<Record> {
        if index >= self.count {
            return None;
        }
        self.parse_record(self.range(index)?)
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What it takes to read single records from the shard's file.
    pub(super) fn table(&self) -> RecordTable {
        let ranges = (0..self.count).filter_map(|index| self.range(index));
        RecordTable {
            entries: ranges
                .map(|range| RecordEntry {
                    start: range.start as u64,
                    bytes: range.len() as u64,
                    hash: blake3_prefix(&self.bytes[range]),
                })
                .collect(),
        }
    }

    /// The bytes of record `index`, checked to lie within the file.
    fn range(&self, index: usize) -> Option<Range<usize>> {
        let at = HEADER_BYTES + index * OFFSET_BYTES;
        let start = usize::try_from(u64_at(&self.bytes, at)?).ok()?;
        let end = usize::try_from(u64_at(&self.bytes, at + OFFSET_BYTES)?).ok()?;
        (start <= end && end <= self.bytes.len()).then_some(start..end)
    }

    fn parse_record(&self, range: Range<usize>) -> Option<Record> {
        let Record { labels, payload } = parse_record(&self.bytes[range.clone()])?;
        Some(Record { labels, payload: range.start + payload.start..range.start + payload.end })
    }
}

/// Where the records of a shard lie whose hash was right, and a hash of each: one read from the file later must be what it was.
#[derive(Debug)]
pub(super) struct RecordTable {
    entries: Vec<RecordEntry>,
}

#[derive(Debug)]
struct RecordEntry {
    start: u64,
    bytes: u64,
    /// The first 8 bytes of its BLAKE3: enough to find what a disk does to it.
    hash: u64,
}

impl RecordTable {
    /// How many records there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Where record `index` begins in the file, and how many bytes it has; `None` past the end.
    pub(super) fn place(&self, index: usize) -> Option<(u64, usize)> {
        self.entries.get(index).map(|entry| (entry.start, entry.bytes as usize))
    }

    /// Record `index` from the bytes at its place, its payload a range of them; `None` if they are not what they were.
    pub(super) fn parse(&self, index: usize, bytes: &[u8]) -> Option<Record> {
        let entry = self.entries.get(index)?;
        (blake3_prefix(bytes) == entry.hash).then(|| parse_record(bytes))?
    }
}

/// A record's labels, and the range of its payload within it.
fn parse_record(record: &[u8]) -> Option<Record> {
    let labels_end = 4usize.checked_add((u32_at(record, 0)? as usize).checked_mul(4)?)?;
    let labels = record
        .get(4..labels_end)?
        .chunks_exact(4)
        .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    Some(Record { labels, payload: labels_end..record.len() })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn built(records: &[(Vec<u32>, Vec<u8>)]) -> Vec<u8> {
        let mut builder = ShardBuilder::default();
        for (labels, payload) in records {
            builder.push(labels, payload);
        }
        let announced = builder.bytes();
        let bytes = builder.finish();
        assert_eq!(bytes.len(), announced);
        bytes
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(
            records: Vec<(Vec<u32>, Vec<u8>)>,
        ) {
            let shard = ShardFile::parse(built(&records)).unwrap();
            prop_assert_eq!(shard.len(), records.len());
            for (i, (labels, payload)) in records.iter().enumerate() {
                let record = shard.record(i).unwrap();
                prop_assert_eq!(&record.labels, labels);
                prop_assert_eq!(&shard.bytes()[record.payload], &payload[..]);
            }
            prop_assert_eq!(shard.record(records.len()), None);
            let table = shard.table();
            prop_assert_eq!((table.len(), table.place(records.len())), (records.len(), None));
            for (i, (labels, payload)) in records.iter().enumerate() {
                let (start, length) = table.place(i).unwrap();
                let mut bytes = shard.bytes()[start as usize..][..length].to_vec();
                let record = table.parse(i, &bytes).unwrap();
                prop_assert_eq!((&record.labels, &bytes[record.payload]), (labels, &payload[..]));
                bytes[length / 2] ^= 1;
                prop_assert_eq!(table.parse(i, &bytes), None);
            }
        }

        #[test]
        fn damaged_bytes_never_panic(records: Vec<(Vec<u32>, Vec<u8>)>, at: prop::sample::Index, value: u8) {
            let mut bytes = built(&records);
            let at = at.index(bytes.len());
            bytes[at] = value;
            if let Ok(shard) = ShardFile::parse(bytes) {
                for i in 0..shard.len() {
                    let record = shard.record(i).unwrap();
                    let _ = &shard.bytes()[record.payload];
                }
            }
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = built(&[(vec![1], vec![1, 2, 3]), (vec![2, 3], vec![])]);
        for length in 0..bytes.len() {
            assert!(ShardFile::parse(bytes[..length].to_vec()).is_err(), "{length} bytes");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert_eq!(ShardFile::parse(longer).unwrap_err(), ShardProblem::Table);
        let mut newer = bytes;
        newer[8] = 9;
        assert_eq!(ShardFile::parse(newer).unwrap_err(), ShardProblem::Version(9));
    }
}
