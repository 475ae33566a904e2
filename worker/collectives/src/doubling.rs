//! Everyone's small part to everyone in rounds, for worlds in which sending to each rank by itself takes too long.
//!
//! In round k this rank sends what it has, the parts of the `2^k` ranks from itself on, to the rank `2^k` before it,
//! and receives as much from the rank `2^k` behind it; the last round carries what is left. So any world of W ranks
//! needs `ceil(log2 W)` messages a rank. What is made of the parts then is the same as after a [`Gather`], so the bits
//! are.
//!
//! Bruck, Ho, Kipnis, Upfal, Weathersby, "Efficient algorithms for all-to-all communications in multiport
//! message-passing systems", 1997.
//!
//! [`Gather`]: crate::gather::Gather

use crate::buffer::Buffer;
use crate::engine::{Collective, Engine, Part, Publish};
use crate::error::CollectiveError;
use crate::frame::{Header, Stage};
use crate::gather::{Fail, Finish, SMALL_BYTES};
use crate::tag::Tag;
use crate::transport::Lane;
use bytes::Bytes;
use lockstep_common::ids::Rank;
use parking_lot::Mutex;

/// The largest world in which everyone sends to everyone. Handing a message to the network costs some 4 µs, and a
/// message takes some 50 µs to the next host. So directly it takes `4 (W - 1) + 50`, in rounds `54 ceil(log2 W)`:
/// 302 and 324 µs in a world of 64, 306 and 378 in one of 65, 558 and 378 in one of 128.
pub(crate) const DIRECT_RANKS: u32 = 64;

/// A gather in rounds, in flight.
pub(crate) struct Doubling {
    tag: Tag,
    signature: u8,
    rank: usize,
    mine: Bytes,
    /// Bytes of the parts of the ranks from this one up to, and without, the one at a distance.
    ends: Vec<usize>,
    fail: Fail,
    state: Mutex<State>,
}

struct State {
    /// What came, by round.
    received: Vec<Option<Bytes>>,
    launched: bool,
    /// Rounds for which there was not enough to send yet.
    unsent: Vec<usize>,
    /// Rounds on their way to the transport.
    sending: usize,
    finish: Option<Finish>,
}

impl Doubling {
    /// `mine` is this rank's part; `sizes` has the bytes of every rank's, and is the same on all of them.
    pub(crate) fn new(
        tag: Tag,
        signature: u8,
        rank: Rank,
        mine: Bytes,
        sizes: &[usize],
        finish: Finish,
        fail: Fail,
    ) -> Self {
        let rank = rank.index();
        let mut ends = vec![0];
        ends.extend(sizes[rank..].iter().chain(&sizes[..rank]).scan(0, |end, size| {
            *end += size;
            Some(*end)
        }));
        let rounds = rounds(sizes.len());
        let state = State {
            received: vec![None; rounds],
            launched: false,
            unsent: (0..rounds).collect(),
            sending: 0,
            finish: Some(finish),
        };
        Self { tag, signature, rank, mine, ends, fail, state: Mutex::new(state) }
    }

    fn world(&self) -> usize {
        self.ends.len() - 1
    }

    /// The rank at a distance behind this one.
    fn behind(&self, distance: usize) -> Rank {
        Rank(((self.rank + distance) % self.world()) as u32)
    }

    /// The bytes that a round brings here.
    fn due(&self, round: usize) -> usize {
        let first = 1 << round;
        self.ends[first + parts(self.world(), round)] - self.ends[first]
    }

    /// The header's `total`: all parts together. At least the number of rounds, which its `offset` counts.
    fn total(&self) -> u64 {
        self.ends[self.world()].max(rounds(self.world())) as u64
    }

    /// The round of a frame that is what this rank expects.
    fn check(&self, header: &Header) -> Result<usize, CollectiveError> {
        let rank = header.source;
        let mismatch = |detail| Err(CollectiveError::Mismatch { rank, tag: self.tag, detail });
        let protocol = |detail: String| {
            Err(CollectiveError::Protocol { rank, detail: format!("{detail} in {}", self.tag) })
        };
        if header.signature != self.signature {
            return mismatch("it runs another operation or element type under this tag".to_owned());
        }
        if header.total != self.total() {
            return mismatch(format!("all parts have {} bytes, expected {}", header.total, self.total()));
        }
        if header.stage != Stage::Contribution {
            return protocol("a result piece".to_owned());
        }
        let distance = (rank.index() + self.world() - self.rank) % self.world();
        if !distance.is_power_of_two() {
            return protocol("a part from a rank that sends this one none".to_owned());
        }
        let round = distance.ilog2() as usize;
        if header.offset != round as u64 {
            return protocol(format!("round {} where it has round {round}", header.offset));
        }
        if header.payload_len != self.due(round) {
            return protocol(format!(
                "{} bytes in round {round}, expected {}",
                header.payload_len,
                self.due(round)
            ));
        }
        Ok(round)
    }

