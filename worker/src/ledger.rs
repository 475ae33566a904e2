//! What a run has told, and what it may have to tell again, beside its weights.
//!
//! Only rank 0 reports. Should it die, or its connection, then another rank has to know which steps the coordinator has
//! not heard of, and whether what follows a step (evaluation, checkpoint) has been done. So every rank keeps account, and
//! the ranks of a new generation compare.

use lockstep_common::wire::{StepRecord, decode, encode};
use std::collections::{BTreeMap, VecDeque};

/// A rank's account.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Ledger {
    /// The last step after which everything that follows a step has been done; `None` from a rank that was not there.
    pub(crate) settled: Option<u64>,
    /// The newest figures of evaluations.
    pub(crate) metrics: BTreeMap<String, f64>,
    /// The steps that the coordinator has not been heard to know, in order.
    records: VecDeque<StepRecord>,
}

/// Records that are kept at most, and how many of their bytes are handed on at most. A coordinator that is away for longer
/// than this many steps, and then a rank 0 that dies, leave a gap in the job's figures.
const MAX_RECORDS: usize = 100_000;
const MAX_BYTES: usize = 16 << 20;

impl Ledger {
    /// The account of a run that starts at `step`, with all that precedes it done.
    pub(crate) fn starting_at(step: u64, metrics: BTreeMap<String, f64>) -> Self {
        Self { settled: Some(step), metrics, records: VecDeque::new() }
    }

    /// The same for a rank that was not there: what follows a step was for others to do.
    pub(crate) fn of_a_newcomer(self) -> Self {
        Self { settled: None, ..self }
    }

    /// The same without the steps, which others know better.
    pub(crate) fn without_records(self) -> Self {
        Self { records: VecDeque::new(), ..self }
    }

    /// A step is committed.
    pub(crate) fn note(&mut self, record: StepRecord) {
        if self.records.len() == MAX_RECORDS {
            self.records.pop_front();
        }
        self.records.push_back(record);
    }

    /// The coordinator knows the records up to `step`.
    pub(crate) fn heard(&mut self, step: u64) {
        /// Those kept all the same. A coordinator that has just given a generation up says that it has taken care of a
        /// report of it, and has not; that lasts until the ranks have heard of their end.
        const MARGIN: u64 = 256;
        let known = self.records.partition_point(|record| record.step + MARGIN <= step);
        self.records.drain(..known);
    }

    /// The steps that the coordinator may not know, in order.
    pub(crate) fn records(&self) -> impl Iterator<Item = &StepRecord> {
        self.records.iter()
    }

    /// For another rank.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut parts = Vec::new();
        let mut left = MAX_BYTES;
        for record in self.records.iter().rev() {
            // A record is far smaller than a message may be.
            let Ok(bytes) = encode(record) else { continue };
            let Some(rest) = left.checked_sub(bytes.len() + size_of::<u32>()) else { break };
            left = rest;
            parts.push(bytes);
        }
        let head = encode(&(self.settled, &self.metrics)).unwrap_or_default();
        let mut out = Vec::new();
        for part in std::iter::once(&head).chain(parts.iter().rev()) {
            out.extend_from_slice(&(part.len() as u32).to_le_bytes());
            out.extend_from_slice(part);
        }
        out
    }

    /// Another rank's account; `None` if these bytes are none.
    pub(crate) fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        let mut part = || -> Option<&[u8]> {
            let (length, rest) = bytes.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            bytes = rest;
            Some(part)
        };
        let (settled, metrics) = decode(part()?).ok()?;
        let mut records = VecDeque::new();
        while let Some(part) = part() {
            records.push_back(decode::<StepRecord>(part).ok()?);
        }
        let in_order = records.iter().zip(records.iter().skip(1)).all(|(a, b)| a.step < b.step);
        (bytes.is_empty() && in_order && records.len() <= MAX_RECORDS).then_some(Self {
            settled,
            metrics,
            records,
        })
    }

    /// What all ranks together know of a run that is at `step`. A step is settled when it is on all that were there.
    pub(crate) fn merged(all: &[Self], step: u64) -> Self {
        let there = || all.iter().filter(|ledger| ledger.settled.is_some());
        let newest = there().max_by_key(|ledger| ledger.settled).or(all.first());
        let records: BTreeMap<u64, &StepRecord> =
            all.iter().flat_map(Self::records).map(|record| (record.step, record)).collect();
        Self {
            settled: Some(there().filter_map(|ledger| ledger.settled).min().unwrap_or(0)),
            metrics: newest.map(|ledger| ledger.metrics.clone()).unwrap_or_default(),
            records: records.into_values().filter(|record| record.step <= step).cloned().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> StepRecord {
        let values = BTreeMap::from([("loss".to_owned(), step as f64)]);
        StepRecord {
            step,
            epoch: 1,
            total_steps: 9,
            samples: 8,
            seconds: 0.5,
            values,
            ..StepRecord::default()
        }
    }

    fn ledger(settled: Option<u64>, steps: std::ops::RangeInclusive<u64>) -> Ledger {
        let metrics = settled.map(|s| ("test_loss".to_owned(), s as f64)).into_iter().collect();
        Ledger { settled, metrics, records: steps.map(record).collect() }
    }

    fn steps(ledger: &Ledger) -> Vec<u64> {
        ledger.records().map(|r| r.step).collect()
    }

    #[test]
    fn an_account_survives_the_way_to_another_rank_and_other_bytes_are_none() {
        let original = ledger(Some(3), 2..=6);
        let bytes = original.to_bytes();
        assert_eq!(Ledger::from_bytes(&bytes), Some(original));
        for cut in 0..bytes.len() {
            assert_ne!(Ledger::from_bytes(&bytes[..cut]), Ledger::from_bytes(&bytes), "{cut}");
        }
        assert_eq!(Ledger::from_bytes(&[255; 40]), None);
        let mut twice = bytes.clone();
        twice.extend_from_slice(&bytes);
        assert_eq!(Ledger::from_bytes(&twice), None);
    }

    #[test]
    fn what_the_coordinator_has_heard_is_dropped() {
        let mut ledger = ledger(None, 2..=6);
        ledger.heard(257);
        assert_eq!(steps(&ledger), [2, 3, 4, 5, 6]);
        ledger.heard(260);
        ledger.note(record(7));
        assert_eq!(steps(&ledger), [5, 6, 7]);
        ledger.heard(1000);
        assert_eq!(steps(&ledger), [0; 0]);
    }

    #[test]
    fn the_ranks_together_know_every_record_and_settle_what_some_have_not() {
        let newcomer = ledger(None, 1..=0);
        let all = [newcomer.clone(), ledger(Some(7), 5..=7), ledger(Some(6), 3..=6)];
        let merged = Ledger::merged(&all, 7);
        assert_eq!((merged.settled, merged.metrics["test_loss"]), (Some(6), 7.0));
        assert_eq!(steps(&merged), [3, 4, 5, 6, 7]);
        // Nobody goes back beyond what the new generation starts from.
        assert_eq!(steps(&Ledger::merged(&all, 6)), [3, 4, 5, 6]);
        assert_eq!(Ledger::merged(&[newcomer.clone(), newcomer], 7).settled, Some(0));
    }
}
