//! Large reductions among ranks of one host: everyone's vectors are read where they lie, results written where they
//! are wanted.
//!
//! ```text
//! offer   each rank tells the others of its host where its nodes are, and where it wants results
//! work    each rank reduces its chunk of the vector, from all ranks' memory into all ranks' memory
//! done    ... and says so. A rank that has heard it from all has its result, and its nodes back
//! ```
//!
//! No byte is copied besides, and no rank waits for another within the work. The result takes the place of each rank's
//! first node: an element is read by the one rank that then overwrites it, while it is in that rank's cache, which
//! spares a third of the memory traffic.
//!
//! In a world of several hosts the ranks of a host reduce into the memory of the first among them, the *leader*. The
//! leaders reduce among each other over the network, once for the host ([`Chunked`]), and the others copy the result
//! from their leader.

use super::neighbours::Neighbours;
use crate::buffer::Buffer;
use crate::chunked::{Chunked, Parties, Task, chunk};
use crate::ends::Finish;
use crate::engine::{Collective, Engine, Part, Publish};
use crate::error::CollectiveError;
use crate::frame::{Header, Stage};
use crate::gather::Fail;
use crate::numbers::Numbers;
use crate::op::Element;
use crate::transport::Lane;
use crate::tree::Union;
use bytes::Bytes;
use lockstep_common::ids::Rank;
use parking_lot::Mutex;
use std::ops::Range;
use std::sync::Arc;

/// How much is reduced before it is copied on to the other ranks: half a first-level cache.
const BLOCK_BYTES: usize = 16 << 10;

/// Who gets what the ranks of this host reduce.
pub(crate) enum Goal<T> {
    /// Everyone all of it: the host is the world.
    All,
    /// Everyone its chunk: the host is the world.
    Chunk,
    /// The leader, as this host's part of a reduction among the leaders, whose result everyone gets.
    Hosts(Hosts<T>),
}

/// The second step of a reduction over several hosts.
pub(crate) struct Hosts<T> {
    /// The leaders, in the order of the hosts; this host's leader is `me`.
    pub(crate) leaders: Arc<Parties>,
    /// The result, until it is handed on. On the leader it comes from the reduction among the leaders.
    output: Arc<Mutex<Option<Numbers<T>>>>,
}

impl<T> Hosts<T> {
    pub(crate) fn new(leaders: Arc<Parties>) -> Self {
        Self { leaders, output: Arc::default() }
    }
}

/// The ranks of this host, and what becomes of their nodes.
pub(crate) struct Mates {
    /// In order; the first is the leader.
    pub(crate) members: Vec<Rank>,
    /// This rank's place among them.
    pub(crate) me: usize,
    /// What each of the host's nodes is made of. One when the host is the world.
    pub(crate) unions: Vec<Union>,
}

impl Mates {
    fn nodes(&self, member: usize) -> usize {
        self.unions.iter().map(|union| union.nodes[member]).sum()
    }
}

/// Among whom a reduction takes place, through what, and to what end.
pub(crate) struct Circle<T> {
    pub(crate) near: Arc<Neighbours>,
    pub(crate) mates: Arc<Mates>,
    pub(crate) goal: Goal<T>,
}

/// A reduction among the ranks of a host in flight.
pub(crate) struct HostReduction<T> {
    task: Task,
    len: usize,
    near: Arc<Neighbours>,
    mates: Arc<Mates>,
    goal: Goal<T>,
    /// Where this rank's nodes and targets are, for as long as `State` holds them.
    own_nodes: Vec<Place<T>>,
    own_targets: Vec<Place<T>>,
    fail: Fail,
    state: Mutex<State<T>>,
}

struct State<T> {
    offers: Vec<Option<Offer>>,
    /// Offers that have not come, and this rank's own launch.
    offers_missing: usize,
    done: Vec<bool>,
    done_missing: usize,
    /// This rank's, the first of which becomes the result where the host is the world.
    nodes: Vec<Numbers<T>>,
    /// What this rank gets elsewhere: its chunk of the result, or as leader its host's nodes, then their sum.
    targets: Vec<Numbers<T>>,
    finish: Option<Finish<T>>,
    upper: Option<Arc<Chunked<T>>>,
    /// What other leaders sent before this host's nodes were there.
    early: Vec<(Header, Buffer)>,
    /// Whether the others of this host have been told of the result, as leader.
    handed_on: bool,
    /// The ranks that still copy the result from this one.
    takers: usize,
    taken: Vec<bool>,
}

