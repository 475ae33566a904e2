//! The flight record: what became of a rank's last collectives. Always on.
//!
//! Entering and leaving a collective each cost a few tens of nanoseconds and no allocation
//! (`cargo test --release -p lockstep-collectives -- --ignored recording --nocapture` measures it).

use crate::error::CollectiveError;
use crate::formats::Block8;
use crate::group::{BROADCAST, GATHER, GATHER_TO};
use crate::op::{Element, ReduceOp};
use crate::tag::Tag;
use lockstep_common::ids::Rank;
use parking_lot::Mutex;
use std::time::{Duration, Instant};

/// How many collectives are remembered: some steps of a network with tens of buckets and batch norms.
const ENTRIES: usize = 256;

/// One rank's collectives, as far as they are remembered.
#[derive(Clone, Debug)]
pub struct FlightSnapshot {
    /// In flight, the one entered first first. When the group has failed, what was in flight then.
    pub in_flight: Vec<Waiting>,
    /// Ended, the newest first.
    pub last: Vec<Past>,
    /// How long ago this rank got on: entered or ended a collective, took in a part of one, or computed.
    pub idle: Duration,
    /// The first cause of the group's end, if it has failed.
    pub failure: Option<CollectiveError>,
}

/// A collective in flight.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// Its name.
    pub tag: Tag,
    /// Operation and element type, such as `sum of f32`.
    pub signature: String,
    /// Bytes of this rank's part.
    pub bytes: u64,
    /// How long ago this rank entered it; when the group has failed, how long before that.
    pub waited: Duration,
    /// The ranks whose part is missing, and whether they have sent a first piece of it.
    pub missing: Vec<(Rank, bool)>,
}

/// A collective that has ended.
#[derive(Clone, Debug)]
pub struct Past {
    /// Its name.
    pub tag: Tag,
    /// Operation and element type, such as `sum of f32`.
    pub signature: String,
    /// Bytes of this rank's part.
    pub bytes: u64,
    /// From this rank's entering it to its end.
    pub took: Duration,
    /// How long ago it ended.
    pub ago: Duration,
    /// Whether it ended with a result, not with the group.
    pub completed: bool,
}

/// What is known of a collective when it is entered.
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    pub(crate) tag: Tag,
    pub(crate) signature: u8,
    pub(crate) bytes: u64,
    pub(crate) entered: Instant,
}

/// An entry's place in the record.
#[derive(Clone, Copy)]
pub(crate) struct Ticket(u64);

/// The record.
pub(crate) struct Flight(Mutex<Record>);

struct Record {
    /// A ring: the collective with ticket n is at n modulo its length.
    lines: Vec<Line>,
    entered: u64,
    ended: u64,
    /// What was in flight when the group failed.
    failed: Option<Vec<Waiting>>,
}

struct Line {
    ticket: u64,
    entry: Entry,
    end: End,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    InFlight,
    Completed(Instant),
    Failed(Instant),
}

impl Flight {
    /// An empty record, with all the memory that it will ever need.
    pub(crate) fn new() -> Self {
        let record = Record { lines: Vec::with_capacity(ENTRIES), entered: 0, ended: 0, failed: None };
        Self(Mutex::new(record))
    }

    /// This rank enters a collective.
    pub(crate) fn enter(&self, entry: Entry) -> Ticket {
        let mut record = self.0.lock();
        let ticket = record.entered;
        record.entered += 1;
        let line = Line { ticket, entry, end: End::InFlight };
        let place = ticket as usize % ENTRIES;
        match record.lines.get_mut(place) {
            Some(old) => *old = line,
            None => record.lines.push(line),
        }
        Ticket(ticket)
    }

    /// A collective has its result.
    pub(crate) fn complete(&self, Ticket(ticket): Ticket, at: Instant) {
        let mut record = self.0.lock();
        record.ended += 1;
        // One that took longer than the record reaches back has been overwritten.
        if let Some(line) = record.lines.get_mut(ticket as usize % ENTRIES).filter(|l| l.ticket == ticket) {
            line.end = End::Completed(at);
        }
    }

    /// The group fails while these are in flight.
    pub(crate) fn fail(&self, in_flight: Vec<Waiting>) {
        let now = Instant::now();
        let mut record = self.0.lock();
        record.failed = Some(in_flight);
        for line in record.lines.iter_mut().filter(|l| l.end == End::InFlight) {
            line.end = End::Failed(now);
        }
    }

    /// How many times a collective was entered or ended.
    pub(crate) fn events(&self) -> u64 {
        let record = self.0.lock();
        record.entered + record.ended
    }

    /// The collective that was completed last.
    pub(crate) fn newest(&self) -> Option<Tag> {
        let record = self.0.lock();
        let completed = record.lines.iter().filter_map(|line| match line.end {
            End::Completed(at) => Some((at, line.ticket, line.entry.tag)),
            End::InFlight | End::Failed(_) => None,
        });
        completed.max_by_key(|&(at, ticket, _)| (at, ticket)).map(|(_, _, tag)| tag)
    }

    /// The record, with what the engine knows of those `in_flight`.
    pub(crate) fn snapshot(
        &self,
        in_flight: Vec<Waiting>,
        idle: Duration,
        failure: Option<CollectiveError>,
    ) -> FlightSnapshot {
        let now = Instant::now();
        let record = self.0.lock();
        let mut in_flight = record.failed.clone().unwrap_or(in_flight);
        in_flight.sort_by_key(|waiting| std::cmp::Reverse(waiting.waited));
        let mut last: Vec<_> = record.lines.iter().filter_map(|line| line.past(now)).collect();
        last.sort_by_key(|past| past.ago);
        FlightSnapshot { in_flight, last, idle, failure }
    }
}

