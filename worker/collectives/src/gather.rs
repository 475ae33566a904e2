//! Everyone sends its bytes to everyone, or to one rank, at once: half a round trip, for small payloads and plain bytes.

use crate::buffer::Buffer;
use crate::engine::{Collective, Engine, Part, Publish};
use crate::error::CollectiveError;
use crate::frame::{Header, Stage};
use crate::tag::Tag;
use crate::transport::Lane;
use bytes::Bytes;
use lockstep_common::ids::Rank;
use parking_lot::Mutex;

/// The size of a frame's payload. Large enough that headers and wake-ups cost nothing, small enough for the
/// receiver to begin early.
const PIECE_BYTES: usize = 256 << 10;

/// The largest blob that travels on the small lane.
pub(crate) const SMALL_BYTES: usize = 64 << 10;

/// What is done with everybody's blobs, by rank.
pub(crate) type Finish = Box<dyn FnOnce(Vec<Bytes>) + Send>;
/// How the waiters learn of a failure.
pub(crate) type Fail = Box<dyn Fn(&CollectiveError) + Send + Sync>;

/// Which ranks contribute a blob, and how long it has to be where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    Nothing,
    Any,
    Bytes(u64),
}

/// A gather in flight.
pub(crate) struct Gather {
    tag: Tag,
    signature: u8,
    mine: Option<Bytes>,
    /// The only rank to which it goes, if not to all.
    root: Option<Rank>,
    expect: Vec<Expect>,
    fail: Fail,
    state: Mutex<State>,
}

struct State {
    blobs: Vec<Blob>,
    missing: usize,
    finish: Option<Finish>,
}

#[derive(Default)]
struct Blob {
    /// Each as long as it has to be, so that there are no more than a blob of that length has.
    pieces: Vec<Piece>,
    received: u64,
    whole: Option<Bytes>,
}

struct Piece {
    offset: u64,
    /// The length of the whole blob.
    total: u64,
    bytes: Buffer,
}

impl Gather {
    /// `mine` is what this rank contributes, if anything; `expect` says what each rank does.
    pub(crate) fn new(
        tag: Tag,
        signature: u8,
        rank: Rank,
        mine: Option<Bytes>,
        expect: Vec<Expect>,
        finish: Finish,
        fail: Fail,
    ) -> Self {
        let mut blobs: Vec<_> = expect.iter().map(|_| Blob::default()).collect();
        for (blob, expect) in blobs.iter_mut().zip(&expect) {
            if *expect == Expect::Nothing {
                blob.whole = Some(Bytes::new());
            }
        }
        if let Some(mine) = &mine {
            blobs[rank.index()].whole = Some(mine.clone());
        }
        let missing = blobs.iter().filter(|blob| blob.whole.is_none()).count();
        let state = Mutex::new(State { blobs, missing, finish: Some(finish) });
        Self { tag, signature, mine, root: None, expect, fail, state }
    }

    /// The same, with this rank's bytes for `root` alone.
    pub(crate) fn only_to(self, root: Rank) -> Self {
        Self { root: Some(root), ..self }
    }

    fn check(&self, header: &Header) -> Result<(), CollectiveError> {
        let rank = header.source;
        if header.signature != self.signature {
            let detail = "it runs another operation or element type under this tag".to_owned();
            return Err(CollectiveError::Mismatch { rank, tag: self.tag, detail });
        }
        match self.expect[rank.index()] {
            Expect::Bytes(expected) if expected != header.total => {
                let detail = format!("its part has {} bytes, expected {expected}", header.total);
                Err(CollectiveError::Mismatch { rank, tag: self.tag, detail })
            }
            Expect::Any if header.total > self.tag.kind.most_blob_bytes() => {
                let most = self.tag.kind.most_blob_bytes();
                let detail = format!("{} bytes, more than {most}, in {}", header.total, self.tag);
                Err(CollectiveError::Protocol { rank, detail })
            }
            Expect::Nothing => {
                let detail = "it contributes to a collective that wants nothing from it".to_owned();
                Err(CollectiveError::Mismatch { rank, tag: self.tag, detail })
            }
            _ if header.stage != Stage::Contribution => {
                Err(CollectiveError::Protocol { rank, detail: format!("a result piece in {}", self.tag) })
            }
            _ => Ok(()),
        }
    }

