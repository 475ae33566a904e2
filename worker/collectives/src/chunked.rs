//! Large all-reduce: reduce-scatter and all-gather, cut into pieces.
//!
//! The vector is split into one chunk per rank, each chunk into pieces. Everyone sends its nodes of a chunk's
//! piece to that chunk's rank, which combines them in the tree's order as soon as the last has come and sends
//! the result to all. So reducing one piece overlaps receiving the next, and each rank sends and receives
//! about `2 (W - 1) / W` of the vector per node.
//!
//! Rabenseifner, "Optimization of collective reduction operations", 2004, with direct exchange instead of
//! recursive halving, which keeps the order of addition free to be the tree's.

use crate::buffer::{Buffer, Shared};
use crate::engine::{Collective, Engine, Part, Publish};
use crate::error::CollectiveError;
use crate::frame::{Header, Stage};
use crate::numbers::Numbers;
use crate::op::{Element, ReduceOp};
use crate::pending::Slot;
use crate::tag::Tag;
use crate::transport::Lane;
use crate::tree::Plan;
use bytes::Bytes;
use lockstep_common::ids::Rank;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// The payload of a frame, all nodes of a rank together: some tens of packets, so that headers and wake-ups are
/// rare, and far below the 4 MB window, so that a piece is reduced while the next ones are on their way.
const PIECE_BYTES: usize = 128 << 10;

/// The shortest piece. Keeps the frames of a rank with the most nodes (62 of 8-byte elements) under the cap.
const MIN_PIECE: usize = 1024;

/// Chunks begin at multiples of this many elements: a cache line of the smallest type.
const ALIGN: usize = 16;

/// A large all-reduce in flight.
pub(crate) struct Chunked<T> {
    tag: Tag,
    signature: u8,
    geometry: Geometry,
    plan: Arc<Plan>,
    rank: Rank,
    nodes: Vec<Arc<Numbers<T>>>,
    slot: Arc<Slot<Numbers<T>>>,
    state: Mutex<State<T>>,
}

struct State<T> {
    output: Option<Numbers<T>>,
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
    /// `nodes` are this rank's, all of the length of `output`, whose content is lost.
    pub(crate) fn new(
        tag: Tag,
        signature: u8,
        rank: Rank,
        plan: Arc<Plan>,
        nodes: Vec<Numbers<T>>,
        output: Numbers<T>,
        slot: Arc<Slot<Numbers<T>>>,
    ) -> Self {
        let world = plan.nodes.len();
        let len = output.len();
        let piece = (PIECE_BYTES / size_of::<T>() / plan.most_nodes().max(1)).max(MIN_PIECE);
        let geometry = Geometry { len, world, piece };
        let own: Vec<_> = (0..geometry.pieces(rank))
            .map(|_| Piece { nodes: (0..world).map(|_| None).collect(), missing: world - 1 })
            .collect();
        let pieces = (0..world).map(|r| if r == rank.index() { 0 } else { geometry.pieces(Rank(r as u32)) });
        let results: Vec<_> = pieces.map(|n| vec![false; n]).collect();
        let state = State {
            output: Some(output),
            own_left: own.len(),
            own,
            results_left: results.iter().map(Vec::len).collect(),
            results,
            entered: vec![false; world],
        };
        let nodes = nodes.into_iter().map(Arc::new).collect();
        Self { tag, signature, geometry, plan, rank, nodes, slot, state: Mutex::new(state) }
    }

    fn part(&self, stage: Stage, range: &Range<usize>) -> Part {
        let (offset, total) = (range.start as u64, self.geometry.len as u64);
        Part { tag: self.tag, signature: self.signature, stage, offset, total }
    }

    fn broken(&self, rank: Rank, detail: &str) -> CollectiveError {
        CollectiveError::Protocol { rank, detail: format!("{detail} in {}", self.tag) }
    }

    fn check(&self, header: &Header) -> Result<(), CollectiveError> {
        let detail = if header.signature != self.signature {
            "it runs another operation or element type under this tag".to_owned()
        } else if header.total != self.geometry.len as u64 {
            format!("it reduces {} elements, this rank {}", header.total, self.geometry.len)
        } else {
            return Ok(());
        };
        Err(CollectiveError::Mismatch { rank: header.source, tag: self.tag, detail })
    }

