//! How much a rank has on its way to another: congestion control by delivery rate.
//!
//! Gradients come in bursts over links from memory-fast to transcontinental, some of which lose packets for reasons of
//! their own. The window follows the measured delivery rate and round trip, as in BBR (Cardwell et al., "BBR:
//! congestion-based congestion control", 2016), with two differences. A small standing queue is kept on purpose: it shows
//! at once, without cycles of probing, when the link gets faster, and it absorbs what keeps acknowledgements from coming,
//! which are late wake-ups on a busy host and the peer's own queue, behind which they wait. And loss counts only when it is
//! more than a bad link's own: then the queue is what overflows, and the window is squeezed.

use quinn::congestion::{Controller, ControllerFactory};
use quinn_proto::RttEstimator;
use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is sent before anything is known, in packets of 1200 bytes, and the least that is on its way later, unless much
/// is lost: about a quarter of a megabyte.
const INITIAL_WINDOW: u64 = 200 * 1200;

/// The least in any case, in packets: enough for acknowledgements to keep coming.
const LEAST_PACKETS: u64 = 16;

/// The queue that is kept: this part of a round trip...
const QUEUE_ROUND_TRIPS: f64 = 0.25;

/// ...and this long. Half of it goes to the peer's own queue where both send at full rate, and what is left is twice or
/// more what a thread waits for a core that others use too.
const QUEUE_TIME: Duration = Duration::from_millis(12);

/// The share of packets that a link may lose before the queue is taken to overflow: several times a bad link's 1%.
const TOLERATED_LOSS: f64 = 0.08;

/// What is left of the window after a round of more loss, the least it comes to, and what each good round gives back.
const SQUEEZE: f64 = 0.8;
const LEAST_SQUEEZE: f64 = 0.4;
const RELAX: f64 = 0.05;

/// How many rounds, and for how long at least, a measured rate counts.
const RATE_ROUNDS: u64 = 10;
const RATE_TIME: Duration = Duration::from_millis(200);

/// The start, which doubles the window in each round, ends when the window is this many times what the measured rate
/// fills: as long as the rate doubles as well, it is less than one and a half.
const START_EXCESS: f64 = 2.0;

/// How long the shortest round trip counts. Then the queue is drained for two round trips, to measure it anew.
const ROUND_TRIP_AGE: Duration = Duration::from_secs(10);

/// Makes a [`Pace`] per connection.
#[derive(Debug)]
pub(super) struct PaceConfig;

impl ControllerFactory for PaceConfig {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Pace::new(now, mtu))
    }
}

/// The shortest round trip that a connection has had lately.
pub(super) fn round_trip(connection: &quinn::Connection) -> Duration {
    let measured = connection.congestion_state().into_any().downcast::<Pace>();
    let shortest = measured.ok().and_then(|pace| pace.round_trip);
    // The estimate leaves out what the peer waits before it acknowledges a packet that comes alone.
    let estimate = connection.rtt();
    shortest.map_or(estimate, |shortest| shortest.min(estimate))
}

/// The state of one connection.
#[derive(Clone, Debug)]
struct Pace {
    mtu: u64,
    /// Bytes acknowledged so far, when the last were, and when the youngest packet among them was sent.
    delivered: u64,
    delivered_at: Instant,
    delivered_sent: Instant,
    /// What had been delivered when packets now on their way were sent.
    on_their_way: VecDeque<Sent>,
    /// The youngest packet of the acknowledgement being taken in.
    youngest: Option<Instant>,
    /// Measured rates in bytes a second that no later one has exceeded, the highest first.
    rates: VecDeque<Rate>,
    round_trip: Option<Duration>,
    round_trip_at: Instant,
    draining: Option<Drain>,
    /// The window while it still grows with every acknowledgement.
    start: Option<u64>,
    round: Round,
    squeeze: f64,
}

#[derive(Clone, Debug)]
struct Sent {
    at: Instant,
    delivered: u64,
    delivered_at: Instant,
    delivered_sent: Instant,
}

