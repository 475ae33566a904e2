//! What the rest of a worker sees of the other ranks.

use crate::chunked::Chunked;
use crate::engine::{Engine, Stats};
use crate::error::CollectiveError;
use crate::gather::{Expect, Finish, Gather, SMALL_BYTES};
use crate::local;
use crate::numbers::Numbers;
use crate::op::{Element, ReduceOp};
use crate::pending::{Pending, Slot};
use crate::quic::{self, MeshConfig};
use crate::tag::Tag;
use crate::transport::Transport;
use bytes::Bytes;
use lockstep_common::ids::{Generation, Rank};
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use std::sync::Arc;
use std::time::Duration;

/// Signatures of the collectives that move plain bytes. Reductions have `0x0o_t`: operation, element type.
const GATHER: u8 = 0x80;
const BROADCAST: u8 = 0x81;

/// One rank of one generation of one job, and its connections to the others.
///
/// Clones are the same rank. When the last one is dropped, this rank leaves the group as soon as what it has
/// sent has arrived.
#[derive(Clone)]
pub struct Group {
    engine: Arc<Engine>,
    shape: Arc<Shape>,
}

struct Shape {
    placement: Placement,
    plan: Arc<crate::tree::Plan>,
}

impl Group {
    /// A group of one rank: every collective is ready at once.
    pub fn solo(placement: Placement, reduction: Reduction) -> Result<Self, CollectiveError> {
        if placement.world_size() != 1 {
            let detail = format!("a solo group has one rank, the placement {}", placement.world_size());
            return Err(CollectiveError::Config(detail));
        }
        Ok(Self::new(Rank(0), Generation(0), placement, reduction, Duration::ZERO, None))
    }

    /// All ranks of a group inside this process, in order of rank.
    pub fn in_process(
        placement: &Placement,
        reduction: Reduction,
        timeout: Duration,
    ) -> Result<Vec<Self>, CollectiveError> {
        check_placement(placement)?;
        let mailboxes = local::mesh(placement.world_size());
        let groups = mailboxes.into_iter().zip(0..).map(|((transport, mailbox), rank)| {
            let transport: Option<Box<dyn Transport>> = Some(Box::new(transport));
            let group =
                Self::new(Rank(rank), Generation(0), placement.clone(), reduction, timeout, transport);
            local::serve(mailbox, &group.engine)?;
            Ok(group)
        });
        groups.collect()
    }

    /// Connects to every other rank over QUIC.
    ///
    /// Returns when all of this rank's connections stand. Runs on a tokio runtime, which goes on to move the
    /// group's frames.
    pub async fn connect(config: MeshConfig) -> Result<Self, CollectiveError> {
        check_placement(&config.placement)?;
        let (rank, generation, timeout) = (config.rank, config.generation, config.timeout);
        let (placement, reduction) = (config.placement.clone(), config.reduction);
        let (transport, inboxes) = quic::establish(config).await?;
        let group = Self::new(rank, generation, placement, reduction, timeout, Some(Box::new(transport)));
        inboxes.serve(&group.engine);
        Ok(group)
    }

    fn new(
        rank: Rank,
        generation: Generation,
        placement: Placement,
        reduction: Reduction,
        timeout: Duration,
        transport: Option<Box<dyn Transport>>,
    ) -> Self {
        let engine = Engine::new(rank, placement.world_size(), generation, timeout, transport);
        Self::over(engine, placement, reduction)
    }

    /// The group that `engine` serves.
    pub(crate) fn over(engine: Arc<Engine>, placement: Placement, reduction: Reduction) -> Self {
        let plan = Arc::new(crate::tree::Plan::new(&placement, engine.rank(), reduction));
        Self { engine, shape: Arc::new(Shape { placement, plan }) }
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.engine.rank()
    }

    /// The number of ranks.
    pub fn world_size(&self) -> u32 {
        self.shape.placement.world_size()
    }

    /// Which rank owns which logical shards.
    pub fn placement(&self) -> &Placement {
        &self.shape.placement
    }

    /// What this rank has moved so far.
    pub fn stats(&self) -> Stats {
        self.engine.stats()
    }