impl Line {
    fn past(&self, now: Instant) -> Option<Past> {
        let (at, completed) = match self.end {
            End::InFlight => return None,
            End::Completed(at) => (at, true),
            End::Failed(at) => (at, false),
        };
        let Entry { tag, signature, bytes, entered } = self.entry;
        let (took, ago) = (at.saturating_duration_since(entered), now.saturating_duration_since(at));
        Some(Past { tag, signature: words(signature), bytes, took, ago, completed })
    }
}

impl Waiting {
    /// One that is in flight now.
    pub(crate) fn new(entry: Entry, missing: Vec<(Rank, bool)>) -> Self {
        let Entry { tag, signature, bytes, entered } = entry;
        Self { tag, signature: words(signature), bytes, waited: entered.elapsed(), missing }
    }
}

/// A signature in words.
fn words(signature: u8) -> String {
    match signature {
        GATHER | GATHER_TO => "gather".to_owned(),
        BROADCAST => "broadcast".to_owned(),
        _ => {
            let element = match signature & 0xf {
                <f32 as Element>::CODE => <f32 as Element>::NAME,
                <f64 as Element>::CODE => <f64 as Element>::NAME,
                <i64 as Element>::CODE => <i64 as Element>::NAME,
                <half::bf16 as Element>::CODE => <half::bf16 as Element>::NAME,
                <half::f16 as Element>::CODE => <half::f16 as Element>::NAME,
                <Block8 as Element>::CODE => <Block8 as Element>::NAME,
                _ => "an unknown type",
            };
            format!("{} of {element}", ReduceOp::word(signature >> 4))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tag::TagKind;

    fn entry(index: u32) -> Entry {
        let tag = Tag::new(7, 0, TagKind::Gradient).index(index);
        Entry { tag, signature: 1, bytes: 8, entered: Instant::now() }
    }

    fn indices(past: &[Past]) -> Vec<u32> {
        past.iter().map(|p| p.tag.index).collect()
    }

    #[test]
    fn the_last_collectives_are_remembered_the_newest_first() {
        let flight = Flight::new();
        assert_eq!(flight.newest(), None);
        let slow = flight.enter(entry(9999));
        let pair = [flight.enter(entry(0)), flight.enter(entry(1))];
        assert!(flight.snapshot(vec![], Duration::ZERO, None).last.is_empty());
        pair.into_iter().rev().for_each(|ticket| flight.complete(ticket, Instant::now()));
        assert_eq!(indices(&flight.snapshot(vec![], Duration::ZERO, None).last), [0, 1]);
        for index in 2..1000 {
            let ticket = flight.enter(entry(index));
            flight.complete(ticket, Instant::now());
        }
        let capacity = flight.0.lock().lines.capacity();
        assert_eq!(capacity, ENTRIES);
        // Its place has been taken: it must not mark another one.
        let taken = flight.enter(entry(1000));
        flight.complete(slow, Instant::now());
        let last = flight.snapshot(vec![], Duration::ZERO, None).last;
        assert_eq!(flight.newest(), Some(entry(999).tag));
        assert_eq!(indices(&last), (745..1000).rev().collect::<Vec<_>>());
        assert_eq!((last[0].signature.as_str(), last[0].bytes, last[0].completed), ("sum of f32", 8, true));
        assert_eq!(flight.events(), 2003);
        flight.complete(taken, Instant::now());
        assert_eq!(flight.snapshot(vec![], Duration::ZERO, None).last[0].tag.index, 1000);
    }

    #[test]
    fn a_failure_keeps_what_was_in_flight() {
        let flight = Flight::new();
        let done = flight.enter(entry(0));
        flight.complete(done, Instant::now());
        let open = entry(1);
        flight.enter(open);
        flight.fail(vec![Waiting::new(open, vec![(Rank(2), false)])]);
        let cause = CollectiveError::Aborted("over".to_owned());
        let snapshot = flight.snapshot(vec![], Duration::ZERO, Some(cause.clone()));
        assert_eq!(snapshot.failure, Some(cause));
        assert_eq!(snapshot.in_flight[0].missing, [(Rank(2), false)]);
        let ends: Vec<_> = snapshot.last.iter().map(|p| (p.tag.index, p.completed)).collect();
        assert_eq!(ends, [(1, false), (0, true)]);
    }

    #[test]
    fn signatures_have_words() {
        assert_eq!(
            [0x01, 0x12, 0x03, GATHER, BROADCAST].map(words),
            ["sum of f32", "moments of f64", "sum of i64", "gather", "broadcast"]
        );
    }

    #[test]
    #[ignore = "a measurement"]
    fn recording_costs_less_than_100_ns() {
        const COUNT: u32 = 1_000_000;
        let flight = Flight::new();
        let open = entry(0);
        let start = Instant::now();
        for _ in 0..COUNT {
            let ticket = flight.enter(open);
            flight.complete(ticket, start);
        }
        let each = start.elapsed() / (2 * COUNT);
        println!("{} ns an event", each.as_nanos());
        assert!(each < Duration::from_nanos(100));
    }
}
