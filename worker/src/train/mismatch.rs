//! Replicas that are not the same: who is wrong, as far as that can be told.
//!
//! Every rank notes what an update has left of its replica (the *seal*) and, when the gradients of the next update have been
//! computed from it and before that is applied, sees whether it still is that. Fingerprints of the seals are exchanged, with
//! whether they hold. So
//! - a replica that has changed between two updates is known by its own rank, even by a job's only one;
//! - replicas that updates have made different are told apart by the majority of the seals;
//! - gradients from a wrong replica are never applied: the state of a rank whose seal is that of most and holds is that of an
//!   undisturbed run, and the others get it from there.
//!
//! A job that compares less often than in every phase may have applied such gradients; then all give up their state for the
//! newest checkpoint, before which all replicas were seen to be the same. All ranks decide by the same rule from the same
//! reports, so all come to the same.

use lockstep_common::ids::Rank;
use lockstep_common::wire::{Peer, Position};

/// What is said of a rank whose replica has changed between two updates.
pub(crate) const CHANGED_BY_ITSELF: &str =
    "found its state changed though nothing had written to it (that host's memory is at fault)";

/// What a rank says of its replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReplicaReport {
    /// Equal for replicas that the last update has left equal.
    pub(crate) digest: Vec<u8>,
    /// Whether it is still as that update left it, as far as its rank knows.
    pub(crate) is_intact: bool,
}

impl ReplicaReport {
    pub(crate) fn into_bytes(mut self) -> Vec<u8> {
        self.digest.push(u8::from(self.is_intact));
        self.digest
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let (is_intact, digest) =
            bytes.split_last().map_or((false, bytes), |(last, rest)| (*last == 1, rest));
        Self { digest: digest.to_vec(), is_intact }
    }
}

/// Some replicas differ from what they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// Where the replicas were.
    at: Position,
    /// Those that have changed by themselves.
    changed: Vec<Rank>,
    /// Those that updates have made other than more than half of all; without such a majority, other than the first.
    odd: Vec<Rank>,
    /// The others.
    same: Vec<Rank>,
    has_majority: bool,
    /// Those whose state is that of an undisturbed run.
    right: Vec<Rank>,
}

impl Mismatch {
    /// The verdict on `reports`, by rank, on replicas at `at`; `None` if they are intact and all the same. `is_guarded`:
    /// every update of this job is preceded by a comparison, so that nothing wrong has been applied.
    pub(crate) fn find(at: Position, reports: &[ReplicaReport], is_guarded: bool) -> Option<Self> {
        let count = |digest: &[u8]| reports.iter().filter(|other| other.digest == digest).count();
        let majority = reports.iter().find(|report| 2 * count(&report.digest) > reports.len());
        let reference = &majority.or(reports.first())?.digest;
        let has_majority = majority.is_some();
        let ranks = |is: &dyn Fn(&ReplicaReport) -> bool| -> Vec<_> {
            (0..).map(Rank).zip(reports).filter(|(_, report)| is(report)).map(|(rank, _)| rank).collect()
        };
        let changed = ranks(&|report| !report.is_intact);
        let odd = ranks(&|report| report.digest != *reference);
        let same = ranks(&|report| report.digest == *reference);
        let right = ranks(&|r| is_guarded && has_majority && r.is_intact && r.digest == *reference);
        (!odd.is_empty() || !changed.is_empty()).then_some(Self {
            at,
            changed,
            odd,
            same,
            has_majority,
            right,
        })
    }

    /// Whether this rank's replica is known to be at fault.
    pub(crate) fn is_at_fault(&self, rank: Rank) -> bool {
        self.changed.contains(&rank) || self.has_majority && self.odd.contains(&rank)
    }

    /// Whether some rank's state is to be gone on from, by all.
    pub(crate) fn has_truth(&self) -> bool {
        !self.right.is_empty()
    }

    /// Whether this rank's state is to be gone on from.
    pub(crate) fn is_right(&self, rank: Rank) -> bool {
        self.right.contains(&rank)
    }

    /// The rank to blame, if that can be told.
    pub(crate) fn culprit(&self) -> Option<Rank> {
        let odd = self.odd.first().filter(|_| self.has_majority);
        self.changed.first().or(odd).copied()
    }
}

