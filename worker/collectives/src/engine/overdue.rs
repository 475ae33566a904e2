//! What happens to a collective that takes long: whom its waiters ask, and whom they accuse.

use super::{Engine, Part};
use crate::buffer::Buffer;
use crate::error::CollectiveError;
use crate::frame::Stage;
use crate::inquiry::{self, Answer, Inquiry};
use crate::tag::Tag;
use crate::transport::Lane;
use bytes::Bytes;
use lockstep_common::ids::Rank;
use std::time::{Duration, Instant};

/// The most questions of one peer that are answered in a second. A rank asks once in each round about each collective
/// that a thread of its waits for, and has a few tens of those.
const ANSWERS_PER_SECOND: u32 = 256;

/// How many questions a peer has asked of late.
#[derive(Clone, Copy)]
pub(super) struct Questions {
    since: Instant,
    count: u32,
}

impl Questions {
    pub(super) fn new(now: Instant) -> Self {
        Self { since: now, count: 0 }
    }

    /// Whether to answer one more.
    fn admit(&mut self, now: Instant) -> bool {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            *self = Self::new(now);
        }
        self.count += 1;
        self.count <= ANSWERS_PER_SECOND
    }
}

impl Engine {
    fn ask(&self, tag: Tag, ranks: Vec<Rank>) {
        for rank in ranks {
            self.send(rank, Lane::Small, Part::about(tag, Stage::Ask), vec![]);
        }
    }

    /// Tells `from` whom this rank waits for in `tag`, or for whose sake it has not entered it yet, and how long ago it
    /// last got on.
    pub(super) fn handle_question(&self, from: Rank, tag: Tag) {
        let now = Instant::now();
        let (entered, collective) = {
            let mut state = self.state.lock();
            if !state.peers[from.index()].questions.admit(now) {
                return;
            }
            let entry = state.in_flight.get(&tag);
            let oldest = || state.in_flight.values().min_by_key(|entry| entry.started);
            (entry.is_some(), entry.or_else(oldest).map(|entry| entry.collective.clone()))
        };
        let mut missing = collective.map(|collective| collective.missing()).unwrap_or_default();
        if !entered {
            missing.retain(|(rank, _)| *rank != from);
            if missing.is_empty() {
                missing.push((self.rank, false));
            }
        }
        let answer = Answer { idle: self.progress.idle(now), missing };
        let payload = vec![Bytes::from(inquiry::encode(&answer))];
        self.send(from, Lane::Small, Part::about(tag, Stage::Waiting), payload);
    }

    pub(super) fn handle_answer(&self, from: Rank, tag: Tag, payload: &Buffer) {
        let Answer { idle, missing } = inquiry::decode(payload, self.world);
        let now = Instant::now();
        let next = {
            let mut state = self.state.lock();
            let peer = &mut state.peers[from.index()];
            // A rank that gets on lives, whatever it is that takes it so long.
            peer.last_heard = now.checked_sub(idle).map_or(peer.last_heard, |at| at.max(peer.last_heard));
            state.inquiries.get_mut(&tag).map(|inquiry| inquiry.answered(from, missing))
        };
        self.ask(tag, next.unwrap_or_default());
    }

    /// Someone has waited long for `tag`. Ends the group if those who hold it up have been silent for as long as the
    /// time-out, after everyone had time to say whom they wait for; otherwise says how long to wait before calling this
    /// again.
    pub(crate) fn handle_overdue(&self, tag: Tag) -> Duration {
        let now = Instant::now();
        let error = {
            let mut state = self.state.lock();
            let super::State { in_flight, inquiries, peers, .. } = &mut *state;
            let Some(entry) = in_flight.get(&tag) else {
                return self.timeout;
            };
            let started = entry.started;
            let missing = entry.collective.missing();
            let silence = |rank: Rank| now - peers[rank.index()].last_heard.max(started).min(now);
            let inquiry =
                inquiries.entry(tag).or_insert_with(|| Inquiry::new(self.rank, now + self.timeout / 4));
            let ends = inquiry.conclude(missing.clone());
            let mut open = inquiry.ends().saturating_duration_since(now);
            let silent: Vec<_> =
                ends.iter().copied().filter(|&(rank, _)| silence(rank) >= self.timeout).collect();
            if open.is_zero() && silent.is_empty() {
                // What was said grows old: the next time all are asked anew.
                let longest = ends.iter().map(|&(rank, _)| silence(rank)).max().unwrap_or_default();
                let patience = (self.timeout * 3 / 4).saturating_sub(longest);
                if !patience.is_zero() {
                    inquiries.remove(&tag);
                    return patience;
                }
                open = self.timeout.saturating_sub(longest).max(self.timeout / 8);
                *inquiry = Inquiry::new(self.rank, now + open);
            }
            if !open.is_zero() {
                let ask = inquiry.ask(&missing);
                drop(state);
                self.ask(tag, ask);
                return open;
            }
            let entered = silent.iter().all(|&(_, entered)| entered);
            let missing = silent.iter().filter(|s| s.1 == entered).map(|s| s.0).collect();
            CollectiveError::TimedOut { tag, missing, entered, waited: now - started }
        };
        self.abort(error);
        self.timeout
    }
}