    /// The first cause of the group's end, if it has ended.
    pub fn failure(&self) -> Option<CollectiveError> {
        self.engine.failure()
    }

    /// `len` elements for a leaf of [`all_reduce`](Self::all_reduce), in memory that the group uses again: their values
    /// are arbitrary.
    pub fn numbers<T: Element>(&self, len: usize) -> Numbers<T> {
        Numbers::pooled(self.engine.pool().take(len * size_of::<T>()))
    }

    /// Reduces one vector per logical shard to one vector, the same bits on every rank.
    ///
    /// `leaves` are this rank's own shards' vectors in the order of the shards, all of one length, which is the
    /// same on every rank. Whole subtrees are reduced before this returns, on the caller's thread.
    pub fn all_reduce<T: Element, L: Into<Numbers<T>>>(
        &self,
        tag: Tag,
        leaves: Vec<L>,
        op: ReduceOp,
    ) -> Result<Pending<Numbers<T>>, CollectiveError> {
        let mut leaves: Vec<Numbers<T>> = leaves.into_iter().map(Into::into).collect();
        let len = self.check_leaves(tag, &leaves, op)?;
        let plan = &self.shape.plan;
        op.merge_in_place(&mut leaves, &plan.local);
        let kept = |i: &usize| plan.kept.contains(i);
        let nodes = leaves.into_iter().enumerate().filter(|(i, _)| kept(i)).map(|(_, leaf)| leaf);
        let mut nodes: Vec<_> = nodes.collect();
        let slot = Slot::new();
        let signature = op.code() << 4 | T::CODE;
        if len == 0 || self.world_size() == 1 {
            if let Some(error) = self.failure() {
                return Err(error);
            }
            slot.set(Ok(nodes.swap_remove(0)));
        } else if op == ReduceOp::Moments || len * size_of::<T>() <= SMALL_BYTES {
            self.all_reduce_direct(tag, signature, &nodes, op, &slot)?;
        } else {
            let rank = self.rank();
            let output = self.numbers(len);
            let chunked = Chunked::new(tag, signature, rank, plan.clone(), nodes, output, slot.clone());
            self.engine.start(tag, Arc::new(chunked))?;
        }
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    /// Brings every rank's bytes, of any length, to every rank, in order of rank.
    pub fn all_gather(&self, tag: Tag, bytes: Vec<u8>) -> Result<Pending<Vec<Bytes>>, CollectiveError> {
        let expect = vec![Expect::Any; self.world_size() as usize];
        self.gather(tag, GATHER, Some(bytes.into()), expect, |blobs| blobs)
    }

    /// Brings the bytes of `root` to every rank. Only the root gives `bytes`.
    pub fn broadcast(
        &self,
        tag: Tag,
        root: Rank,
        bytes: Option<Vec<u8>>,
    ) -> Result<Pending<Bytes>, CollectiveError> {
        let misuse = |detail: String| Err(CollectiveError::Misuse { tag, detail });
        if root.0 >= self.world_size() {
            return misuse(format!("the root is {root} in a group of {}", self.world_size()));
        }
        if bytes.is_some() != (root == self.rank()) {
            return misuse(format!("the root, {root}, gives the bytes and no other rank does"));
        }
        let mut expect = vec![Expect::Nothing; self.world_size() as usize];
        expect[root.index()] = Expect::Any;
        let pick = move |mut blobs: Vec<Bytes>| blobs.swap_remove(root.index());
        self.gather(tag, BROADCAST, bytes.map(Bytes::from), expect, pick)
    }

    /// Is ready when every rank has called it.
    pub fn barrier(&self, tag: Tag) -> Result<Pending<()>, CollectiveError> {
        let expect = vec![Expect::Bytes(0); self.world_size() as usize];
        self.gather(tag, GATHER, Some(Bytes::new()), expect, |_| ())
    }

    /// Ends the group: every waiter on this rank, and on the others, gets an error with this first cause.
    pub fn abort(&self, reason: CollectiveError) {
        self.engine.abort(reason);
    }

    /// Leaves in good order and waits, up to `limit`, until what this rank has sent has arrived. Dropping the
    /// group does the same without waiting, which is too early for a process that exits next.
    pub fn close(self, limit: Duration) {
        if let Some(drained) = self.engine.leave() {
            // Nothing is ever sent here: the channel ends when the last frame has arrived.
            let _ = drained.recv_timeout(limit);
        }
    }

    #[cfg(test)]
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    fn check_leaves<T: Element>(
        &self,
        tag: Tag,
        leaves: &[Numbers<T>],
        op: ReduceOp,
    ) -> Result<usize, CollectiveError> {
        let misuse = |detail| Err(CollectiveError::Misuse { tag, detail });
        let Shape { placement, plan } = &*self.shape;
        if let Some(idle) = plan.nodes.iter().position(|&nodes| nodes == 0) {
            let idle = Rank(idle as u32);
            let detail = format!("{idle} owns no logical shard; use at most one worker per logical shard");
            return misuse(detail);
        }
        let owned = placement.range(self.rank()).len();
        if leaves.len() != owned {
            let detail = format!("{} vectors for the {owned} logical shards of this rank", leaves.len());
            return misuse(detail);
        }
        let len = leaves.first().map_or(0, |leaf| leaf.len());
        if let Some(other) = leaves.iter().find(|leaf| leaf.len() != len) {
            return misuse(format!("vectors of {len} and {} elements", other.len()));
        }
        match op.refuse::<T>(len) {
            Some(detail) => misuse(detail),
            None => Ok(len),
        }
    }

    fn all_reduce_direct<T: Element>(
        &self,
        tag: Tag,
        signature: u8,
        nodes: &[Numbers<T>],
        op: ReduceOp,
        slot: &Arc<Slot<Numbers<T>>>,
    ) -> Result<(), CollectiveError> {
        let plan = self.shape.plan.clone();
        let len = nodes[0].len();
        let bytes_of = |nodes: usize| (nodes * len * size_of::<T>()) as u64;
        let expect = plan.nodes.iter().map(|&nodes| Expect::Bytes(bytes_of(nodes))).collect();
        let mine = nodes.iter().map(AsRef::<[u8]>::as_ref);
        let mine = self.engine.pool().copy(mine).freeze();
        let result = slot.clone();
        let finish = move |blobs: Vec<Bytes>| {
            let inputs = blobs.iter().flat_map(|blob| bytemuck::cast_slice(blob).chunks_exact(len));
            let mut out = vec![T::zeroed(); len];
            op.combine(&mut out, &inputs.collect::<Vec<_>>(), &plan.global);
            result.set(Ok(out.into()));
        };
        self.start_gather(tag, signature, Some(mine), expect, Box::new(finish), slot)
    }

    fn gather<R: Send + Sync + 'static>(
        &self,
        tag: Tag,
        signature: u8,
        mine: Option<Bytes>,
        expect: Vec<Expect>,
        finish: impl FnOnce(Vec<Bytes>) -> R + Send + 'static,
    ) -> Result<Pending<R>, CollectiveError> {
        let slot = Slot::new();
        let result = slot.clone();
        let finish = Box::new(move |blobs| result.set(Ok(finish(blobs))));
        self.start_gather(tag, signature, mine, expect, finish, &slot)?;
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    fn start_gather<R: Send + Sync + 'static>(
        &self,
        tag: Tag,
        signature: u8,
        mine: Option<Bytes>,
        expect: Vec<Expect>,
        finish: Finish,
        slot: &Arc<Slot<R>>,
    ) -> Result<(), CollectiveError> {
        let failed = slot.clone();
        let fail = Box::new(move |error: &CollectiveError| failed.set(Err(error.clone())));
        let gather = Gather::new(tag, signature, self.rank(), mine, expect, finish, fail);
        self.engine.start(tag, Arc::new(gather))
    }
}

fn check_placement(placement: &Placement) -> Result<(), CollectiveError> {
    if placement.is_valid() {
        return Ok(());
    }
    Err(CollectiveError::Config("the placement has no ranks, or ranges that overlap".to_owned()))
}