#[derive(Clone, Debug)]
struct Rate {
    rate: f64,
    round: u64,
    at: Instant,
}

#[derive(Clone, Debug)]
struct Drain {
    until: Instant,
    shortest: Option<Duration>,
}

/// From one packet's departure to its acknowledgement.
#[derive(Clone, Debug, Default)]
struct Round {
    number: u64,
    /// The round is over when what was sent after this much had been delivered is acknowledged.
    ends: u64,
    delivered: u64,
    lost: u64,
    marked: bool,
}

impl Pace {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            mtu: u64::from(mtu),
            delivered: 0,
            delivered_at: now,
            delivered_sent: now,
            on_their_way: VecDeque::new(),
            youngest: None,
            rates: VecDeque::new(),
            round_trip: None,
            round_trip_at: now,
            draining: None,
            start: Some(INITIAL_WINDOW),
            round: Round::default(),
            squeeze: 1.0,
        }
    }

    fn rate(&self) -> Option<f64> {
        self.rates.front().map(|best| best.rate)
    }

    /// The bytes that fill the link and the queue that is kept, as far as they are known.
    fn full_window(&self) -> f64 {
        let (Some(rate), Some(round_trip)) = (self.rate(), self.round_trip) else {
            return INITIAL_WINDOW as f64;
        };
        let time = round_trip.as_secs_f64() * (1.0 + QUEUE_ROUND_TRIPS) + QUEUE_TIME.as_secs_f64();
        (rate * time).max(INITIAL_WINDOW as f64)
    }

    fn handle_acked(&mut self, sent: Instant, bytes: u64, app_limited: bool) {
        self.delivered += bytes;
        self.round.delivered += bytes;
        self.youngest = self.youngest.max(Some(sent));
        if let Some(start) = &mut self.start
            && !app_limited
        {
            *start += bytes;
        }
    }

    fn measure_round_trip(&mut self, now: Instant, sample: Duration, app_limited: bool) {
        if let Some(drain) = &mut self.draining {
            drain.shortest = Some(drain.shortest.map_or(sample, |shortest| shortest.min(sample)));
            if now >= drain.until {
                self.round_trip = drain.shortest;
                self.round_trip_at = now;
                self.draining = None;
            }
        } else if self.round_trip.is_none_or(|shortest| sample <= shortest) {
            self.round_trip = Some(sample);
            self.round_trip_at = now;
        } else if !app_limited && now - self.round_trip_at > ROUND_TRIP_AGE {
            self.draining = Some(Drain { until: now + 2 * sample, shortest: None });
        }
    }

    fn measure_rate(&mut self, now: Instant, sent: &Sent, youngest: Instant, app_limited: bool) {
        // Acknowledgements that were held up come together, and packets too: the slower of both tells the rate.
        let interval = (now - sent.delivered_at).max(youngest - sent.delivered_sent.min(youngest));
        if interval.is_zero() || self.round_trip.is_some_and(|shortest| interval < shortest) {
            return;
        }
        let rate = (self.delivered - sent.delivered) as f64 / interval.as_secs_f64();
        // One that had nothing to send says only that the link is at least that fast.
        if app_limited && self.rate().is_some_and(|best| rate < best) {
            return;
        }
        self.rates.retain(|old| old.rate > rate);
        self.rates.push_back(Rate { rate, round: self.round.number, at: now });
        let (round, rates) = (self.round.number, &mut self.rates);
        while rates.len() > 1 && round - rates[0].round > RATE_ROUNDS && now - rates[0].at > RATE_TIME {
            rates.pop_front();
        }
    }

    fn end_round(&mut self, app_limited: bool) {
        let Round { delivered, lost, marked, .. } = self.round;
        let overflows = lost as f64 > TOLERATED_LOSS * (lost + delivered) as f64 && lost > 2 * self.mtu;
        if overflows || marked {
            self.squeeze = (self.squeeze * SQUEEZE).max(LEAST_SQUEEZE);
        } else {
            self.squeeze = (self.squeeze + RELAX).min(1.0);
        }
        let full = self.full_window();
        self.start = self.start.filter(|&start| !overflows && start as f64 <= START_EXCESS * full);
        // A measured rate must not grow old while there is nothing to send.
        let number = self.round.number + u64::from(!app_limited);
        self.round = Round { number, ends: self.delivered, ..Round::default() };
    }
}

