//! Large all-reduce: reduce-scatter and all-gather, cut into pieces.
//!
//! The vector is split into one chunk per rank, each chunk into pieces. Everyone sends its nodes of a chunk's
//! piece to that chunk's rank, which combines them in the tree's order as soon as the last has come and sends
//! the result to all. So reducing one piece overlaps receiving the next, and each rank sends and receives
//! about `2 (W - 1) / W` of the vector per node.
//!
//! Rabenseifner, "Optimization of collective reduction operations", 2004, with direct exchange instead of
//! recursive halving, which keeps the order of addition free to be the tree's.

use crate::buffer::Buffer;
use crate::ends::{Finish, Mine, Sink, Whole};
use crate::engine::{Collective, Engine, Part, Publish};
use crate::error::CollectiveError;
use crate::frame::{Header, Stage};
use crate::gather::Fail;
use crate::numbers::Numbers;
use crate::op::{Element, ReduceOp};
use crate::tag::Tag;
use crate::transport::Lane;
use crate::tree::Union;
use lockstep_common::ids::Rank;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// The payload of a frame, all nodes of a rank together: some tens of packets, so that headers and wake-ups are
/// rare, and far below the 4 MB window, so that a piece is reduced while the next ones are on their way.
const PIECE_BYTES: usize = 128 << 10;

/// The shortest piece. Keeps the frames of a rank with the most nodes, 62, under the cap.
const MIN_PIECE_BYTES: usize = 8 << 10;

/// Chunks begin at multiples of this many elements: a cache line of the smallest type.
const ALIGN: usize = 16;

/// Who takes part in a chunked reduction, and what becomes of their nodes.
pub(crate) struct Parties {
    /// The ranks, in the order of the union's parties.
    pub(crate) members: Vec<Rank>,
    /// This rank's place among them.
    pub(crate) me: usize,
    pub(crate) union: Union,
}

/// What is reduced, and what this rank wants of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Task {
    pub(crate) tag: Tag,
    pub(crate) signature: u8,
    pub(crate) op: ReduceOp,
    /// The leaves of the whole tree, by which an average divides.
    pub(crate) leaves: u32,
    /// Whether everyone gets the whole result, or each its chunk.
    pub(crate) spread: bool,
}

/// A large reduction in flight.
pub(crate) struct Chunked<T> {
    task: Task,
    geometry: Geometry,
    parties: Arc<Parties>,
    mine: Mine<T>,
    fail: Fail,
    state: Mutex<State<T>>,
}

struct State<T> {
    /// Where the result goes, until it is complete.
    sink: Option<Box<dyn Sink<T>>>,
    /// This rank's chunk, piece by piece.
    own: Vec<Piece>,
    own_left: usize,
    /// Which pieces of each rank's chunk have come.
    results: Vec<Vec<bool>>,
    results_left: Vec<usize>,
    entered: Vec<bool>,
}

/// The nodes of a piece, by rank.
struct Piece {
    nodes: Vec<Option<Buffer>>,
    missing: usize,
}

impl<T: Element> Chunked<T> {
    /// `nodes` are this rank's, all of `len` elements. `output` has room for what this rank gets.
    pub(crate) fn new(
        task: Task,
        parties: Arc<Parties>,
        len: usize,
        nodes: Vec<Numbers<T>>,
        output: Numbers<T>,
        finish: Finish<T>,
        fail: Fail,
    ) -> Self {
        let start = if task.spread { 0 } else { chunk(len, parties.me, parties.members.len()).start };
        let mine = Mine::There(nodes.into_iter().map(Arc::new).collect());
        Self::between(task, parties, len, mine, Box::new(Whole { output, start, finish }), fail)
    }

    /// The same, from and to other places than whole vectors.
    pub(crate) fn between(
        task: Task,
        parties: Arc<Parties>,
        len: usize,
        mine: Mine<T>,
        sink: Box<dyn Sink<T>>,
        fail: Fail,
    ) -> Self {
        let (world, geometry) = (parties.members.len(), Self::geometry(&parties, len));
        let own: Vec<_> = (0..geometry.pieces(parties.me))
            .map(|_| Piece { nodes: (0..world).map(|_| None).collect(), missing: world - 1 })
            .collect();
        let comes = |party: usize| task.spread && party != parties.me;
        let results: Vec<_> =
            (0..world).map(|p| vec![false; if comes(p) { geometry.pieces(p) } else { 0 }]).collect();
        let state = State {
            sink: Some(sink),
            own_left: own.len(),
            own,
            results_left: results.iter().map(Vec::len).collect(),
            results,
            entered: vec![false; world],
        };
        Self { task, geometry, parties, mine, fail, state: Mutex::new(state) }
    }

