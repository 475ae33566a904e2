//! Replicas that are not the same: who is wrong, as far as that can be told.
//!
//! All ranks decide it by the same rule from the same digests, so all come to the same.
//!
//! The odd one has computed gradients from its wrong weights since some step after the last comparison, and all others
//! have applied them. So nobody's state is that of an undisturbed run, and all give theirs up for the newest checkpoint,
//! before which all replicas were seen to be the same.

use lockstep_common::ids::Rank;
use lockstep_common::wire::Peer;

/// Some replicas differ from others after a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// The last committed step.
    step: u64,
    /// Those that differ from more than half of all; without such a majority, those that differ from rank 0.
    odd: Vec<Rank>,
    /// Whether more than half of all are the same.
    has_majority: bool,
}

impl Mismatch {
    /// The verdict on the replicas' `digests`, by rank, after `step`; `None` if they are all the same.
    pub(crate) fn find(step: u64, digests: &[impl AsRef<[u8]>]) -> Option<Self> {
        let same = |a: &[u8]| digests.iter().filter(|b| b.as_ref() == a).count();
        let majority = digests.iter().find(|digest| 2 * same(digest.as_ref()) > digests.len());
        let reference = majority.or(digests.first())?.as_ref();
        let differs = |(_, digest): &(u32, _)| AsRef::<[u8]>::as_ref(*digest) != reference;
        let odd: Vec<_> = (0..).zip(digests).filter(differs).map(|(rank, _)| Rank(rank)).collect();
        let has_majority = majority.is_some();
        (!odd.is_empty()).then_some(Self { step, odd, has_majority })
    }

    /// Whether this rank's replica differs.
    pub(crate) fn is_odd(&self, rank: Rank) -> bool {
        self.odd.contains(&rank)
    }

    /// The rank to blame, if that can be told.
    pub(crate) fn culprit(&self) -> Option<Rank> {
        self.odd.first().copied().filter(|_| self.has_majority)
    }
}

/// The line for people; `peers` are all ranks.
pub(crate) fn describe(mismatch: &Mismatch, peers: &[Peer]) -> String {
    let name = |rank: &Rank| match peers.get(rank.index()) {
        Some(peer) => format!("{rank} ({} on {})", peer.worker, peer.host),
        None => rank.to_string(),
    };
    let odd = mismatch.odd.iter().map(name).collect::<Vec<_>>().join(", ");
    let step = mismatch.step;
    match mismatch.has_majority {
        true => format!(
            "after step {step} {odd} held another state than most ranks: that host's memory or processor is at fault, or \
             its libtorch differs"
        ),
        false => format!(
            "after step {step} {odd} held another state than {}, and it cannot be told who is right: a host's memory or \
             processor is at fault, or its libtorch differs",
            name(&Rank(0))
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The odd ranks of replicas whose digests are these letters, and whether they are known to be wrong.
    fn odd(digests: &str) -> Option<(Vec<u32>, bool)> {
        let digests: Vec<_> = digests.bytes().map(|b| [b]).collect();
        let found = Mismatch::find(7, &digests)?;
        Some((found.odd.iter().map(|r| r.0).collect(), found.has_majority))
    }

    #[test]
    fn the_majority_names_the_odd_ranks_whoever_they_are() {
        for same in ["a", "aa", "aaaa"] {
            assert_eq!(odd(same), None);
        }
        assert_eq!(odd("aab"), Some((vec![2], true)));
        assert_eq!(odd("baa"), Some((vec![0], true)));
        assert_eq!(odd("abaca"), Some((vec![1, 3], true)));
        assert_eq!(odd("babbab"), Some((vec![1, 4], true)));
    }

    #[test]
    fn without_a_majority_those_that_differ_from_rank_0_are_named_and_nobody_is_blamed() {
        assert_eq!(odd("ab"), Some((vec![1], false)));
        assert_eq!(odd("abba"), Some((vec![1, 2], false)));
        assert_eq!(odd("abc"), Some((vec![1, 2], false)));
        let tie = Mismatch::find(7, &[[1], [2]]).unwrap();
        assert_eq!(tie.culprit(), None);
        assert!(!tie.is_odd(Rank(0)) && tie.is_odd(Rank(1)));
        assert!(describe(&tie, &[]).contains("it cannot be told who is right"));
        let clear = Mismatch::find(7, &[[1], [2], [1]]).unwrap();
        assert_eq!(clear.culprit(), Some(Rank(1)));
        assert!(clear.is_odd(Rank(1)) && !clear.is_odd(Rank(2)));
        assert!(describe(&clear, &[]).starts_with("after step 7 rank 1 held another state"));
    }
}
