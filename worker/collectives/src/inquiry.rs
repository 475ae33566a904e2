//! Finding out whom everybody waits for.
//!
//! A rank may lack the part of one that itself waits for a third: the leader of a host for another host, say, or a
//! rank that is held up in an earlier collective. Before it accuses anybody, a rank that has waited for long asks those
//! whose parts it lacks whom they wait for, and those they name, until the answers end with ranks that have not entered,
//! or that wait for nobody, or that do not answer.

use crate::buffer::Buffer;
use lockstep_common::ids::Rank;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

/// Ranks whose part is missing, and whether they have entered the collective.
pub(crate) type Missing = Vec<(Rank, bool)>;

/// What a rank says that is asked about a collective.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    /// How long ago it last got on.
    pub(crate) idle: Duration,
    /// Whom it waits for.
    pub(crate) missing: Missing,
}

/// What the others said of one collective in one round of questions.
#[derive(Debug)]
pub(crate) struct Inquiry {
    own: Rank,
    ends: Instant,
    asked: HashSet<Rank>,
    answers: HashMap<Rank, Missing>,
}

impl Inquiry {
    /// One by the rank `own`, which asks everyone but itself, for answers that come before it `ends`.
    pub(crate) fn new(own: Rank, ends: Instant) -> Self {
        Self { own, ends, asked: HashSet::from([own]), answers: HashMap::new() }
    }

    /// Until when answers are awaited.
    pub(crate) fn ends(&self) -> Instant {
        self.ends
    }

    /// Those among `missing` to ask now.
    pub(crate) fn ask(&mut self, missing: &Missing) -> Vec<Rank> {
        missing.iter().map(|(rank, _)| *rank).filter(|rank| self.asked.insert(*rank)).collect()
    }

    /// `from` waits for `missing`. Those to ask next.
    pub(crate) fn answered(&mut self, from: Rank, missing: Missing) -> Vec<Rank> {
        if !self.asked.contains(&from) {
            return vec![];
        }
        let next = self.ask(&missing);
        self.answers.insert(from, missing);
        next
    }

    /// The ranks at the ends of the answers, for one that lacks the parts of `missing`.
    pub(crate) fn conclude(&self, missing: Missing) -> Missing {
        // Who waits for this rank waits for those it waits for, and is no end.
        let mut seen = HashSet::from([self.own]);
        let mut ends = Missing::new();
        let mut open = missing.clone();
        while let Some((rank, entered)) = open.pop() {
            if !seen.insert(rank) {
                continue;
            }
            match self.answers.get(&rank).map(Vec::as_slice) {
                // What is known at first hand of whether it has entered goes before what others say.
                None => ends.push(*missing.iter().find(|known| known.0 == rank).unwrap_or(&(rank, entered))),
                Some([]) => ends.push((rank, true)),
                // So says one that has not entered.
                Some(next) if next.contains(&(rank, false)) => ends.push((rank, false)),
                Some(next) => open.extend(next),
            }
        }
        ends.sort_unstable();
        // Ranks that all wait for each other leave no end: then what is known at first hand counts.
        if ends.is_empty() { missing } else { ends }
    }
}

/// An answer, as it travels.
pub(crate) fn encode(answer: &Answer) -> Vec<u8> {
    let word = |(rank, entered): &(Rank, bool)| u64::from(rank.0) << 1 | u64::from(*entered);
    let idle_ms = answer.idle.as_millis() as u64;
    std::iter::once(idle_ms).chain(answer.missing.iter().map(word)).flat_map(u64::to_le_bytes).collect()
}

/// The answer in `payload`; ranks outside a world of `world` are left out, and repetitions beyond its size.
pub(crate) fn decode(payload: &Buffer, world: u32) -> Answer {
    let missing = |word: &u64| (Rank((word >> 1) as u32), word & 1 == 1);
    let (idle_ms, words) = payload.elements().split_first().unwrap_or((&u64::MAX, &[]));
    let missing = words.iter().map(missing).filter(|(rank, _)| rank.0 < world).take(world as usize);
    Answer { idle: Duration::from_millis(*idle_ms), missing: missing.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answers_lead_to_the_rank_that_has_not_entered() {
        let mut inquiry = Inquiry::new(Rank(1), Instant::now());
        let missing = vec![(Rank(0), true)];
        assert_eq!(inquiry.ask(&missing), [Rank(0)]);
        assert_eq!(inquiry.answered(Rank(0), vec![(Rank(2), true)]), [Rank(2)]);
        assert_eq!(inquiry.conclude(missing.clone()), [(Rank(2), true)]);
        assert_eq!(inquiry.answered(Rank(2), vec![(Rank(3), false), (Rank(0), true)]), [Rank(3)]);
        assert_eq!(inquiry.conclude(missing.clone()), [(Rank(3), false)]);
        inquiry.answered(Rank(3), vec![(Rank(3), false)]);
        assert_eq!(inquiry.conclude(missing.clone()), [(Rank(3), false)]);
        inquiry.answered(Rank(3), vec![]);
        assert_eq!(inquiry.conclude(missing), [(Rank(3), true)]);
    }

    #[test]
    fn a_silent_rank_that_holds_up_another_one_has_not_entered() {
        let mut inquiry = Inquiry::new(Rank(3), Instant::now());
        let missing = vec![(Rank(0), false), (Rank(1), false)];
        inquiry.ask(&missing);
        // It stopped in an earlier collective, of which rank 1 has a part.
        inquiry.answered(Rank(1), vec![(Rank(0), true)]);
        assert_eq!(inquiry.conclude(missing), [(Rank(0), false)]);
    }

    #[test]
    fn without_an_end_the_first_hand_counts() {
        let mut inquiry = Inquiry::new(Rank(2), Instant::now());
        let missing = vec![(Rank(0), true)];
        inquiry.ask(&missing);
        inquiry.answered(Rank(0), vec![(Rank(1), true)]);
        inquiry.answered(Rank(1), vec![(Rank(0), true)]);
        assert_eq!(inquiry.conclude(missing.clone()), missing);
        assert_eq!(inquiry.answered(Rank(7), vec![(Rank(6), false)]), []);
    }

    #[test]
    fn who_waits_only_for_the_asker_is_not_accused() {
        let mut inquiry = Inquiry::new(Rank(0), Instant::now());
        let missing = vec![(Rank(1), false), (Rank(2), false)];
        assert_eq!(inquiry.ask(&missing), [Rank(1), Rank(2)]);
        assert_eq!(inquiry.answered(Rank(1), vec![(Rank(0), false)]), []);
        assert_eq!(inquiry.answered(Rank(2), vec![(Rank(2), false)]), []);
        assert_eq!(inquiry.conclude(missing), [(Rank(2), false)]);
    }

    #[test]
    fn an_answer_survives_the_wire() {
        let idle = Duration::from_millis(70);
        let answer = Answer { idle, missing: vec![(Rank(0), true), (Rank(3), false)] };
        let buffer = crate::buffer::Pool::default().copy(std::iter::once(&encode(&answer)[..]));
        assert_eq!(decode(&buffer, 4), answer);
        assert_eq!(decode(&buffer, 3), Answer { idle, missing: vec![(Rank(0), true)] });
        let nothing = decode(&crate::buffer::Pool::default().take(0), 4);
        assert!(nothing.missing.is_empty() && nothing.idle > Duration::from_secs(1 << 40));
    }
}