    fn geometry(parties: &Parties, len: usize) -> Geometry {
        let piece = (PIECE_BYTES / parties.union.most_nodes().max(1)).max(MIN_PIECE_BYTES) / size_of::<T>();
        Geometry { len, world: parties.members.len(), piece }
    }

    /// The most frames that one party sends to another in a reduction of `len` elements: the pieces of two chunks.
    pub(crate) fn most_frames(parties: &Parties, len: usize) -> usize {
        let geometry = Self::geometry(parties, len);
        (0..geometry.world).map(|party| geometry.pieces(party)).sum()
    }

    /// The other members, starting behind this one, so that not everybody sends to the first one first.
    fn others(&self) -> impl Iterator<Item = usize> + use<T> {
        let (me, world) = (self.parties.me, self.parties.members.len());
        (1..world).map(move |d| (me + d) % world)
    }

    fn party(&self, rank: Rank) -> Result<usize, CollectiveError> {
        let party = self.parties.members.iter().position(|member| *member == rank);
        party
            .filter(|party| *party != self.parties.me)
            .ok_or_else(|| self.broken(rank, "a part from a rank without one"))
    }

    fn part(&self, stage: Stage, range: &Range<usize>) -> Part {
        let (offset, total) = (range.start as u64, self.geometry.len as u64);
        Part { tag: self.task.tag, signature: self.task.signature, stage, offset, total }
    }

    fn broken(&self, rank: Rank, detail: &str) -> CollectiveError {
        CollectiveError::Protocol { rank, detail: format!("{detail} in {}", self.task.tag) }
    }

    fn check(&self, header: &Header) -> Result<(), CollectiveError> {
        let detail = if header.signature != self.task.signature {
            "it runs another operation or element type under this tag".to_owned()
        } else if header.total != self.geometry.len as u64 {
            format!("it reduces {} elements, this rank {}", header.total, self.geometry.len)
        } else {
            return Ok(());
        };
        Err(CollectiveError::Mismatch { rank: header.source, tag: self.task.tag, detail })
    }

    /// Which piece of `owner`'s chunk a frame belongs to, if it is exactly one with `nodes` nodes.
    fn locate(&self, header: &Header, owner: usize, nodes: usize) -> Result<usize, CollectiveError> {
        let index = self.geometry.locate(owner, header.offset as usize);
        index
            .filter(|&i| {
                let len = self.geometry.piece(owner, i).len();
                header.payload_len == len * nodes * size_of::<T>()
            })
            .ok_or_else(|| self.broken(header.source, "a piece of the wrong place or size"))
    }

    fn take_nodes(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        let (source, me) = (self.party(header.source)?, self.parties.me);
        let index = self.locate(header, me, self.parties.union.nodes[source])?;
        let nodes = {
            let mut state = self.state.lock();
            state.entered[source] = true;
            let piece = &mut state.own[index];
            if piece.missing == 0 || piece.nodes[source].is_some() {
                return Err(self.broken(header.source, "the same piece twice"));
            }
            piece.nodes[source] = Some(payload);
            piece.missing -= 1;
            if piece.missing > 0 {
                return Ok(None);
            }
            piece.nodes.iter_mut().map(Option::take).collect::<Vec<_>>()
        };
        let range = self.geometry.piece(me, index);
        let mut result = engine.pool().take(range.len() * size_of::<T>());
        self.combine(engine, &nodes, &range, result.elements_mut());
        drop(nodes);
        self.state.lock().write(range.start, result.elements());
        let result = result.freeze();
        for to in self.others().filter(|_| self.task.spread) {
            let to = self.parties.members[to];
            engine.send(to, Lane::Bulk, self.part(Stage::Result, &range), vec![result.clone()]);
        }
        // Counted only now: whoever sees the result may leave, and what is not queued by then is never sent.
        let complete = {
            let mut state = self.state.lock();
            state.own_left -= 1;
            state.take_sink()
        };
        Ok(complete.and_then(Sink::finish))
    }

    fn combine(&self, engine: &Engine, nodes: &[Option<Buffer>], range: &Range<usize>, out: &mut [T]) {
        let mine = self.mine.part(engine.pool(), range.clone());
        let inputs = self.parties.union.order.iter().map(|&(party, node)| match &nodes[party] {
            Some(nodes) => &nodes.elements()[node * range.len()..][..range.len()],
            None => mine.node(node, range.len()),
        });
        self.task.op.combine(out, &inputs.collect::<Vec<_>>(), &self.parties.union.merges);
        self.task.op.finish(out, self.task.leaves);
    }

