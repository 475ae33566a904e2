//! The unit that travels between two ranks: a fixed header and a payload.

use crate::tag::{Tag, TagKind};
use lockstep_common::ids::{Generation, Rank};

/// Bytes of an encoded header: magic 4, generation 8, source 4, tag 8 + 2 + 1 + 4 + 2, signature 1, stage 1,
/// offset 8, total 8, payload length 4.
pub(crate) const HEADER_LEN: usize = 55;

/// The largest payload a frame may have: one piece of a large all-reduce for each of the few nodes a rank can
/// contribute. A longer one is refused before anything is allocated.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// The most bytes that one rank may contribute to a gather or a broadcast: any model's state fits.
pub(crate) const MAX_BLOB_BYTES: u64 = 64 << 30;

const MAGIC: [u8; 4] = *b"LKSF";

/// Which half of a collective a frame belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The sender's own part.
    Contribution,
    /// A piece of the finished result.
    Result,
    /// Where in shared memory the sender's vectors are.
    Offer,
    /// The sender has done its share of the work on shared memory.
    Done,
    /// Where in shared memory the whole result is.
    Whole,
    /// The sender has copied the whole result.
    Taken,
    /// Whom does the receiver wait for?
    Ask,
    /// Whom the sender waits for.
    Waiting,
}

/// What a frame is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) generation: Generation,
    pub(crate) source: Rank,
    pub(crate) tag: Tag,
    /// Operation and element type; both sides must agree.
    pub(crate) signature: u8,
    pub(crate) stage: Stage,
    /// Where the payload belongs, in elements of an all-reduce or bytes of a blob.
    pub(crate) offset: u64,
    /// The length of the whole, in the same unit.
    pub(crate) total: u64,
    pub(crate) payload_len: usize,
}

/// Why bytes are not a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("a frame does not start with the magic number")]
    Magic,
    #[error("a frame has the unknown kind {0}")]
    Kind(u8),
    #[error("a frame has the unknown stage {0}")]
    Stage(u8),
    #[error("a frame announces a payload of {0} bytes, more than {MAX_PAYLOAD_BYTES}")]
    Payload(u32),
    #[error("a frame announces {0} bytes or elements in all, more than {MAX_BLOB_BYTES}")]
    Total(u64),
    #[error("a frame lies at {offset}, outside a whole of {total}")]
    Offset { offset: u64, total: u64 },
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; HEADER_LEN] {
        let mut out = [0; HEADER_LEN];
        let mut rest = &mut out[..];
        let mut put = |bytes: &[u8]| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(bytes.len());
            head.copy_from_slice(bytes);
            rest = tail;
        };
        put(&MAGIC);
        put(&self.generation.0.to_le_bytes());
        put(&self.source.0.to_le_bytes());
        put(&self.tag.step.to_le_bytes());
        put(&self.tag.phase.to_le_bytes());
        put(&[self.tag.kind.code()]);
        put(&self.tag.index.to_le_bytes());
        put(&self.tag.use_index.to_le_bytes());
        put(&[self.signature, self.stage as u8]);
        put(&self.offset.to_le_bytes());
        put(&self.total.to_le_bytes());
        put(&(self.payload_len as u32).to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8; HEADER_LEN]) -> Result<Self, HeaderError> {
        let mut rest = Reader(bytes);
        if rest.take::<4>() != MAGIC {
            return Err(HeaderError::Magic);
        }
        let generation = Generation(u64::from_le_bytes(rest.take()));
        let source = Rank(u32::from_le_bytes(rest.take()));
        let step = u64::from_le_bytes(rest.take());
        let phase = u16::from_le_bytes(rest.take());
        let [kind] = rest.take();
        let kind = TagKind::from_code(kind).ok_or(HeaderError::Kind(kind))?;
        let index = u32::from_le_bytes(rest.take());
        let use_index = u16::from_le_bytes(rest.take());
        let [signature, stage] = rest.take();
        let stage = match stage {
            0 => Stage::Contribution,
            1 => Stage::Result,
            2 => Stage::Offer,
            3 => Stage::Done,
            4 => Stage::Whole,
            5 => Stage::Taken,
            6 => Stage::Ask,
            7 => Stage::Waiting,
            other => return Err(HeaderError::Stage(other)),
        };
        let offset = u64::from_le_bytes(rest.take());
        let total = u64::from_le_bytes(rest.take());
        let payload_len = u32::from_le_bytes(rest.take());
        if payload_len as usize > MAX_PAYLOAD_BYTES {
            return Err(HeaderError::Payload(payload_len));
        }
        if total > MAX_BLOB_BYTES {
            return Err(HeaderError::Total(total));
        }
        if offset > total {
            return Err(HeaderError::Offset { offset, total });
        }
        let tag = Tag { step, phase, kind, index, use_index };
        Ok(Self {
            generation,
            source,
            tag,
            signature,
            stage,
            offset,
            total,
            payload_len: payload_len as usize,
        })
    }
}

/// Takes fields off the front of a header, whose length is fixed.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (head, tail) = self.0.split_at(N);
        field.copy_from_slice(head);
        self.0 = tail;
        field
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> impl Strategy<Value = Header> {
        (
            any::<(u64, u32, u64, u16)>(),
            0..12u8,
            any::<(u32, u16, u8, bool)>(),
            0..=1u64 << 35,
            0..=1u64 << 35,
        )
            .prop_map(
                |((generation, source, step, phase), kind, (index, use_index, signature, result), a, b)| {
                    Header {
                        generation: Generation(generation),
                        source: Rank(source),
                        tag: Tag { step, phase, kind: TagKind::from_code(kind).unwrap(), index, use_index },
                        signature,
                        stage: if result { Stage::Result } else { Stage::Contribution },
                        offset: a.min(b),
                        total: a.max(b),
                        payload_len: (a as usize) % (MAX_PAYLOAD_BYTES + 1),
                    }
                },
            )
    }

    proptest! {
        #[test]
        fn a_header_survives_the_wire(header in header()) {
            prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        }

        #[test]
        fn random_bytes_give_an_error_or_a_header_within_the_caps(
            mut bytes in prop::collection::vec(any::<u8>(), HEADER_LEN), valid_magic in any::<bool>(),
        ) {
            if valid_magic {
                bytes[..4].copy_from_slice(&MAGIC);
            }
            let bytes: [u8; HEADER_LEN] = bytes.try_into().unwrap();
            match Header::decode(&bytes) {
                Ok(header) => {
                    prop_assert!(header.payload_len <= MAX_PAYLOAD_BYTES && header.total <= MAX_BLOB_BYTES);
                    prop_assert_eq!(header.encode(), bytes);
                }
                Err(error) => prop_assert!(valid_magic || error == HeaderError::Magic),
            }
        }
    }
}