/// Where a rank's vectors are in its arena.
#[derive(Clone)]
struct Offer {
    nodes: Vec<u64>,
    targets: Vec<u64>,
}

/// The beginning of a vector that other ranks, or several threads, write to in disjoint parts.
struct Place<T>(*mut T);

impl<T> Clone for Place<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Place<T> {}

// SAFETY: a mere address. Whoever writes through it says why nobody else does.
unsafe impl<T: Send> Send for Place<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Place<T> {}

impl<T: Element> HostReduction<T> {
    /// `nodes` are this rank's, all of one length.
    pub(crate) fn new(
        engine: &Engine,
        circle: Circle<T>,
        task: Task,
        nodes: Vec<Numbers<T>>,
        finish: Finish<T>,
        fail: Fail,
    ) -> Result<Self, CollectiveError> {
        let Circle { near, mates, goal } = circle;
        let len = nodes.first().map_or(0, |node| node.len());
        let reachable = |node: Numbers<T>| {
            if node.offset().is_some() {
                return node;
            }
            let mut copy = engine.numbers(len);
            copy.copy_from_slice(&node);
            copy
        };
        let mut nodes: Vec<_> = nodes.into_iter().map(reachable).collect();
        let mut targets = match &goal {
            Goal::All => vec![],
            Goal::Chunk => vec![engine.numbers(chunk(len, mates.me, mates.members.len()).len())],
            Goal::Hosts(_) if mates.me == 0 => mates.unions.iter().map(|_| engine.numbers(len)).collect(),
            Goal::Hosts(hosts) => {
                *hosts.output.lock() = Some(engine.numbers(len));
                vec![]
            }
        };
        let shared = nodes.iter().chain(targets.iter().filter(|_| !matches!(goal, Goal::Chunk)));
        if shared.map(Numbers::offset).any(|offset| offset.is_none()) {
            // A group that has failed gives out no shared memory.
            if let Some(error) = engine.failure() {
                return Err(error);
            }
            let detail =
                format!("no shared memory for vectors of {len} elements of {} bytes", size_of::<T>());
            return Err(CollectiveError::Misuse { tag: task.tag, detail });
        }
        let place = |numbers: &mut Numbers<T>| Place(numbers.as_mut_slice().as_mut_ptr());
        let own_nodes: Vec<_> = nodes.iter_mut().map(place).collect();
        let own_targets = match &goal {
            Goal::All => own_nodes[..1].to_vec(),
            _ => targets.iter_mut().map(place).collect(),
        };
        let world = mates.members.len();
        let mut done = vec![false; world];
        let mut done_missing = world;
        if matches!(goal, Goal::Hosts(_)) && mates.me != 0 {
            // Only the leader waits for the others' work.
            done.fill(true);
            done_missing = 0;
        }
        let state = State {
            offers: vec![None; world],
            offers_missing: world,
            done,
            done_missing,
            nodes,
            targets,
            finish: Some(finish),
            upper: None,
            early: vec![],
            handed_on: false,
            takers: world - 1,
            taken: vec![false; world],
        };
        let state = Mutex::new(state);
        Ok(Self { task, len, near, mates, goal, own_nodes, own_targets, fail, state })
    }

    fn broken(&self, rank: Rank, detail: &str) -> CollectiveError {
        CollectiveError::Protocol { rank, detail: format!("{detail} in {}", self.task.tag) }
    }

    fn part(&self, stage: Stage) -> Part {
        let Task { tag, signature, .. } = self.task;
        Part { tag, signature, stage, offset: 0, total: self.len as u64 }
    }