    fn take_result(&self, header: &Header, payload: &Buffer) -> Result<Option<Publish>, CollectiveError> {
        let source = self.party(header.source)?;
        let index = self.locate(header, source, 1)?;
        let complete = {
            let mut state = self.state.lock();
            state.entered[source] = true;
            match state.results[source].get_mut(index) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(self.broken(header.source, "an unexpected result, or the same twice")),
            }
            state.write(self.geometry.piece(source, index).start, payload.elements());
            state.results_left[source] -= 1;
            state.take_sink()
        };
        Ok(complete.and_then(Sink::finish))
    }
}

impl<T: Element> State<T> {
    /// Where the result went, once, when every piece of it is there.
    fn take_sink(&mut self) -> Option<Box<dyn Sink<T>>> {
        let done = self.own_left == 0 && self.results_left.iter().all(|&left| left == 0);
        self.sink.take_if(|_| done)
    }

    fn write(&mut self, start: usize, piece: &[T]) {
        if let Some(sink) = &mut self.sink {
            sink.write(start, piece);
        }
    }
}

impl<T: Element> Collective for Chunked<T> {
    fn launch(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError> {
        let most = self.others().map(|to| self.geometry.pieces(to)).max().unwrap_or(0);
        for index in 0..most {
            for to in self.others().filter(|&to| index < self.geometry.pieces(to)) {
                let range = self.geometry.piece(to, index);
                let payload = self.mine.bytes(engine.pool(), range.clone());
                let to = self.parties.members[to];
                engine.send(to, Lane::Bulk, self.part(Stage::Contribution, &range), payload);
            }
        }
        // A vector too short for a chunk of this rank's own may leave it nothing to wait for.
        let complete = self.state.lock().take_sink();
        Ok(complete.and_then(Sink::finish))
    }

    fn handle_frame(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        self.check(header)?;
        match header.stage {
            Stage::Contribution => self.take_nodes(engine, header, payload),
            Stage::Result => self.take_result(header, &payload),
            _ => Err(self.broken(header.source, "a message for ranks that share memory")),
        }
    }

    fn fail(&self, error: &CollectiveError) {
        (self.fail)(error);
    }

    fn describe(&self) -> (u8, u64) {
        (self.task.signature, (self.geometry.len * size_of::<T>()) as u64)
    }

    fn missing(&self) -> Vec<(Rank, bool)> {
        let state = self.state.lock();
        let missing = |&party: &usize| {
            let waits_for_nodes = party != self.parties.me
                && state.own.iter().any(|p| p.missing > 0 && p.nodes[party].is_none());
            state.results_left[party] > 0 || waits_for_nodes
        };
        let parties = (0..self.geometry.world).filter(missing);
        parties.map(|party| (self.parties.members[party], state.entered[party])).collect()
    }
}

/// How a vector is cut.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    len: usize,
    world: usize,
    piece: usize,
}

/// Which elements of a vector of `len` are the chunk of `party` among `parties`.
pub(crate) fn chunk(len: usize, party: usize, parties: usize) -> Range<usize> {
    let lines = len / ALIGN;
    let edge = |p: usize| if p == parties { len } else { lines * p / parties * ALIGN };
    edge(party)..edge(party + 1)
}

impl Geometry {
    fn chunk(&self, party: usize) -> Range<usize> {
        chunk(self.len, party, self.world)
    }

    fn pieces(&self, party: usize) -> usize {
        self.chunk(party).len().div_ceil(self.piece)
    }

    fn piece(&self, party: usize, index: usize) -> Range<usize> {
        let chunk = self.chunk(party);
        let start = chunk.start + index * self.piece;
        start..chunk.end.min(start + self.piece)
    }

    fn locate(&self, party: usize, offset: usize) -> Option<usize> {
        let chunk = self.chunk(party);
        let within = offset.checked_sub(chunk.start).filter(|_| offset < chunk.end)?;
        within.is_multiple_of(self.piece).then_some(within / self.piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_vector_once_in_order() {
        for (len, world, piece) in [(1, 1, 4), (1000, 3, 64), (100_003, 7, 1024), (40, 5, 1024), (16, 2, 7)] {
            let geometry = Geometry { len, world, piece };
            let mut end = 0;
            for rank in 0..world {
                for index in 0..geometry.pieces(rank) {
                    let range = geometry.piece(rank, index);
                    assert_eq!(range.start, end);
                    assert!(!range.is_empty() && range.len() <= piece);
                    assert_eq!(geometry.locate(rank, range.start), Some(index));
                    assert_eq!(
                        geometry.locate(rank, range.start + 1).is_some(),
                        piece == 1 && range.len() > 1
                    );
                    end = range.end;
                }
            }
            assert_eq!(end, len);
        }
    }
}