impl Controller for Pace {
    fn on_sent(&mut self, now: Instant, _bytes: u64, _last_packet_number: u64) {
        if self.on_their_way.is_empty() {
            // The link was idle, which is not the time that the next delivery takes.
            self.delivered_at = now;
            self.delivered_sent = now;
        }
        if self.on_their_way.back().is_none_or(|last| last.at < now) {
            self.on_their_way.push_back(Sent {
                at: now,
                delivered: self.delivered,
                delivered_at: self.delivered_at,
                delivered_sent: self.delivered_sent,
            });
        }
    }

    fn on_ack(&mut self, _: Instant, sent: Instant, bytes: u64, app_limited: bool, _: &RttEstimator) {
        self.handle_acked(sent, bytes, app_limited);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, _: Option<u64>) {
        let Some(youngest) = self.youngest.take() else {
            return;
        };
        while self.on_their_way.len() > 1 && self.on_their_way[1].at <= youngest {
            self.on_their_way.pop_front();
        }
        if let Some(sent) = self.on_their_way.front().cloned() {
            self.measure_round_trip(now, now - youngest, app_limited);
            self.measure_rate(now, &sent, youngest, app_limited);
            if sent.delivered >= self.round.ends {
                self.end_round(app_limited);
            }
        }
        self.delivered_at = now;
        self.delivered_sent = self.delivered_sent.max(youngest);
        if in_flight == 0 {
            self.on_their_way.clear();
        }
    }

    fn on_congestion_event(&mut self, _: Instant, _: Instant, persistent: bool, lost_bytes: u64) {
        self.round.lost += lost_bytes;
        // quinn reports a router's mark as the loss of nothing.
        self.round.marked |= lost_bytes == 0;
        if persistent {
            self.squeeze = LEAST_SQUEEZE;
        }
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = u64::from(mtu);
    }

    fn window(&self) -> u64 {
        let least = LEAST_PACKETS * self.mtu;
        if let Some(start) = self.start {
            return start.max(least);
        }
        let full = self.full_window() * self.squeeze;
        let window = if self.draining.is_some() { full / 2.0 } else { full };
        (window as u64).max(least)
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(self.clone())
    }

