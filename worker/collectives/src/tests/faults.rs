//! A rank dies, or stops, after each frame that it sends, in each algorithm.
//!
//! After the collective the survivors enter a barrier, which none can leave: so each ends with an error, whatever it
//! had of the collective by then.

use crate::engine::Engine;
use crate::local;
use crate::shm::{self, Neighbours};
use crate::transport::{Farewell, Frame, Lane, Mixed, Transport};
use crate::{CollectiveError, Group, ReduceOp, Tag, TagKind};
use crossbeam_channel::Receiver;
use lockstep_common::ids::{Generation, Rank};
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use parking_lot::Mutex;
use std::sync::{Arc, OnceLock, Weak};
use std::thread;
use std::time::{Duration, Instant};

/// Cases at a time: nearly all that they do is wait.
const AT_ONCE: usize = 16;

/// Floats that take the way of large sums on any hosts, in two pieces for each of three ranks.
const LARGE: usize = 100_000;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Nothing more is heard of the rank.
    Stop,
    /// As well, and the others are told at once.
    Death,
}

impl Fault {
    /// The job's time-out: a death must be found without it.
    fn timeout(self) -> Duration {
        Duration::from_secs(if self == Fault::Stop { 2 } else { 30 })
    }

    /// When every survivor must have its error.
    fn limit(self) -> Duration {
        Duration::from_secs(if self == Fault::Stop { 3 } else { 2 })
    }
}

/// A collective, and how many elements or bytes each logical shard or rank gives.
#[derive(Clone, Copy, Debug)]
enum What {
    Sum(usize),
    Scatter(usize),
    Gather(usize),
    /// Of so many channels.
    Moments(usize),
    /// From rank 0.
    Broadcast(usize),
}

fn bucket() -> Tag {
    Tag::new(7, 1, TagKind::Gradient).index(3)
}

fn barrier() -> Tag {
    Tag::new(8, 0, TagKind::Barrier)
}

type Wait = Box<dyn FnOnce() -> Result<Vec<u8>, CollectiveError> + Send>;

impl What {
    fn start(self, group: &Group) -> Result<Wait, CollectiveError> {
        let tag = bucket();
        let leaves = |len| -> Vec<Vec<f32>> {
            let leaf = |shard| {
                let mut stream = Stream::new(5, "leaf", &[u64::from(shard)]);
                (0..len).map(|_| stream.normal() as f32).collect()
            };
            group.placement().range(group.rank()).map(leaf).collect()
        };
        let pending = match self {
            What::Sum(len) => group.all_reduce(tag, leaves(len), ReduceOp::Sum)?,
            What::Scatter(len) => group.reduce_scatter(tag, leaves(len), ReduceOp::Sum)?,
            What::Gather(bytes) => {
                let pending = group.all_gather(tag, vec![group.rank().0 as u8 + 1; bytes])?;
                return Ok(Box::new(move || Ok(pending.wait()?.concat())));
            }
            What::Moments(channels) => {
                let ones = |_| [vec![4.0; channels + 1], vec![1.0; channels]].concat();
                let leaves: Vec<Vec<f64>> = group.placement().range(group.rank()).map(ones).collect();
                let pending = group.all_reduce(tag, leaves, ReduceOp::Moments)?;
                return Ok(Box::new(move || Ok(bytemuck::cast_slice(&pending.wait()?).to_vec())));
            }
            What::Broadcast(bytes) => {
                let own = (group.rank() == Rank(0)).then(|| vec![7; bytes]);
                let pending = group.broadcast(tag, Rank(0), own)?;
                return Ok(Box::new(move || Ok(pending.wait()?.to_vec())));
            }
        };
        Ok(Box::new(move || Ok(bytemuck::cast_slice(&pending.wait()?).to_vec())))
    }
}

/// What befalls a rank once it has sent so many frames.
struct Doom {
    frames: usize,
    sent: Mutex<usize>,
    death: OnceLock<Death>,
}

/// Who is told of a death, by the network or by shared memory.
struct Death {
    victim: Rank,
    far: Vec<Weak<Engine>>,
    near: Vec<Weak<Neighbours>>,
}

impl Doom {
    fn has_struck(&self) -> bool {
        *self.sent.lock() >= self.frames
    }

    fn tell(&self) {
        let Some(Death { victim, far, near }) = self.death.get() else { return };
        near.iter().filter_map(Weak::upgrade).for_each(|near| near.handle_gone(*victim));
        for engine in far.iter().filter_map(Weak::upgrade) {
            engine.handle_lost(*victim, "its process has ended".to_owned());
        }
    }
}

/// The transport of the rank that stops or dies.
struct Doomed {
    inner: Mixed,
    doom: Arc<Doom>,
}

impl Transport for Doomed {
    fn send(&self, to: Rank, lane: Lane, frame: Frame) {
        let last = {
            let mut sent = self.doom.sent.lock();
            *sent += 1;
            if *sent <= self.doom.frames {
                self.inner.send(to, lane, frame);
            }
            *sent == self.doom.frames
        };
        if last {
            self.doom.tell();
        }
    }

