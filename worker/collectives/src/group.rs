//! What the rest of a worker sees of the other ranks.

mod narrowed;

use crate::chunked::{Chunked, Parties, Task, chunk};
use crate::doubling::{self, DIRECT_RANKS, Doubling};
use crate::ends::Finish;
use crate::engine::{Collective, Engine, NEAR_SMALL_BYTES, Stats};
use crate::error::CollectiveError;
use crate::flight::FlightSnapshot;
use crate::frame::MAX_PAYLOAD_BYTES;
use crate::gather::{self, Expect, Fail, Gather, SMALL_BYTES};
use crate::local;
use crate::numbers::Numbers;
use crate::op::{Element, ReduceOp};
use crate::pending::{Pending, Slot};
use crate::quic::{self, MeshConfig};
use crate::shm::{self, Circle, Goal, HostReduction, Hosts, Mates, Neighbours};
use crate::tag::Tag;
use crate::transport::{Mixed, Transport};
use crate::tree::Plan;
use bytes::Bytes;
use lockstep_common::ids::{Generation, Rank};
use lockstep_common::job::{Backend, Reduction};
use lockstep_common::placement::Placement;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod blobs;

/// Signatures of the collectives that move plain bytes. Reductions have `0x0o_t`: operation, element type.
pub(crate) const GATHER: u8 = 0x80;
pub(crate) const BROADCAST: u8 = 0x81;
pub(crate) const GATHER_TO: u8 = 0x82;
/// Marks the signature of a reduction whose result is scattered.
pub(crate) const SCATTER: u8 = 0x40;

/// One rank of one generation of one job, and its connections to the others.
///
/// Clones are the same rank. When the last one is dropped, this rank leaves the group as soon as what it has
/// sent has arrived.
#[derive(Clone)]
pub struct Group {
    engine: Arc<Engine>,
    shape: Arc<Shape>,
    direct_ranks: u32,
}

struct Shape {
    placement: Placement,
    reduction: Reduction,
    plan: Arc<Plan>,
    /// The most nodes in one message of a reduction in rounds.
    most_relayed: usize,
    /// All ranks, as parties of a reduction over the network.
    everyone: Arc<Parties>,
    /// The ranks of this host, where they share memory.
    mates: Option<Arc<Mates>>,
    /// One rank of each host, where there are several hosts and this one has several ranks.
    leaders: Option<Arc<Parties>>,
}

impl Shape {
    /// `hosts` has the number of each rank's host; all are different where no memory is shared.
    fn new(placement: Placement, rank: Rank, reduction: Reduction, hosts: &[usize]) -> Self {
        let plan = Plan::new(&placement, rank, reduction, hosts);
        let ranks = || (0..placement.world_size()).map(Rank);
        let everyone = Parties { members: ranks().collect(), me: rank.index(), union: plan.ranks.clone() };
        let host = hosts[rank.index()];
        let members: Vec<Rank> = ranks().filter(|r| hosts[r.index()] == host).collect();
        let leaders = plan.hosts.as_ref().map(|two| {
            let first = |host| ranks().find(|r| hosts[r.index()] == host);
            let members = (0..two.among.nodes.len()).filter_map(first).collect();
            Arc::new(Parties { members, me: host, union: two.among.clone() })
        });
        let unions = plan.hosts.as_ref().map_or_else(|| vec![plan.ranks.clone()], |two| two.within.clone());
        let shares = leaders.is_some() || members.len() > 1;
        let me = members.iter().position(|r| *r == rank).unwrap_or(0);
        let mates = shares.then(|| Arc::new(Mates { members, me, unions }));
        let most_relayed = doubling::largest_message(&plan.ranks.nodes);
        let (plan, everyone) = (Arc::new(plan), Arc::new(everyone));
        Self { placement, reduction, plan, most_relayed, everyone, mates, leaders }
    }
}