/// The line for people: who, where, why; `peers` are all ranks.
pub(crate) fn describe(mismatch: &Mismatch, peers: &[Peer]) -> String {
    let name = |rank: &Rank| match peers.get(rank.index()) {
        Some(peer) => format!("{rank} ({} on {})", peer.worker, peer.host),
        None => rank.to_string(),
    };
    let names = |ranks: &[Rank]| ranks.iter().map(name).collect::<Vec<_>>().join(", ");
    let Mismatch { at, changed, odd, same, has_majority, .. } = mismatch;
    let mut parts = Vec::new();
    if !changed.is_empty() {
        parts.push(format!("{} {CHANGED_BY_ITSELF}", names(changed)));
    }
    if !odd.is_empty() && *has_majority {
        parts.push(format!(
            "{} held another state than most ranks: that host's memory or processor is at fault, or its libtorch differs",
            names(odd)
        ));
    } else if !odd.is_empty() {
        parts.push(format!(
            "{} held another state than {}, and it cannot be told who is right: a host's memory or processor is at fault, or \
             its libtorch differs",
            names(odd),
            names(same)
        ));
    }
    format!("after {at} {}", parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict on replicas whose seals are these letters; one that does not hold is a capital letter.
    fn find(seals: &str, is_guarded: bool) -> Option<Mismatch> {
        let reports: Vec<_> = seals
            .bytes()
            .map(|b| ReplicaReport {
                digest: vec![b.to_ascii_lowercase()],
                is_intact: b.is_ascii_lowercase(),
            })
            .collect();
        let again: Vec<_> =
            reports.iter().map(|r| ReplicaReport::from_bytes(&r.clone().into_bytes())).collect();
        assert_eq!(again, reports);
        Mismatch::find(Position::at(7), &reports, is_guarded)
    }

    /// The ranks at fault, the one to blame, and those whose state is to be gone on from.
    fn verdict(seals: &str) -> Option<(Vec<u32>, Option<u32>, Vec<u32>)> {
        let found = find(seals, true)?;
        let ranks = |is: &dyn Fn(Rank) -> bool| (0..seals.len() as u32).filter(|r| is(Rank(*r))).collect();
        let right: Vec<u32> = ranks(&|r| found.is_right(r));
        assert_eq!(found.has_truth(), !right.is_empty());
        Some((ranks(&|r| found.is_at_fault(r)), found.culprit().map(|r| r.0), right))
    }

    #[test]
    fn the_majority_names_the_odd_ranks_whoever_they_are() {
        for same in ["a", "aa", "aaaa"] {
            assert_eq!(verdict(same), None);
        }
        assert_eq!(verdict("aab"), Some((vec![2], Some(2), vec![0, 1])));
        assert_eq!(verdict("baa"), Some((vec![0], Some(0), vec![1, 2])));
        assert_eq!(verdict("abaca"), Some((vec![1, 3], Some(1), vec![0, 2, 4])));
        assert_eq!(verdict("babbab"), Some((vec![1, 4], Some(1), vec![0, 2, 3, 5])));
    }

    #[test]
    fn one_whose_seal_does_not_hold_is_at_fault_and_its_seal_bears_the_others_out() {
        assert_eq!(verdict("A"), Some((vec![0], Some(0), vec![])));
        assert_eq!(verdict("aA"), Some((vec![1], Some(1), vec![0])));
        assert_eq!(verdict("Aa"), Some((vec![0], Some(0), vec![1])));
        assert_eq!(verdict("AAa"), Some((vec![0, 1], Some(0), vec![2])));
        assert_eq!(verdict("aAb"), Some((vec![1, 2], Some(1), vec![0])));
        assert_eq!(verdict("aabC"), Some((vec![3], Some(3), vec![])), "two of four are no majority");
    }

    /// What only one rank says for itself is no truth: its update may have come to something wrong.
    #[test]
    fn nobody_is_right_for_want_of_others() {
        assert_eq!(verdict("aB"), Some((vec![1], Some(1), vec![])));
        assert_eq!(verdict("Ba"), Some((vec![0], Some(0), vec![])));
        assert_eq!(verdict("BBa"), Some((vec![0, 1, 2], Some(0), vec![])));
        assert_eq!(verdict("abC"), Some((vec![2], Some(2), vec![])));
    }

    #[test]
    fn without_a_majority_those_that_differ_from_the_first_are_named_and_nobody_is_blamed() {
        assert_eq!(verdict("ab"), Some((vec![], None, vec![])));
        assert_eq!(verdict("abba"), Some((vec![], None, vec![])));
        assert_eq!(verdict("abc"), Some((vec![], None, vec![])));
    }

    #[test]
    fn where_wrong_gradients_may_have_been_applied_nobody_is_right() {
        for seals in ["aab", "aA", "A"] {
            let found = find(seals, false).unwrap();
            assert!(!found.has_truth() && (0..3).all(|rank| !found.is_right(Rank(rank))), "{seals}");
            assert_eq!(found.culprit(), find(seals, true).unwrap().culprit());
        }
    }

    #[test]
    fn the_line_says_where_and_who() {
        let line = |seals| describe(&find(seals, true).unwrap(), &[]);
        assert!(line("aba").starts_with("after step 7 rank 1 held another state than most ranks"));
        assert!(line("aA").starts_with("after step 7 rank 1 found its state changed"));
        assert!(
            line("ab")
                .starts_with("after step 7 rank 1 held another state than rank 0, and it cannot be told")
        );
        let both = line("Cab");
        assert!(both.starts_with("after step 7 rank 0 found its state changed"), "{both}");
        assert!(
            both.contains("rank 1, rank 2 held another state than rank 0, and it cannot be told"),
            "{both}"
        );
    }
}