    fn abort(&self, farewell: &Farewell) {
        if !self.doom.has_struck() {
            self.inner.abort(farewell);
        }
    }

    /// Not withheld: only the end of the case leaves.
    fn leave(&self) -> Vec<Receiver<()>> {
        self.inner.leave()
    }

    fn ways(&self, peer: Rank) -> u32 {
        self.inner.ways(peer)
    }

    fn attach(&self, near: &Arc<Neighbours>) {
        self.inner.attach(near);
    }
}

/// A collective among ranks on these hosts.
#[derive(Clone, Copy, Debug)]
struct Scene<'a> {
    hosts: &'a [usize],
    what: What,
    /// Whether small parts go in rounds.
    rounds: bool,
    victim: Rank,
}

/// How a survivor fared: in the collective, in the barrier after it, and how long both took.
struct Fate {
    rank: Rank,
    /// Whether it entered the collective before it knew.
    entered: bool,
    result: Result<Vec<u8>, CollectiveError>,
    barrier: Result<(), CollectiveError>,
    elapsed: Duration,
}

impl Scene<'_> {
    /// The ranks' groups, of which the victim's is under `doom`.
    fn ranks(&self, doom: &Arc<Doom>, fault: Fault) -> (Vec<Group>, Vec<Weak<Neighbours>>) {
        let world = self.hosts.len() as u32;
        // More shards than ranks, so that some ranks send several nodes.
        let placement = Placement::even(world + 2, world);
        let near = shm::in_process(self.hosts).unwrap();
        let neighbours: Vec<_> = near.iter().map(|near| near.as_ref().map(Arc::downgrade)).collect();
        let mut engines = vec![];
        for (((transport, mailbox), near), rank) in local::mesh(world).into_iter().zip(near).zip(0..) {
            let inner = Mixed::new(Box::new(transport));
            let transport: Box<dyn Transport> = if rank == self.victim.0 {
                Box::new(Doomed { inner, doom: doom.clone() })
            } else {
                Box::new(inner)
            };
            let engine = Engine::new(Rank(rank), world, Generation(0), fault.timeout(), Some(transport));
            if let Some(near) = near {
                engine.attach(near).unwrap();
            }
            local::serve(mailbox, &engine).unwrap();
            engines.push(engine);
        }
        if fault == Fault::Death {
            let host = self.hosts[self.victim.index()];
            let others = || (0..self.hosts.len()).filter(|&rank| rank != self.victim.index());
            let far = others().filter(|&rank| self.hosts[rank] != host);
            let near = others().filter(|&rank| self.hosts[rank] == host);
            let death = Death {
                victim: self.victim,
                far: far.map(|rank| Arc::downgrade(&engines[rank])).collect(),
                near: near.filter_map(|rank| neighbours[rank].clone()).collect(),
            };
            assert!(doom.death.set(death).is_ok());
        }
        let direct = if self.rounds { 2 } else { world };
        let over = |engine| {
            let group = Group::over(engine, placement.clone(), Reduction::Exact, self.hosts);
            group.direct_up_to(direct)
        };
        (engines.into_iter().map(over).collect(), neighbours.into_iter().flatten().collect())
    }

    /// What each rank gets when nothing goes wrong, and how many frames the victim sends for it.
    fn undisturbed(&self) -> (Vec<Vec<u8>>, usize) {
        let doom = Arc::new(Doom { frames: usize::MAX, sent: Mutex::new(0), death: OnceLock::new() });
        let (groups, _) = self.ranks(&doom, Fault::Death);
        let results = thread::scope(|scope| {
            let ranks: Vec<_> = groups
                .iter()
                .map(|group| scope.spawn(|| self.what.start(group).unwrap()().unwrap()))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        let sent = *doom.sent.lock();
        (results, sent)
    }

    fn disturbed(&self, fault: Fault, frames: usize) -> Vec<Fate> {
        let doom = Arc::new(Doom { frames, sent: Mutex::new(0), death: OnceLock::new() });
        let (groups, neighbours) = self.ranks(&doom, fault);
        let victim = &groups[self.victim.index()];
        let fates = thread::scope(|scope| {
            let survivors = groups.iter().filter(|group| group.rank() != self.victim);
            let survivors: Vec<_> = survivors.map(|group| scope.spawn(|| self.survive(group))).collect();
            if frames == 0 {
                doom.tell();
            } else {
                // It goes on by itself: its threads take in what comes until it has sent its last frame.
                drop(self.what.start(victim));
            }
            survivors.into_iter().map(|survivor| survivor.join().unwrap()).collect()
        });
        drop(groups);
        let deadline = Instant::now() + Duration::from_secs(20);
        while neighbours.iter().any(|near| near.strong_count() > 0) {
            assert!(Instant::now() < deadline, "{self:?}: a thread still reads the rings");
            thread::yield_now();
        }
        fates
    }

    fn survive(&self, group: &Group) -> Fate {
        let begin = Instant::now();
        let started = self.what.start(group);
        let entered = started.is_ok();
        let result = started.and_then(|wait| wait());
        let barrier = group.barrier(barrier()).and_then(|pending| pending.wait()).map(|_| ());
        Fate { rank: group.rank(), entered, result, barrier, elapsed: begin.elapsed() }
    }

    /// Every moment of one kind of fault.
    fn check(&self, fault: Fault) {
        let (expected, frames) = self.undisturbed();
        let idle = matches!(self.what, What::Broadcast(_)) && self.victim != Rank(0);
        assert!(idle == (frames == 0), "{self:?}");
        for batch in (0..=frames).collect::<Vec<_>>().chunks(AT_ONCE) {
            thread::scope(|scope| {
                for &sent in batch {
                    let expected = &expected;
                    scope.spawn(move || {
                        let fates = self.disturbed(fault, sent);
                        let at = format!("{self:?}, {fault:?} after {sent} of {frames} frames");
                        // One that is told before it entered anything has no place to name, nor those it tells.
                        let entered = fates.iter().all(|fate| fate.entered);
                        for fate in &fates {
                            self.check_fate(fault, fate, expected, &at);
                            let text = fate.barrier.as_ref().unwrap_err().to_string();
                            let place =
                                [bucket(), barrier()].iter().any(|tag| text.contains(&tag.to_string()));
                            assert!(place || !entered, "{at}: {} says {text}", fate.rank);
                        }
                        let whole = fates.iter().all(|fate| fate.result.is_ok());
                        assert!(sent == frames || !whole, "{at}: nobody misses what was never sent");
                        assert!(fault == Fault::Death || sent < frames || whole, "{at}: all was sent");
                    });
                }
            });
        }
    }

    fn check_fate(&self, fault: Fault, fate: &Fate, expected: &[Vec<u8>], at: &str) {
        let Fate { rank, entered: _, result, barrier, elapsed } = fate;
        assert!(*elapsed < fault.limit(), "{at}: {rank} waited for {elapsed:?}");
        let error = barrier.as_ref().expect_err("the victim never enters the barrier");
        match result {
            Ok(result) => assert!(*result == expected[rank.index()], "{at}: {rank} has wrong bits"),
            Err(first) => assert_eq!(first, error, "{at}: {rank}"),
        }
        assert_eq!(error.culprit(), Some(self.victim), "{at}: {rank} says {error}");
        if let CollectiveError::TimedOut { missing, .. } = error {
            assert_eq!(missing, &[self.victim], "{at}: {rank} says {error}");
        }
        let text = error.to_string();
        assert!(text.contains(&self.victim.to_string()), "{at}: {rank} says {text}");
    }
}

/// Each rank as the victim, of both faults.
fn check(hosts: &[usize], what: What) {
    check_all(hosts, what, false);
}

fn check_all(hosts: &[usize], what: What, rounds: bool) {
    thread::scope(|scope| {
        for victim in (0..hosts.len() as u32).map(Rank) {
            let scene = Scene { hosts, what, rounds, victim };
            for fault in [Fault::Stop, Fault::Death] {
                scope.spawn(move || scene.check(fault));
            }
        }
    });
}

#[test]
fn small_sums_survive_no_fault_unnoticed() {
    for hosts in [&[0, 1, 2][..], &[0, 1, 2, 3], &[0, 0, 0], &[0, 0, 1, 1]] {
        check(hosts, What::Sum(100));
    }
}

#[test]
fn moments_survive_no_fault_unnoticed() {
    // The second are so many that they travel on the bulk lane.
    for (hosts, channels) in [(&[0, 1, 2][..], 20), (&[0, 0, 1, 1], 20), (&[0, 1, 2], 5000)] {
        check(hosts, What::Moments(channels));
    }
}

#[test]
fn small_sums_in_rounds_survive_no_fault_unnoticed() {
    for hosts in [&[0, 1, 2, 3, 4][..], &[0, 0, 1, 1]] {
        check_all(hosts, What::Sum(100), true);
    }
}

#[test]
fn gathers_survive_no_fault_unnoticed() {
    for hosts in [&[0, 1, 2][..], &[0, 0, 0], &[0, 0, 1, 1]] {
        check(hosts, What::Gather(600_000));
    }
}

#[test]
fn broadcasts_survive_no_fault_unnoticed() {
    for hosts in [&[0, 1, 2][..], &[0, 0, 0], &[0, 0, 1, 1]] {
        check(hosts, What::Broadcast(600_000));
    }
}

#[test]
fn large_sums_over_the_network_survive_no_fault_unnoticed() {
    check(&[0, 1, 2], What::Sum(LARGE));
}

#[test]
fn reduce_scatter_survives_no_fault_unnoticed() {
    for hosts in [&[0, 1, 2][..], &[0, 0, 0], &[0, 0, 1, 1]] {
        check(hosts, What::Scatter(LARGE));
    }
}

#[test]
fn sums_on_one_host_survive_no_fault_unnoticed() {
    check(&[0, 0, 0], What::Sum(LARGE));
}

#[test]
fn sums_over_hosts_survive_no_fault_unnoticed() {
    for hosts in [&[0, 0, 1][..], &[0, 1, 1], &[0, 0, 1, 1]] {
        check(hosts, What::Sum(LARGE));
    }
}