    /// Sends every round for which enough is there. The result once all have been sent and received.
    fn proceed(&self, engine: &Engine) -> Option<Publish> {
        loop {
            let mut state = self.state.lock();
            // A peer that has this rank's part may be done and leave. Before the launch, what it sent may not have
            // been taken in yet.
            if !state.launched {
                return None;
            }
            let ready: Vec<_> =
                state.unsent.iter().filter_map(|&r| Some((r, self.outgoing(&state, r)?))).collect();
            if ready.is_empty() {
                return self.complete(&mut state);
            }
            state.unsent.retain(|round| ready.iter().all(|(sent, _)| sent != round));
            state.sending += ready.len();
            drop(state);
            let count = ready.len();
            for (round, payload) in ready {
                let part = Part {
                    tag: self.tag,
                    signature: self.signature,
                    stage: Stage::Contribution,
                    offset: round as u64,
                    total: self.total(),
                };
                let bytes = self.ends[parts(self.world(), round)];
                let lane = if bytes <= SMALL_BYTES { Lane::Small } else { Lane::Bulk };
                engine.send(self.behind(self.world() - (1 << round)), lane, part, payload);
            }
            self.state.lock().sending -= count;
        }
    }

    /// What goes out in a round, if all of it is there.
    fn outgoing(&self, state: &State, round: usize) -> Option<Vec<Bytes>> {
        let parts = parts(self.world(), round);
        let mut payload = vec![self.mine.clone()];
        for (earlier, received) in state.received.iter().enumerate().take(round) {
            let first = 1 << earlier;
            if first >= parts {
                break;
            }
            let bytes = self.ends[parts.min(2 * first)] - self.ends[first];
            payload.push(received.as_ref()?.slice(..bytes));
        }
        Some(payload)
    }

    /// What is left to do, once, when everything is here and has been sent on: whoever gets the result may leave.
    fn complete(&self, state: &mut State) -> Option<Publish> {
        if state.sending > 0 || !state.unsent.is_empty() {
            return None;
        }
        let received: Vec<Bytes> = state.received.iter().cloned().collect::<Option<_>>()?;
        let finish = state.finish.take()?;
        let part = |rank: usize| {
            let distance = (rank + self.world() - self.rank) % self.world();
            let Some(round) = distance.checked_ilog2() else { return self.mine.clone() };
            let start = self.ends[1 << round];
            received[round as usize].slice(self.ends[distance] - start..self.ends[distance + 1] - start)
        };
        let parts = (0..self.world()).map(part).collect();
        Some(Box::new(move || finish(parts)))
    }
}

impl Collective for Doubling {
    fn launch(&self, engine: &Engine) -> Result<Option<Publish>, CollectiveError> {
        self.state.lock().launched = true;
        Ok(self.proceed(engine))
    }

    fn handle_frame(
        &self,
        engine: &Engine,
        header: &Header,
        payload: Buffer,
    ) -> Result<Option<Publish>, CollectiveError> {
        let round = self.check(header)?;
        {
            let mut state = self.state.lock();
            let received = &mut state.received[round];
            if received.is_some() {
                let detail = format!("round {round} a second time in {}", self.tag);
                return Err(CollectiveError::Protocol { rank: header.source, detail });
            }
            *received = Some(payload.freeze());
        }
        Ok(self.proceed(engine))
    }

    fn fail(&self, error: &CollectiveError) {
        (self.fail)(error);
    }

    /// All whose message has not come, also of rounds for which the sender itself may lack something: asked, it says
    /// so. Each sends one message, so none has sent a part.
    fn missing(&self) -> Vec<(Rank, bool)> {
        let state = self.state.lock();
        let open = state.received.iter().enumerate().filter(|(_, received)| received.is_none());
        open.map(|(round, _)| (self.behind(1 << round), false)).collect()
    }

    fn describe(&self) -> (u8, u64) {
        (self.signature, self.mine.len() as u64)
    }
}

/// How many rounds bring everything to everyone in a world of `world` ranks.
fn rounds(world: usize) -> usize {
    world.next_power_of_two().ilog2() as usize
}

/// How many ranks' parts a message of `round` carries.
fn parts(world: usize, round: usize) -> usize {
    (1 << round).min(world - (1 << round))
}

/// The most that any message carries where the ranks have these amounts.
pub(crate) fn largest_message(amounts: &[usize]) -> usize {
    let world = amounts.len();
    let most = (0..rounds(world)).map(|round| parts(world, round)).max().unwrap_or(0);
    let from = |rank: usize| amounts.iter().cycle().skip(rank).take(most).sum();
    (0..world).map(from).max().unwrap_or(0)
}

#[cfg(test)]
mod tests;
