//! Who is accused when a collective takes long, and who is not.

use super::{groups, honest, start, tag};
use crate::buffer::Pool;
use crate::engine::Engine;
use crate::frame::{Header, Stage};
use crate::inquiry::{self, Answer};
use crate::local;
use crate::shm;
use crate::transport::{Farewell, Frame, Lane, Mixed, Transport};
use crate::{CollectiveError, Group, ReduceOp};
use crossbeam_channel::{Receiver, Sender, unbounded};
use lockstep_common::ids::{Generation, Rank};
use lockstep_common::job::Reduction;
use lockstep_common::placement::Placement;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

const TIMEOUT: Duration = Duration::from_millis(400);

/// Evaluating its share of the test data, say, of which another rank has less.
#[test]
fn a_rank_that_computes_for_longer_than_the_time_out_is_waited_for() {
    let groups = groups(2, TIMEOUT);
    let waits = start(&groups[0]);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| waits.wait());
        let busy = Instant::now();
        while busy.elapsed() < 3 * TIMEOUT {
            groups[1].note_progress();
            thread::sleep(TIMEOUT / 10);
        }
        assert_eq!(*start(&groups[1]).wait().unwrap(), [2.0, 4.0]);
        assert_eq!(*waiter.join().unwrap().unwrap(), [2.0, 4.0]);
    });
}

#[test]
fn a_rank_that_stops_computing_is_accused_one_time_out_later() {
    let groups = groups(2, TIMEOUT);
    let waits = start(&groups[0]);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| waits.wait().unwrap_err());
        let busy = Instant::now();
        while busy.elapsed() < 2 * TIMEOUT {
            groups[1].note_progress();
            thread::sleep(TIMEOUT / 10);
        }
        let stops = Instant::now();
        let error = waiter.join().unwrap();
        assert!(stops.elapsed() < 2 * TIMEOUT, "after {:?}: {error}", stops.elapsed());
        assert_eq!(error.culprit(), Some(Rank(1)), "{error}");
    });
}

/// A link that takes its time for every frame of the bulk lane.
struct SlowLink(Sender<(Rank, Frame)>, Arc<dyn Transport>);

impl SlowLink {
    fn over(inner: impl Transport + 'static, per_frame: Duration) -> Self {
        let (queue, frames) = unbounded::<(Rank, Frame)>();
        let inner: Arc<dyn Transport> = Arc::new(inner);
        let link = inner.clone();
        thread::spawn(move || {
            for (to, frame) in frames {
                thread::sleep(per_frame);
                link.send(to, Lane::Bulk, frame);
            }
        });
        Self(queue, inner)
    }
}

impl Transport for SlowLink {
    fn send(&self, to: Rank, lane: Lane, frame: Frame) {
        match lane {
            Lane::Small => self.1.send(to, lane, frame),
            // Its thread ends with this link.
            Lane::Bulk => drop(self.0.send((to, frame))),
        }
    }

    fn abort(&self, farewell: &Farewell) {
        self.1.abort(farewell);
    }

    fn leave(&self) -> Vec<Receiver<()>> {
        self.1.leave()
    }
}

/// Two hosts of two ranks: all that the second of a host hears is its leader's answers.
#[test]
fn a_slow_link_between_hosts_is_not_taken_for_a_hang() {
    // 2 chunks of 16 pieces, and their results.
    const LEN: usize = 1 << 20;
    let placement = Placement::even(4, 4);
    let hosts = [0, 0, 1, 1];
    let near = shm::in_process(&hosts).unwrap();
    let groups: Vec<Group> = local::mesh(4)
        .into_iter()
        .zip(near)
        .zip(0..)
        .map(|(((transport, mailbox), near), rank)| {
            let link = SlowLink::over(transport, TIMEOUT / 10);
            let transport: Box<dyn Transport> = Box::new(Mixed::new(Box::new(link)));
            let engine = Engine::new(Rank(rank), 4, Generation(0), TIMEOUT, Some(transport));
            engine.attach(near.unwrap()).unwrap();
            local::serve(mailbox, &engine).unwrap();
            Group::over(engine, placement.clone(), Reduction::Exact, &hosts)
        })
        .collect();
    let begin = Instant::now();
    thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .iter()
            .map(|group| {
                scope.spawn(|| group.all_reduce(tag(), vec![vec![1f32; LEN]], ReduceOp::Sum).unwrap().wait())
            })
            .collect();
        for rank in ranks {
            assert!(rank.join().unwrap().unwrap().iter().all(|&sum| sum == 4.0));
        }
    });
    assert!(begin.elapsed() > 2 * TIMEOUT, "too fast to show anything: {:?}", begin.elapsed());
}

/// Says which rank is sent what.
struct Overheard(Sender<(Rank, Stage)>);

impl Transport for Overheard {
    fn send(&self, to: Rank, _: Lane, frame: Frame) {
        let _ = self.0.send((to, frame.header.stage));
    }

    fn abort(&self, _: &Farewell) {}

    fn leave(&self) -> Vec<Receiver<()>> {
        vec![]
    }
}

fn answer(group: &Group, from: u32, missing: Vec<(Rank, bool)>) {
    let bytes = inquiry::encode(&Answer { idle: Duration::ZERO, missing });
    let header =
        Header { source: Rank(from), stage: Stage::Waiting, total: 0, payload_len: bytes.len(), ..honest() };
    group.engine().handle_frame(Rank(from), header, Pool::default().copy(std::iter::once(&bytes[..])));
}

/// Rank 1 once waited for rank 2. By the time it hangs that is over, and rank 2 is not to blame.
#[test]
fn what_was_answered_in_an_earlier_round_accuses_nobody() {
    let (overheard, sent) = unbounded();
    let transport: Box<dyn Transport> = Box::new(Overheard(overheard));
    let engine = Engine::new(Rank(0), 3, Generation(0), TIMEOUT, Some(transport));
    let group = Group::over(engine, Placement::even(3, 3), Reduction::Exact, &[0, 1, 2]);
    let waits = start(&group);
    thread::scope(|scope| {
        let waiter = scope.spawn(|| waits.wait().unwrap_err());
        let mut asked = [false; 3];
        while !(asked[1] && asked[2]) {
            let (to, stage) = sent.recv_timeout(10 * TIMEOUT).unwrap();
            if stage == Stage::Ask {
                asked[to.index()] = true;
                answer(&group, to.0, vec![(Rank(2), false)]);
            }
        }
        let part = Pool::default().copy(std::iter::once(&[0u8; 8][..]));
        group.engine().handle_frame(Rank(2), Header { source: Rank(2), ..honest() }, part);
        let error = waiter.join().unwrap();
        let CollectiveError::TimedOut { missing, .. } = &error else { panic!("{error}") };
        assert_eq!(missing, &[Rank(1)], "{error}");
    });
}