    fn initial_window(&self) -> u64 {
        INITIAL_WINDOW
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MTU: u64 = 1200;
    const WIDE_AREA: Link = Link {
        rate: 25e6,
        round_trip: Duration::from_millis(40),
        queue: Duration::from_millis(50),
        loses: 100,
    };

    /// A link with a queue.
    struct Link {
        /// Bytes a second.
        rate: f64,
        round_trip: Duration,
        queue: Duration,
        /// Of so many packets one is lost.
        loses: u64,
    }

    /// Packets sent as quinn does: as many as the window allows, no faster than 5/4 of it in a round trip.
    struct Flow {
        now: Instant,
        pace: Pace,
        /// When the link is done with what it has, and when the next packet may leave.
        free: Instant,
        next: Instant,
        round_trip: Duration,
        in_flight: u64,
        packets: u64,
        /// When the sender hears of a packet, when that was sent, and whether it arrives.
        events: VecDeque<(Instant, Instant, bool)>,
        /// The share of the link's bytes that arrived, and of the packets that were lost.
        used: f64,
        lost: f64,
        longest_queue: Duration,
    }

    impl Flow {
        fn new(link: &Link) -> Self {
            let now = Instant::now();
            Self {
                now,
                pace: Pace::new(now, MTU as u16),
                free: now,
                next: now,
                round_trip: link.round_trip,
                in_flight: 0,
                packets: 0,
                events: VecDeque::new(),
                used: 0.0,
                lost: 0.0,
                longest_queue: Duration::ZERO,
            }
        }

        fn send(&mut self, link: &Link) {
            self.packets += 1;
            self.now = self.now.max(self.next);
            let waits = self.free.saturating_duration_since(self.now);
            let fits = waits <= link.queue;
            if fits {
                self.longest_queue = self.longest_queue.max(waits);
                self.free = self.now + waits + Duration::from_secs_f64(MTU as f64 / link.rate);
            }
            let arrives = fits && !self.packets.is_multiple_of(link.loses);
            self.pace.on_sent(self.now, MTU, self.packets);
            self.in_flight += MTU;
            self.events.push_back((self.free + link.round_trip, self.now, arrives));
            self.next = self.now + self.round_trip.mul_f64(MTU as f64 / (1.25 * self.pace.window() as f64));
        }

        /// Goes on over `link` for so many milliseconds.
        fn over(mut self, link: &Link, milliseconds: u64) -> Self {
            let time = Duration::from_millis(milliseconds);
            let end = self.now + time;
            let (mut arrived, mut lost) = (0u64, 0u64);
            self.longest_queue = Duration::ZERO;
            while self.now < end {
                let heard = self.events.front().map(|event| event.0);
                let allowed = self.in_flight + MTU <= self.pace.window();
                if allowed && heard.is_none_or(|at| self.next <= at) {
                    self.send(link);
                    continue;
                }
                let (at, sent, arrives) = self.events.pop_front().unwrap();
                self.now = self.now.max(at);
                self.in_flight -= MTU;
                if arrives {
                    arrived += 1;
                    self.round_trip = (self.round_trip * 7 + (self.now - sent)) / 8;
                    self.pace.handle_acked(sent, MTU, false);
                    self.pace.on_end_acks(self.now, self.in_flight, false, Some(self.packets));
                } else {
                    lost += 1;
                    self.pace.on_congestion_event(self.now, sent, false, MTU);
                }
            }
            self.used = (arrived * MTU) as f64 / (link.rate * time.as_secs_f64());
            self.lost = lost as f64 / (lost + arrived) as f64;
            self
        }
    }

    #[test]
    fn a_long_link_that_loses_packets_is_filled_from_the_start() {
        let flow = Flow::new(&WIDE_AREA).over(&WIDE_AREA, 1000);
        assert!(flow.used > 0.8, "{}", flow.used);
        let flow = flow.over(&WIDE_AREA, 4000);
        assert!(flow.used > 0.97, "{}", flow.used);
        assert!(flow.longest_queue < Duration::from_millis(25), "{:?}", flow.longest_queue);
    }

    #[test]
    fn a_queue_that_overflows_squeezes_the_window() {
        let link = Link { queue: Duration::from_millis(1), ..WIDE_AREA };
        let flow = Flow::new(&link).over(&link, 1000).over(&link, 4000);
        assert!(flow.used > 0.7, "{}", flow.used);
        assert!(flow.lost < 0.1, "{}", flow.lost);
    }

    #[test]
    fn a_link_that_changes_its_rate_is_followed() {
        let fast = Link { rate: 100e6, ..WIDE_AREA };
        let flow = Flow::new(&WIDE_AREA).over(&WIDE_AREA, 2000).over(&fast, 1500);
        let flow = flow.over(&fast, 1000);
        assert!(flow.used > 0.95, "{}", flow.used);
        let flow = flow.over(&WIDE_AREA, 2000).over(&WIDE_AREA, 1000);
        assert!(flow.used > 0.95, "{}", flow.used);
        assert!(flow.longest_queue < Duration::from_millis(25), "{:?}", flow.longest_queue);
    }

    #[test]
    fn a_short_link_gets_a_queue_of_milliseconds() {
        let link = Link { rate: 125e6, round_trip: Duration::from_micros(100), ..WIDE_AREA };
        let flow = Flow::new(&link).over(&link, 500).over(&link, 500);
        assert!(flow.used > 0.98, "{}", flow.used);
        assert!(flow.longest_queue < Duration::from_millis(16), "{:?}", flow.longest_queue);
    }
}