impl Group {
    /// A group of one rank: every collective is ready at once.
    pub fn solo(placement: Placement, reduction: Reduction) -> Result<Self, CollectiveError> {
        if placement.world_size() != 1 {
            let detail = format!("a solo group has one rank, the placement {}", placement.world_size());
            return Err(CollectiveError::Config(detail));
        }
        let engine = Engine::new(Rank(0), 1, Generation(0), Duration::ZERO, None);
        Ok(Self::over(engine, placement, reduction, &[0]))
    }

    /// All ranks of a group inside this process, in order of rank.
    pub fn in_process(
        placement: &Placement,
        reduction: Reduction,
        timeout: Duration,
    ) -> Result<Vec<Self>, CollectiveError> {
        check_placement(placement)?;
        let hosts: Vec<usize> = (0..placement.world_size() as usize).collect();
        Self::on_hosts(placement, &hosts, reduction, timeout)
    }

    /// The same, with shared memory between the ranks for which `hosts` has equal numbers. Hosts are numbered from 0
    /// in the order of their first ranks.
    pub fn on_hosts(
        placement: &Placement,
        hosts: &[usize],
        reduction: Reduction,
        timeout: Duration,
    ) -> Result<Vec<Self>, CollectiveError> {
        check_placement(placement)?;
        let config = |error: std::io::Error| CollectiveError::Config(format!("no shared memory: {error}"));
        let neighbours = shm::in_process(hosts).map_err(config)?;
        let mailboxes = local::mesh(placement.world_size()).into_iter();
        let groups = mailboxes.zip(neighbours).zip(0..).map(|(((transport, mailbox), near), rank)| {
            let transport: Option<Box<dyn Transport>> = Some(Box::new(Mixed::new(Box::new(transport))));
            let engine = Engine::new(Rank(rank), placement.world_size(), Generation(0), timeout, transport);
            if let Some(near) = near {
                engine.attach(near).map_err(config)?;
            }
            local::serve(mailbox, &engine)?;
            Ok(Self::over(engine, placement.clone(), reduction, hosts))
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
        let (placement, reduction, backend) = (config.placement.clone(), config.reduction, config.backend);
        let (transport, inboxes) = quic::establish(config).await?;
        let transport: Option<Box<dyn Transport>> = Some(Box::new(Mixed::new(Box::new(transport))));
        let engine = Engine::new(rank, placement.world_size(), generation, timeout, transport);
        inboxes.serve(&engine);
        let apart: Vec<usize> = (0..placement.world_size() as usize).collect();
        let group = Self::over(engine, placement.clone(), reduction, &apart);
        if backend == Backend::Quic {
            return Ok(group);
        }
        match shm::share(&group, backend).await {
            Ok(None) => Ok(group),
            Ok(Some(hosts)) => Ok(Self::over(group.engine.clone(), placement, reduction, &hosts)),
            Err(error) => {
                group.abort(error.clone());
                Err(error)
            }
        }
    }

    /// The group that `engine` serves.
    pub(crate) fn over(
        engine: Arc<Engine>,
        placement: Placement,
        reduction: Reduction,
        hosts: &[usize],
    ) -> Self {
        let shape = Arc::new(Shape::new(placement, engine.rank(), reduction, hosts));
        Self { engine, shape, direct_ranks: DIRECT_RANKS }
    }

    /// The same rank, which sends small parts to every rank by itself only in worlds of up to `ranks`. All ranks must
    /// say the same. For tests of small worlds.
    #[doc(hidden)]
    pub fn direct_up_to(self, ranks: u32) -> Self {
        Self { direct_ranks: ranks, ..self }
    }

    /// Begins to share memory with the ranks that `near` has.
    pub(crate) fn attach(&self, near: Arc<Neighbours>) -> Result<(), CollectiveError> {
        let attached = self.engine.attach(near);
        attached.map_err(|error| CollectiveError::Config(format!("no thread for shared memory: {error}")))
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

    /// How this rank reduces its own shards' vectors where the caller adds by itself: `(into, from)` in this order,
    /// by place among its shards, and then the places of the nodes that remain.
    pub fn own_tree(&self) -> (Vec<(usize, usize)>, Vec<usize>) {
        let plan = self.plan();
        (plan.local.iter().map(|merge| (merge.into, merge.from)).collect(), plan.kept.clone())
    }

    /// Writes the sum of `leaves`, one per logical shard, to `out`: what [`all_reduce`](Self::all_reduce) of them gives,
    /// where nothing has to be moved.
    ///
    /// Fails unless this group has one rank, and `leaves` one vector of the length of `out` per shard.
    pub fn sum<T: Element>(&self, out: &mut [T], leaves: &[&[T]]) -> Result<(), CollectiveError> {
        let shards = self.shape.placement.shards();
        let is_whole = self.world_size() == 1 && leaves.len() == shards as usize;
        if !is_whole || leaves.iter().any(|leaf| leaf.len() != out.len()) {
            let detail = format!(
                "a sum in place needs one rank and {shards} vectors of {} numbers; there are {} ranks and {} vectors",
                out.len(),
                self.world_size(),
                leaves.len()
            );
            return Err(CollectiveError::Config(detail));
        }
        ReduceOp::Sum.combine(out, leaves, &self.plan().local);
        Ok(())
    }

    pub(crate) fn plan(&self) -> &Plan {
        &self.shape.plan
    }

    pub(crate) fn reduction(&self) -> Reduction {
        self.shape.reduction
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.engine.timeout()
    }

    /// What this rank has moved so far.
    pub fn stats(&self) -> Stats {
        self.engine.stats()
    }

    /// The flight record: what is in flight on this rank and who is missing there, and what has ended.
    pub fn flight(&self) -> FlightSnapshot {
        self.engine.flight()
    }

    /// For how long the oldest collective has been in flight on this rank; `None` if there is none.
    pub fn oldest_wait(&self) -> Option<Duration> {
        self.engine.oldest_wait()
    }

    /// How many times this rank has entered a collective or one has ended. A number that stays the same says that it
    /// gets nowhere.
    pub fn flight_events(&self) -> u64 {
        self.engine.flight_events()
    }

    /// Says that this rank gets on with its work. To be called now and then between collectives that lie further apart
    /// than the job's time-out, or the others take it for hung.
    pub fn note_progress(&self) {
        self.engine.note_progress();
    }

    /// The first cause of the group's end, if it has ended.
    pub fn failure(&self) -> Option<CollectiveError> {
        self.engine.failure()
    }

    /// `len` elements for a leaf of [`all_reduce`](Self::all_reduce), in memory that the group uses again: their values
    /// are arbitrary.
    pub fn numbers<T: Element>(&self, len: usize) -> Numbers<T> {
        self.engine.numbers(len)
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
        let nodes = self.nodes(tag, leaves, op)?;
        let slot = Slot::new();
        let result = slot.clone();
        let publish: Finish<T> = Box::new(move |sum| Some(Box::new(move || result.set(Ok(sum)))));
        self.reduce(tag, nodes, op, true, publish, fail_slot(&slot))?;
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    /// Reduces one vector per logical shard, of which this rank gets the elements of [`chunk`](Self::chunk).
    pub fn reduce_scatter<T: Element, L: Into<Numbers<T>>>(
        &self,
        tag: Tag,
        leaves: Vec<L>,
        op: ReduceOp,
    ) -> Result<Pending<Numbers<T>>, CollectiveError> {
        if op == ReduceOp::Moments {
            return Err(CollectiveError::Misuse {
                tag,
                detail: "moments cannot be cut into chunks".to_owned(),
            });
        }
        let nodes = self.nodes(tag, leaves, op)?;
        let (len, chunk) = (nodes[0].len(), self.chunk(nodes[0].len()));
        let slot = Slot::new();
        let result = slot.clone();
        // Where everyone needs everything on the way, the chunk is cut from the whole.
        let publish: Finish<T> = Box::new(move |sum| {
            let sum = if sum.len() == len { Numbers::from(sum[chunk].to_vec()) } else { sum };
            Some(Box::new(move || result.set(Ok(sum))))
        });
        self.reduce(tag, nodes, op, false, publish, fail_slot(&slot))?;
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    /// The elements of a vector of `len` that [`reduce_scatter`](Self::reduce_scatter) gives this rank. Together the
    /// ranks' chunks are the vector, in order of rank.
    pub fn chunk(&self, len: usize) -> Range<usize> {
        chunk(len, self.rank().index(), self.world_size() as usize)
    }

    /// This rank's nodes of the tree, made of its leaves.
    fn nodes<T: Element, L: Into<Numbers<T>>>(
        &self,
        tag: Tag,
        leaves: Vec<L>,
        op: ReduceOp,
    ) -> Result<Vec<Numbers<T>>, CollectiveError> {
        let mut leaves: Vec<Numbers<T>> = leaves.into_iter().map(Into::into).collect();
        self.check_leaves(tag, &leaves)?;
        self.check_op::<T>(tag, leaves[0].len(), op)?;
        let plan = &self.shape.plan;
        op.merge_in_place(&mut leaves, &plan.local);
        let kept = leaves.into_iter().enumerate().filter(|(i, _)| plan.kept.contains(i));
        Ok(kept.map(|(_, leaf)| leaf).collect())
    }

    /// Chooses how `nodes` become the result. With `spread` every rank gets all of it; without, each may get its
    /// chunk only.
    fn reduce<T: Element>(
        &self,
        tag: Tag,
        mut nodes: Vec<Numbers<T>>,
        op: ReduceOp,
        spread: bool,
        finish: Finish<T>,
        fail: Fail,
    ) -> Result<(), CollectiveError> {
        let Shape { placement, everyone, mates, leaders, .. } = &*self.shape;
        let len = nodes[0].len();
        let bytes = len * size_of::<T>();
        let signature = op.signature::<T>() | if spread { 0 } else { SCATTER };
        let task = Task { tag, signature, op, leaves: placement.shards(), spread };
        let near = self.engine.near().filter(|_| mates.is_some());
        let small = if near.is_some() && leaders.is_none() { NEAR_SMALL_BYTES } else { SMALL_BYTES };
        if len == 0 || self.world_size() == 1 {
            if let Some(error) = self.failure() {
                return Err(error);
            }
            let mut root = nodes.swap_remove(0);
            op.finish(&mut root, placement.shards());
            if let Some(publish) = finish(root) {
                publish();
            }
            return Ok(());
        }
        if op == ReduceOp::Moments || bytes <= small {
            return self.reduce_small(task, &nodes, finish, fail);
        }
        // Over several hosts all of the result comes to every host; a chunk is cut from it.
        let task = Task { spread: spread || leaders.is_some(), ..task };
        let collective: Arc<dyn Collective> = match (near, mates) {
            (Some(near), Some(mates)) => {
                let goal = match leaders {
                    Some(leaders) => Goal::Hosts(Hosts::new(leaders.clone())),
                    None if spread => Goal::All,
                    None => Goal::Chunk,
                };
                let circle = Circle { near: near.clone(), mates: mates.clone(), goal };
                Arc::new(HostReduction::new(&self.engine, circle, task, nodes, finish, fail)?)
            }
            // Alone on its host, a rank is its own leader.
            _ => {
                let parties = leaders.as_ref().unwrap_or(everyone).clone();
                let output = self.engine.numbers(if task.spread { len } else { self.chunk(len).len() });
                Arc::new(Chunked::new(task, parties, len, nodes, output, finish, fail))
            }
        };
        self.engine.start(tag, collective)
    }

    /// Is ready when every rank has called it.
    pub fn barrier(&self, tag: Tag) -> Result<Pending<()>, CollectiveError> {
        let slot = Slot::new();
        let result = slot.clone();
        let finish = Box::new(move |_| result.set(Ok(())));
        self.exchange(tag, GATHER, Bytes::new(), 0, finish, fail_slot(&slot))?;
        Ok(Pending::new(slot, self.engine.clone(), tag))
    }

    /// Ends the group: every waiter on this rank, and on the others, gets an error with this first cause.
    pub fn abort(&self, reason: CollectiveError) {
        self.engine.abort(reason);
    }

    /// Leaves in good order and waits, up to `limit`, until what this rank has sent has arrived. Dropping the
    /// group does the same without waiting, which is too early for a process that exits next.
    pub fn close(self, limit: Duration) {
        let deadline = Instant::now() + limit;
        for drained in self.engine.leave() {
            // Nothing is ever sent here: the channel ends when the last frame has arrived.
            let _ = drained.recv_deadline(deadline);
        }
    }

    #[cfg(test)]
    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }

    fn check_leaves<T: Element>(&self, tag: Tag, leaves: &[Numbers<T>]) -> Result<(), CollectiveError> {
        let misuse = |detail| Err(CollectiveError::Misuse { tag, detail });
        let Shape { placement, plan, .. } = &*self.shape;
        if let Some(idle) = plan.ranks.nodes.iter().position(|&nodes| nodes == 0) {
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
        Ok(())
    }

    fn check_op<T: Element>(&self, tag: Tag, len: usize, op: ReduceOp) -> Result<(), CollectiveError> {
        match op.refuse::<T>(len) {
            Some(detail) => Err(CollectiveError::Misuse { tag, detail }),
            None => Ok(()),
        }
    }

    /// Everyone gets everyone's nodes.
    fn reduce_small<T: Element>(
        &self,
        task: Task,
        nodes: &[Numbers<T>],
        finish: Finish<T>,
        fail: Fail,
    ) -> Result<(), CollectiveError> {
        let everyone = self.shape.everyone.clone();
        let len = nodes[0].len();
        let mine = nodes.iter().map(AsRef::<[u8]>::as_ref);
        let mine = self.engine.pool().copy(mine).freeze();
        let combine = move |blobs: Vec<Bytes>| {
            let union = &everyone.union;
            let input = |&(party, node): &(usize, usize)| {
                &bytemuck::cast_slice::<u8, T>(&blobs[party])[node * len..][..len]
            };
            let mut out = vec![T::zeroed(); len];
            task.op.combine(&mut out, &union.order.iter().map(input).collect::<Vec<_>>(), &union.merges);
            task.op.finish(&mut out, task.leaves);
            if let Some(publish) = finish(out.into()) {
                publish();
            }
        };
        self.exchange(task.tag, task.signature, mine, len * size_of::<T>(), Box::new(combine), fail)
    }

    /// Brings to every rank what all have: `node_bytes` for each of their nodes.
    fn exchange(
        &self,
        tag: Tag,
        signature: u8,
        mine: Bytes,
        node_bytes: usize,
        finish: gather::Finish,
        fail: Fail,
    ) -> Result<(), CollectiveError> {
        let sizes = self.plan().ranks.nodes.iter().map(|nodes| nodes * node_bytes);
        let largest = self.shape.most_relayed.saturating_mul(node_bytes);
        if self.world_size() > self.direct_ranks && largest <= MAX_PAYLOAD_BYTES {
            let sizes: Vec<_> = sizes.collect();
            let rounds = Doubling::new(tag, signature, self.rank(), mine, &sizes, finish, fail);
            return self.engine.start(tag, Arc::new(rounds));
        }
        let expect = sizes.map(|bytes| Expect::Bytes(bytes as u64)).collect();
        self.engine
            .start(tag, Arc::new(Gather::new(tag, signature, self.rank(), Some(mine), expect, finish, fail)))
    }
}

/// Tells those who wait for `slot` of a failure.
fn fail_slot<R: Send + Sync + 'static>(slot: &Arc<Slot<R>>) -> Fail {
    let slot = slot.clone();
    Box::new(move |error: &CollectiveError| slot.set(Err(error.clone())))
}

fn check_placement(placement: &Placement) -> Result<(), CollectiveError> {
    if placement.is_valid() {
        return Ok(());
    }
    Err(CollectiveError::Config("the placement has no ranks, or ranges that overlap".to_owned()))
}
