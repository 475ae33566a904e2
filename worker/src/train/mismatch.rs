//! Replicas that are not the same: who is wrong, as far as that can be told.
//!
//! Every rank takes a [fingerprint](super::fingerprint) of its replica after an update (the *seal*), and another one after
//! the gradients of the next update have been computed from it, before that update is applied. The second one is exchanged,
//! with whether it is the first. So
//! - a replica that has changed between two updates is known by its own rank, even by a job's only one;
//! - replicas that updates have made different are told apart by their majority;
//! - gradients from a wrong replica are never applied: the others' state is that of an undisturbed run, and the odd one
//!   gets it from them.
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
    /// Equal for equal replicas.
    pub(crate) digest: Vec<u8>,
    /// Whether it is as its last update left it, as far as its rank knows.
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
    /// Those that have changed between two updates.
    changed: Vec<Rank>,
    /// Those that differ from more than half of the others; without such a majority, those that differ from the first.
    odd: Vec<Rank>,
    has_majority: bool,
    /// Whether some rank's state is that of an undisturbed run.
    has_truth: bool,
}

impl Mismatch {
    /// The verdict on `reports`, by rank, on replicas at `at`; `None` if they are intact and all the same. `is_guarded`:
    /// every update of this job is preceded by a comparison, so that nothing wrong has been applied.
    pub(crate) fn find(at: Position, reports: &[ReplicaReport], is_guarded: bool) -> Option<Self> {
        let ranks = || (0..).map(Rank).zip(reports);
        let changed: Vec<_> = ranks().filter(|(_, r)| !r.is_intact).map(|(rank, _)| rank).collect();
        let intact: Vec<_> = ranks().filter(|(_, r)| r.is_intact).collect();
        let same = |digest: &[u8]| intact.iter().filter(|(_, other)| other.digest == digest).count();
        let majority = intact.iter().find(|(_, report)| 2 * same(&report.digest) > intact.len());
        let reference = majority.or(intact.first()).map(|(_, report)| &report.digest);
        let odd: Vec<_> =
            intact.iter().filter(|(_, r)| Some(&r.digest) != reference).map(|(rank, _)| *rank).collect();
        let has_majority = majority.is_some();
        let has_truth = is_guarded && has_majority;
        (!odd.is_empty() || !changed.is_empty()).then_some(Self { at, changed, odd, has_majority, has_truth })
    }

    /// Whether this rank's replica is, or may be, at fault.
    pub(crate) fn is_odd(&self, rank: Rank) -> bool {
        self.changed.contains(&rank) || self.odd.contains(&rank)
    }

    /// Whether some rank's state is to be gone on from, by all.
    pub(crate) fn has_truth(&self) -> bool {
        self.has_truth
    }

    /// Whether this rank's state is to be gone on from.
    pub(crate) fn is_true(&self, rank: Rank) -> bool {
        self.has_truth && !self.is_odd(rank)
    }

    /// The rank to blame, if that can be told.
    pub(crate) fn culprit(&self) -> Option<Rank> {
        let odd = self.odd.first().filter(|_| self.has_majority);
        self.changed.first().or(odd).copied()
    }
}

/// The line for people; `peers` are all ranks.
pub(crate) fn describe(mismatch: &Mismatch, peers: &[Peer]) -> String {
    let name = |rank: &Rank| match peers.get(rank.index()) {
        Some(peer) => format!("{rank} ({} on {})", peer.worker, peer.host),
        None => rank.to_string(),
    };
    let names = |ranks: &[Rank]| ranks.iter().map(name).collect::<Vec<_>>().join(", ");
    let Mismatch { at, changed, odd, has_majority, has_truth } = mismatch;
    let mut parts = Vec::new();
    if !changed.is_empty() {
        parts.push(format!("after {at} {} {CHANGED_BY_ITSELF}", names(changed)));
    }
    if !odd.is_empty() && *has_majority {
        parts.push(format!(
            "after {at} {} held another state than most ranks: that host's memory or processor is at fault, or its libtorch \
             differs",
            names(odd)
        ));
    } else if let Some(first) =
        (0..).map(Rank).find(|rank| !mismatch.is_odd(*rank)).filter(|_| !odd.is_empty())
    {
        parts.push(format!(
            "after {at} {} held another state than {}, and it cannot be told who is right: a host's memory or processor is at \
             fault, or its libtorch differs",
            names(odd),
            name(&first)
        ));
    }
    let next = match has_truth {
        true => "the others' state is right, and goes on",
        false => "all go back to the newest checkpoint",
    };
    format!("{}; {next}", parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict on replicas whose digests are these letters; one that is not intact has a capital letter.
    fn find(digests: &str, is_guarded: bool) -> Option<Mismatch> {
        let reports: Vec<_> = digests
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
    fn verdict(digests: &str) -> Option<(Vec<u32>, Option<u32>, Vec<u32>)> {
        let found = find(digests, true)?;
        let ranks = |is: &dyn Fn(Rank) -> bool| (0..digests.len() as u32).filter(|r| is(Rank(*r))).collect();
        assert_eq!(found.has_truth(), (0..digests.len() as u32).any(|rank| found.is_true(Rank(rank))));
        Some((ranks(&|r| found.is_odd(r)), found.culprit().map(|r| r.0), ranks(&|r| found.is_true(r))))
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
    fn one_that_knows_of_its_change_is_at_fault_whatever_the_others_are() {
        assert_eq!(verdict("A"), Some((vec![0], Some(0), vec![])));
        assert_eq!(verdict("aB"), Some((vec![1], Some(1), vec![0])));
        assert_eq!(verdict("Ba"), Some((vec![0], Some(0), vec![1])));
        assert_eq!(verdict("BBa"), Some((vec![0, 1], Some(0), vec![2])));
        assert_eq!(verdict("aAa"), Some((vec![1], Some(1), vec![0, 2])));
        assert_eq!(verdict("aabC"), Some((vec![2, 3], Some(3), vec![0, 1])));
        assert_eq!(verdict("abC"), Some((vec![1, 2], Some(2), vec![])));
    }

    #[test]
    fn without_a_majority_those_that_differ_from_the_first_are_named_and_nobody_is_blamed() {
        assert_eq!(verdict("ab"), Some((vec![1], None, vec![])));
        assert_eq!(verdict("abba"), Some((vec![1, 2], None, vec![])));
        assert_eq!(verdict("abc"), Some((vec![1, 2], None, vec![])));
    }

    #[test]
    fn where_wrong_gradients_may_have_been_applied_nobody_is_right() {
        for digests in ["aab", "aB", "A"] {
            let found = find(digests, false).unwrap();
            assert!(!found.has_truth() && (0..3).all(|rank| !found.is_true(Rank(rank))), "{digests}");
            assert_eq!(found.culprit(), find(digests, true).unwrap().culprit());
        }
    }

    #[test]
    fn the_line_says_who_and_what_follows() {
        let line = |digests, is_guarded| describe(&find(digests, is_guarded).unwrap(), &[]);
        assert!(line("aba", true).starts_with("after step 7 rank 1 held another state than most ranks"));
        assert!(line("aba", true).ends_with("the others' state is right, and goes on"));
        assert!(line("aba", false).ends_with("all go back to the newest checkpoint"));
        assert!(line("aB", true).starts_with("after step 7 rank 1 found its state changed"));
        let tie = line("Cab", true);
        assert!(tie.contains("rank 0 found its state changed"), "{tie}");
        assert!(tie.contains("rank 2 held another state than rank 1, and it cannot be told"), "{tie}");
        assert!(tie.ends_with("all go back to the newest checkpoint"), "{tie}");
    }
}