    /// What is left to do, once, when every blob is there.
    fn complete(state: &mut State) -> Option<Publish> {
        if state.missing > 0 {
            return None;
        }
        let finish = state.finish.take()?;
        let blobs = state.blobs.iter_mut().filter_map(|blob| blob.whole.take()).collect();
        Some(Box::new(move || finish(blobs)))
    }
}

impl Collective for Gather {
    fn launch(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError> {
        if let Some(mine) = &self.mine {
            let lane = if mine.len() <= SMALL_BYTES { Lane::Small } else { Lane::Bulk };
            let total = mine.len() as u64;
            for start in (0..mine.len().max(1)).step_by(PIECE_BYTES) {
                let piece = mine.slice(start..mine.len().min(start + PIECE_BYTES));
                let part = Part {
                    tag: self.tag,
                    signature: self.signature,
                    stage: Stage::Contribution,
                    offset: start as u64,
                    total,
                };
                for to in engine.others().filter(|to| self.root.is_none_or(|root| root == *to)) {
                    engine.send(to, lane, part, vec![piece.clone()]);
                }
            }
        }
        Ok(Self::complete(&mut self.state.lock()))
    }

    fn handle_frame(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        self.check(header)?;
        let broken = |detail: &str| CollectiveError::Protocol {
            rank: header.source,
            detail: format!("{detail} in {}", self.tag),
        };
        let mut state = self.state.lock();
        let finished = state.missing == 0;
        let blob = &mut state.blobs[header.source.index()];
        if finished || blob.whole.is_some() {
            return Err(broken("a part that was complete already"));
        }
        if payload.len() == 0 && header.total > 0 {
            return Err(broken("an empty piece"));
        }
        let piece = (header.total - header.offset).min(PIECE_BYTES as u64);
        let fits = header.offset.is_multiple_of(PIECE_BYTES as u64) && payload.len() as u64 == piece;
        if !fits || blob.pieces.first().is_some_and(|first| first.total != header.total) {
            return Err(broken("pieces that do not fit"));
        }
        blob.received += piece;
        blob.pieces.push(Piece { offset: header.offset, total: header.total, bytes: payload });
        if blob.received < header.total {
            return Ok(None);
        }
        let whole = blob.join(engine, header.total).ok_or_else(|| broken("pieces that do not fit"))?;
        blob.whole = Some(whole);
        state.missing -= 1;
        Ok(Self::complete(&mut state))
    }

    fn fail(&self, error: &CollectiveError) {
        (self.fail)(error);
    }

    fn describe(&self) -> (u8, u64) {
        (self.signature, self.mine.as_ref().map_or(0, |mine| mine.len() as u64))
    }

    fn missing(&self) -> Vec<(Rank, bool)> {
        let state = self.state.lock();
        if state.missing == 0 {
            return vec![];
        }
        let missing = state.blobs.iter().enumerate().filter(|(_, blob)| blob.whole.is_none());
        missing.map(|(rank, blob)| (Rank(rank as u32), !blob.pieces.is_empty())).collect()
    }
}

impl Blob {
    /// The pieces in order, or nothing if they overlap, leave a gap or miss `total`.
    fn join(&mut self, engine: &Engine, total: u64) -> Option<Bytes> {
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.sort_by_key(|piece| piece.offset);
        let mut end = 0;
        for piece in &pieces {
            if piece.offset != end {
                return None;
            }
            end += piece.bytes.len() as u64;
        }
        if end != total {
            return None;
        }
        if pieces.len() == 1 {
            return pieces.pop().map(|piece| piece.bytes.freeze());
        }
        Some(engine.pool().copy(pieces.iter().map(|piece| piece.bytes.bytes())).freeze())
    }
}