    /// Which piece of `owner`'s chunk a frame belongs to, if it is exactly one with `nodes` nodes.
    fn locate(&self, header: &Header, owner: Rank, nodes: usize) -> Result<usize, CollectiveError> {
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
        let source = header.source.index();
        let index = self.locate(header, self.rank, self.plan.nodes[source])?;
        let nodes = {
            let mut state = self.state.lock();
            state.entered[source] = true;
            let piece = &mut state.own[index];
            let slot =
                piece.nodes.get_mut(source).filter(|slot| slot.is_none() && source != self.rank.index());
            let Some(slot) = slot else {
                return Err(self.broken(header.source, "the same piece twice"));
            };
            *slot = Some(payload);
            piece.missing -= 1;
            if piece.missing > 0 {
                return Ok(None);
            }
            piece.nodes.iter_mut().map(Option::take).collect::<Vec<_>>()
        };
        let range = self.geometry.piece(self.rank, index);
        let mut result = engine.pool().take(range.len() * size_of::<T>());
        self.combine(&nodes, &range, result.elements_mut());
        drop(nodes);
        self.state.lock().write(range.clone(), result.elements());
        let result = result.freeze();
        for to in engine.others() {
            engine.send(to, Lane::Bulk, self.part(Stage::Result, &range), vec![result.clone()]);
        }
        // Counted only now: whoever sees the result may leave, and what is not queued by then is never sent.
        let output = {
            let mut state = self.state.lock();
            state.own_left -= 1;
            state.take_output()
        };
        Ok(self.publish(output))
    }

    fn combine(&self, nodes: &[Option<Buffer>], range: &Range<usize>, out: &mut [T]) {
        let mut inputs: Vec<&[T]> = Vec::with_capacity(self.plan.nodes.iter().sum());
        for nodes in nodes {
            match nodes {
                Some(nodes) => inputs.extend(nodes.elements().chunks_exact(range.len())),
                None => inputs.extend(self.nodes.iter().map(|node| &node[range.clone()])),
            }
        }
        ReduceOp::Sum.combine(out, &inputs, &self.plan.global);
    }

    fn take_result(&self, header: &Header, payload: &Buffer) -> Result<Option<Publish>, CollectiveError> {
        let source = header.source;
        let index = self.locate(header, source, 1)?;
        let output = {
            let mut state = self.state.lock();
            state.entered[source.index()] = true;
            match state.results[source.index()].get_mut(index) {
                Some(seen) if !*seen => *seen = true,
                _ => return Err(self.broken(source, "the same result twice")),
            }
            state.write(self.geometry.piece(source, index), payload.elements());
            state.results_left[source.index()] -= 1;
            state.take_output()
        };
        Ok(self.publish(output))
    }

    fn publish(&self, output: Option<Numbers<T>>) -> Option<Publish> {
        let slot = self.slot.clone();
        output.map(|output| Box::new(move || slot.set(Ok(output))) as Publish)
    }
}

impl<T: Element> State<T> {
    /// The output, once, when every piece of it is there.
    fn take_output(&mut self) -> Option<Numbers<T>> {
        let done = self.own_left == 0 && self.results_left.iter().all(|&left| left == 0);
        if done { self.output.take() } else { None }
    }

    fn write(&mut self, range: Range<usize>, piece: &[T]) {
        if let Some(output) = &mut self.output {
            output[range].copy_from_slice(piece);
        }
    }
}

impl<T: Element> Collective for Chunked<T> {
    fn launch(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError> {
        let nodes: Vec<_> = self.nodes.iter().map(|n| Bytes::from_owner(Shared(n.clone()))).collect();
        let most = engine.others().map(|to| self.geometry.pieces(to)).max().unwrap_or(0);
        for index in 0..most {
            for to in engine.others().filter(|&to| index < self.geometry.pieces(to)) {
                let range = self.geometry.piece(to, index);
                let bytes = range.start * size_of::<T>()..range.end * size_of::<T>();
                let payload = nodes.iter().map(|node| node.slice(bytes.clone())).collect();
                engine.send(to, Lane::Bulk, self.part(Stage::Contribution, &range), payload);
            }
        }
        Ok(None)
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
        }
    }

    fn fail(&self, error: &CollectiveError) {
        self.slot.set(Err(error.clone()));
    }

    fn missing(&self) -> Vec<(Rank, bool)> {
        let state = self.state.lock();
        let missing = |&r: &usize| {
            let waits_for_nodes =
                r != self.rank.index() && state.own.iter().any(|p| p.missing > 0 && p.nodes[r].is_none());
            state.results_left[r] > 0 || waits_for_nodes
        };
        (0..self.geometry.world).filter(missing).map(|r| (Rank(r as u32), state.entered[r])).collect()
    }
}

/// How a vector is cut.
#[derive(Clone, Copy, Debug)]
struct Geometry {
    len: usize,
    world: usize,
    piece: usize,
}

impl Geometry {
    fn chunk(&self, rank: Rank) -> Range<usize> {
        let lines = self.len / ALIGN;
        let edge = |r: usize| {
            if r == self.world { self.len } else { lines * r / self.world * ALIGN }
        };
        edge(rank.index())..edge(rank.index() + 1)
    }

    fn pieces(&self, rank: Rank) -> usize {
        self.chunk(rank).len().div_ceil(self.piece)
    }

    fn piece(&self, rank: Rank, index: usize) -> Range<usize> {
        let chunk = self.chunk(rank);
        let start = chunk.start + index * self.piece;
        start..chunk.end.min(start + self.piece)
    }

    fn locate(&self, rank: Rank, offset: usize) -> Option<usize> {
        let chunk = self.chunk(rank);
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
            for rank in (0..world as u32).map(Rank) {
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