    fn tell(&self, engine: &Engine, member: usize, stage: Stage, words: &[u64]) {
        let payload =
            if words.is_empty() { vec![] } else { vec![Bytes::copy_from_slice(bytemuck::cast_slice(words))] };
        engine.send(self.mates.members[member], Lane::Small, self.part(stage), payload);
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<T> {
        let (me, world) = (self.mates.me, self.mates.members.len());
        (1..world).map(move |d| (me + d) % world)
    }

    /// How many targets a member offers.
    fn targets_of(&self, member: usize) -> usize {
        match &self.goal {
            Goal::All => 1,
            Goal::Chunk => 0,
            Goal::Hosts(_) if member == 0 => self.mates.unions.len(),
            Goal::Hosts(_) => 0,
        }
    }

    fn take_offer(
        &self,
        engine: &Engine,
        member: usize,
        payload: &Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        let rank = self.mates.members[member];
        let words: &[u64] = payload.elements();
        let nodes = self.mates.nodes(member);
        let whole = payload.len() == words.len() * 8 && words.len() == nodes + self.targets_of(member);
        let bytes = self.len * size_of::<T>();
        let within = |at: &u64| at.is_multiple_of(64) && self.near.reaches(rank, *at, bytes);
        if !whole || !words.iter().all(within) {
            return Err(self.broken(rank, "an offer of memory that it does not have"));
        }
        let complete = {
            let mut state = self.state.lock();
            if state.offers[member].is_some() {
                return Err(self.broken(rank, "the same offer twice"));
            }
            let (nodes, targets) = words.split_at(nodes);
            state.offers[member] = Some(Offer { nodes: nodes.to_vec(), targets: targets.to_vec() });
            state.offers_missing -= 1;
            state.offers_missing == 0
        };
        if complete { self.work(engine) } else { Ok(None) }
    }

    /// Reduces this rank's chunk. Called once, when all offers are there.
    fn work(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError> {
        let (me, world) = (self.mates.me, self.mates.members.len());
        let offers = self.state.lock().offers.clone();
        let range = chunk(self.len, me, world);
        for (index, union) in self.mates.unions.iter().enumerate() {
            let mut inputs = Vec::with_capacity(union.order.len());
            for &(member, node) in &union.order {
                let rank = self.mates.members[member];
                let input = if member == me {
                    self.own_nodes.get(node).copied()
                } else {
                    let offset = offers[member].as_ref().and_then(|offer| offer.nodes.get(node));
                    offset.and_then(|&at| self.near.place(rank, at, self.len)).map(Place)
                };
                inputs.push(input.ok_or_else(|| self.broken(rank, "no such vector"))?);
            }
            let targets = self.targets(index, &offers)?;
            self.reduce(union, &inputs, range.clone(), &targets);
        }
        match &self.goal {
            Goal::Hosts(_) if me != 0 => self.tell(engine, 0, Stage::Done, &[]),
            Goal::Hosts(_) => {}
            Goal::All | Goal::Chunk => self.others().for_each(|to| self.tell(engine, to, Stage::Done, &[])),
        }
        self.take_done(engine, me)
    }

    /// Where the host's node `index` is wanted, and at which element of the vector each of these places begins.
    fn targets(
        &self,
        index: usize,
        offers: &[Option<Offer>],
    ) -> Result<Vec<(Place<T>, usize)>, CollectiveError> {
        let me = self.mates.me;
        let start = match &self.goal {
            Goal::Chunk => chunk(self.len, me, self.mates.members.len()).start,
            _ => 0,
        };
        let own = self.own_targets.get(index).map(|place| (*place, start));
        let mut targets: Vec<_> = own.into_iter().collect();
        for member in self.others() {
            let Some(offer) = &offers[member] else { continue };
            let Some(&at) = offer.targets.get(index) else { continue };
            let rank = self.mates.members[member];
            let place = self.near.place(rank, at, self.len).map(Place);
            targets.push((place.ok_or_else(|| self.broken(rank, "no such target"))?, 0));
        }
        Ok(targets)
    }

    fn reduce(&self, union: &Union, inputs: &[Place<T>], range: Range<usize>, targets: &[(Place<T>, usize)]) {
        let block = (BLOCK_BYTES / size_of::<T>()).max(1);
        let mut sums = vec![T::zeroed(); block.min(range.len())];
        let mut parts: Vec<&[T]> = Vec::with_capacity(inputs.len());
        for begin in range.clone().step_by(block) {
            let len = block.min(range.end - begin);
            let sums = &mut sums[..len];
            // SAFETY: within vectors that their owners offered, and have back only after this rank's `Done`. This
            // chunk of them is written by this rank alone, below.
            parts.extend(inputs.iter().map(|i| unsafe { std::slice::from_raw_parts(i.0.add(begin), len) }));
            self.task.op.combine(sums, &parts, &union.merges);
            parts.clear();
            if !matches!(self.goal, Goal::Hosts(_)) {
                self.task.op.finish(sums, self.task.leaves);
            }
            for (target, start) in targets {
                // SAFETY: within the target, which holds the chunk or all of the vector. This chunk of it is this
                // rank's to write, and no slice of it is alive.
                unsafe { target.0.add(begin - start).copy_from_nonoverlapping(sums.as_ptr(), len) };
            }
        }
    }

    fn take_done(&self, engine: &Engine, member: usize) -> Result<Option<Publish>, CollectiveError> {
        let targets = {
            let mut state = self.state.lock();
            if !matches!(self.goal, Goal::Hosts(_)) || self.mates.me == 0 {
                if std::mem::replace(&mut state.done[member], true) {
                    return Err(self.broken(self.mates.members[member], "the same end twice"));
                }
                state.done_missing -= 1;
            }
            if state.done_missing > 0 {
                return Ok(None);
            }
            match &self.goal {
                Goal::All => std::mem::take(&mut state.nodes),
                Goal::Hosts(_) if self.mates.me != 0 => return Ok(None),
                Goal::Chunk | Goal::Hosts(_) => std::mem::take(&mut state.targets),
            }
        };
        match &self.goal {
            Goal::All | Goal::Chunk => {
                let output = targets.into_iter().next();
                let finish = self.state.lock().finish.take();
                Ok(output.zip(finish).and_then(|(output, finish)| finish(output)))
            }
            Goal::Hosts(hosts) => self.unite_hosts(engine, hosts, targets),
        }
    }

    /// As leader: takes this host's nodes to the other leaders.
    fn unite_hosts(
        &self,
        engine: &Engine,
        hosts: &Hosts<T>,
        nodes: Vec<Numbers<T>>,
    ) -> Result<Option<Publish>, CollectiveError> {
        let output = engine.numbers(self.len);
        let result = hosts.output.clone();
        let finish: Finish<T> = Box::new(move |output| {
            *result.lock() = Some(output);
            None
        });
        let fail = Box::new(|_: &CollectiveError| {});
        let parties = hosts.leaders.clone();
        let upper = Arc::new(Chunked::new(self.task, parties, self.len, nodes, output, finish, fail));
        let early = {
            let mut state = self.state.lock();
            state.upper = Some(upper.clone());
            std::mem::take(&mut state.early)
        };
        for (header, payload) in early {
            upper.handle_frame(engine, &header, payload)?;
        }
        upper.launch(engine)?;
        self.hand_on(engine, hosts)
    }

    /// As leader: offers the result, if it is there, to the other ranks of this host.
    fn hand_on(&self, engine: &Engine, hosts: &Hosts<T>) -> Result<Option<Publish>, CollectiveError> {
        let Some(output) = hosts.output.lock().take() else { return Ok(None) };
        let Some(offset) = output.offset().filter(|_| self.mates.members.len() > 1) else {
            return Ok(self.publish(output));
        };
        // Kept until all have copied it.
        {
            let mut state = self.state.lock();
            state.targets.push(output);
            state.handed_on = true;
        }
        self.others().for_each(|to| self.tell(engine, to, Stage::Whole, &[offset]));
        Ok(None)
    }

    fn publish(&self, output: Numbers<T>) -> Option<Publish> {
        let finish = self.state.lock().finish.take();
        finish.and_then(|finish| finish(output))
    }

    /// Copies the result from the leader.
    fn take_whole(
        &self,
        engine: &Engine,
        rank: Rank,
        payload: &Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        let output = match &self.goal {
            Goal::Hosts(hosts) if self.mates.me != 0 => hosts.output.lock().take(),
            _ => None,
        };
        let (Some(mut output), [offset]) = (output, payload.elements::<u64>()) else {
            return Err(self.broken(rank, "an unexpected result"));
        };
        let aligned = Some(*offset).filter(|at| at.is_multiple_of(64));
        // SAFETY: the leader keeps the result as it is until this rank's `Taken`.
        let whole = aligned.and_then(|at| unsafe { self.near.vector(rank, at, self.len) });
        output.copy_from_slice(whole.ok_or_else(|| self.broken(rank, "a result outside its memory"))?);
        self.tell(engine, 0, Stage::Taken, &[]);
        Ok(self.publish(output))
    }

    fn take_taken(&self, member: usize) -> Result<Option<Publish>, CollectiveError> {
        let output = {
            let mut state = self.state.lock();
            // Whatever else lies there by then is not the result.
            if !state.handed_on || std::mem::replace(&mut state.taken[member], true) {
                return Err(self.broken(self.mates.members[member], "an unexpected receipt"));
            }
            state.takers -= 1;
            if state.takers > 0 { None } else { state.targets.pop() }
        };
        Ok(output.and_then(|output| self.publish(output)))
    }

    /// What another host's leader sent.
    fn take_from_host(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        let Goal::Hosts(hosts) = &self.goal else {
            return Err(self.broken(header.source, "a part from another host"));
        };
        if self.mates.me != 0 || !hosts.leaders.members.contains(&header.source) {
            return Err(
                self.broken(header.source, "a part between ranks of which one does not lead its host")
            );
        }
        let upper = {
            let mut state = self.state.lock();
            match state.upper.clone() {
                Some(upper) => upper,
                None => {
                    let before =
                        state.early.iter().filter(|(early, _)| early.source == header.source).count();
                    if before >= Chunked::<T>::most_frames(&hosts.leaders, self.len) {
                        return Err(self.broken(header.source, "more pieces than there are"));
                    }
                    state.early.push((*header, payload));
                    return Ok(None);
                }
            }
        };
        upper.handle_frame(engine, header, payload)?;
        self.hand_on(engine, hosts)
    }
}

impl<T: Element> Collective for HostReduction<T> {
    fn launch(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError> {
        let words: Vec<u64> = {
            let state = self.state.lock();
            let targets = match &self.goal {
                Goal::All => &state.nodes[..1],
                Goal::Chunk => &[],
                Goal::Hosts(_) => &state.targets,
            };
            state.nodes.iter().chain(targets).filter_map(Numbers::offset).collect()
        };
        self.others().for_each(|to| self.tell(engine, to, Stage::Offer, &words));
        let complete = {
            let mut state = self.state.lock();
            state.offers_missing -= 1;
            state.offers_missing == 0
        };
        if complete { self.work(engine) } else { Ok(None) }
    }

    fn handle_frame(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        let mismatch = |detail: String| {
            Err(CollectiveError::Mismatch { rank: header.source, tag: self.task.tag, detail })
        };
        if header.signature != self.task.signature {
            return mismatch("it runs another operation or element type under this tag".to_owned());
        }
        if header.total != self.len as u64 {
            return mismatch(format!("it reduces {} elements, this rank {}", header.total, self.len));
        }
        let Some(member) = self.mates.members.iter().position(|rank| *rank == header.source) else {
            return self.take_from_host(engine, header, payload);
        };
        match header.stage {
            Stage::Offer => self.take_offer(engine, member, &payload),
            Stage::Done => self.take_done(engine, member),
            Stage::Whole => self.take_whole(engine, header.source, &payload),
            Stage::Taken => self.take_taken(member),
            _ => Err(self.broken(header.source, "a piece where memory is shared")),
        }
    }

    fn fail(&self, error: &CollectiveError) {
        (self.fail)(error);
    }

    fn describe(&self) -> (u8, u64) {
        (self.task.signature, (self.len * size_of::<T>()) as u64)
    }

    fn missing(&self) -> Vec<(Rank, bool)> {
        let (silent, busy, upper) = {
            let state = self.state.lock();
            let members = || self.others().map(|member| (self.mates.members[member], member));
            let silent: Vec<_> = members()
                .filter(|&(_, m)| state.offers[m].is_none())
                .map(|(rank, _)| (rank, false))
                .collect();
            let busy: Vec<_> =
                members().filter(|&(_, m)| !state.done[m]).map(|(rank, _)| (rank, true)).collect();
            (silent, busy, state.upper.clone())
        };
        if !silent.is_empty() {
            return silent;
        }
        match upper.map(|upper| upper.missing()) {
            Some(hosts) if !hosts.is_empty() => hosts,
            _ if !busy.is_empty() => busy,
            _ if matches!(self.goal, Goal::Hosts(_)) && self.mates.me != 0 => {
                vec![(self.mates.members[0], true)]
            }
            _ if matches!(self.goal, Goal::Hosts(_)) => {
                let state = self.state.lock();
                let takers = self.others().filter(|&m| !state.taken[m]);
                takers.map(|m| (self.mates.members[m], true)).collect()
            }
            _ => vec![],
        }
    }
}
