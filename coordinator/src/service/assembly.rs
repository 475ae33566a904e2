//! Checkpoints whose parts are coming in.
//!
//! The parts wait in memory until all are there; then they are written as one checkpoint, which becomes visible with the
//! rename of its folder. A coordinator that is killed before that has nothing to sweep, and the ranks, of which none has
//! been told that its part is safe, send them again.

use super::refuse;
use lockstep_common::checkpoint::CheckpointInfo;
use lockstep_common::ids::{Generation, JobId};
use lockstep_common::wire::Refusal;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

/// A checkpoint is held in memory while it is put together; one of more than this is no model that this release can train.
pub(super) const MAX_CHECKPOINT_BYTES: u64 = 16 << 30;

/// A file's name and a part of its tensors.
pub(super) type NamedBytes = (String, Vec<u8>);

/// A rank's part.
pub(super) struct Part {
    pub(super) info: Option<Box<CheckpointInfo>>,
    pub(super) weights_digest: String,
    pub(super) files: Vec<NamedBytes>,
}

impl Part {
    /// The bytes of its file `name`.
    pub(super) fn file(&self, name: &str) -> Option<&[u8]> {
        self.files.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice())
    }
}

/// The parts of all ranks, by rank.
pub(super) type Parts = Vec<Part>;

/// How it went, for all ranks of an assembly; nobody knows while there is nothing.
pub(super) type Verdict = Option<Result<(), Refusal>>;

struct Assembly {
    generation: Generation,
    step: u64,
    /// By rank; empty once they have been handed over.
    parts: Vec<Option<Part>>,
    verdict: watch::Sender<Verdict>,
}

/// The newest checkpoint in the making of each job.
#[derive(Default)]
pub(crate) struct Assemblies {
    coming: Mutex<BTreeMap<JobId, Assembly>>,
    turns: Mutex<BTreeMap<JobId, Arc<Mutex<()>>>>,
}

/// Which part of which checkpoint.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) job: JobId,
    pub(super) generation: Generation,
    pub(super) step: u64,
    pub(super) rank: usize,
    /// How many ranks there are.
    pub(super) ranks: usize,
}

/// What becomes of a part.
pub(super) struct Taken {
    /// Says how it went.
    pub(super) verdict: watch::Receiver<Verdict>,
    /// All parts, if this was the last one: the caller writes them and says how it went to [`Assemblies::finish`].
    pub(super) complete: Option<Parts>,
}

impl Assemblies {
    /// Held by whoever writes a checkpoint of `job` or looks for the newest one.
    pub(super) fn turn(&self, job: JobId) -> Arc<Mutex<()>> {
        self.turns.lock().entry(job).or_default().clone()
    }

    /// Takes a part. One that came before is replaced; parts of an older checkpoint of the job are dropped, and those who
    /// wait for that one are refused.
    pub(super) fn add(&self, place: Place, part: Part) -> Result<Taken, Refusal> {
        let mut assemblies = self.coming.lock();
        let here = (place.generation, place.step);
        if let Some(newer) = assemblies.get(&place.job).filter(|a| (a.generation, a.step) > here) {
            let step = newer.step;
            return Err(superseded(format_args!("the checkpoint of step {step} is already coming in")));
        }
        let known = assemblies.get(&place.job).is_some_and(|a| (a.generation, a.step) == here);
        if !known {
            let parts = (0..place.ranks).map(|_| None).collect();
            let assembly = Assembly {
                generation: place.generation,
                step: place.step,
                parts,
                verdict: watch::channel(None).0,
            };
            assemblies.insert(place.job, assembly);
        }
        let Some(assembly) = assemblies.get_mut(&place.job) else {
            return Err(superseded("it was dropped"));
        };
        let verdict = assembly.verdict.subscribe();
        if assembly.parts.is_empty() {
            // They are being written.
            return Ok(Taken { verdict, complete: None });
        }
        let Some(slot) = assembly.parts.get_mut(place.rank) else {
            return Err(refuse("checkpoint", format_args!("there is no rank {}", place.rank)));
        };
        *slot = Some(part);
        let bytes = assembly.parts.iter().flatten().flat_map(|p| &p.files).map(|(_, b)| b.len() as u64);
        if bytes.sum::<u64>() > MAX_CHECKPOINT_BYTES {
            assemblies.remove(&place.job);
            return Err(too_large());
        }
        let complete = assembly.parts.iter().all(Option::is_some);
        let complete = complete.then(|| std::mem::take(&mut assembly.parts).into_iter().flatten().collect());
        Ok(Taken { verdict, complete })
    }

    /// Tells all ranks how it went.
    pub(super) fn finish(&self, place: Place, result: Result<(), Refusal>) {
        let mut assemblies = self.coming.lock();
        let mine = |a: &Assembly| (a.generation, a.step) == (place.generation, place.step);
        if let std::collections::btree_map::Entry::Occupied(entry) = assemblies.entry(place.job)
            && mine(entry.get())
        {
            entry.remove().verdict.send_replace(Some(result));
        }
    }

    /// Drops the parts of memberships that will not complete them: `can_come` says whether the part of a rank of a job's
    /// generation can still come. Those who wait are refused.
    pub(super) fn sweep(&self, can_come: impl Fn(JobId, Generation, usize) -> bool) {
        self.coming.lock().retain(|job, assembly| {
            let missing = assembly.parts.iter().enumerate().filter(|(_, part)| part.is_none());
            missing.into_iter().all(|(rank, _)| can_come(*job, assembly.generation, rank))
        });
    }
}

/// The verdict on a checkpoint, when it is known.
pub(super) async fn verdict(mut verdict: watch::Receiver<Verdict>) -> Result<(), Refusal> {
    match verdict.wait_for(Option::is_some).await {
        Ok(known) => known.clone().unwrap_or(Ok(())),
        Err(_) => Err(superseded("a rank is gone that had a part of it, or a newer one is coming in")),
    }
}

fn superseded(why: impl std::fmt::Display) -> Refusal {
    refuse("checkpoint_dropped", format_args!("the checkpoint is not stored: {why}"))
}

pub(super) fn too_large() -> Refusal {
    let limit = MAX_CHECKPOINT_BYTES >> 30;
    refuse("too_large", format_args!("a checkpoint may have {limit} GiB; this one has more"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(byte: u8) -> Part {
        let files = vec![("weights.safetensors".to_owned(), vec![byte; 3])];
        Part { info: None, weights_digest: String::new(), files }
    }

    fn place(generation: u64, step: u64, rank: usize) -> Place {
        Place { job: JobId(1), generation: Generation(generation), step, rank, ranks: 2 }
    }

    fn known(taken: &Taken) -> Verdict {
        taken.verdict.borrow().clone()
    }

    #[tokio::test]
    async fn the_last_part_completes_a_checkpoint_and_all_ranks_hear_of_it() {
        let assemblies = Assemblies::default();
        let first = assemblies.add(place(1, 5, 1), part(1)).unwrap();
        assert!(first.complete.is_none());
        // Its connection broke and it sends the part again.
        let again = assemblies.add(place(1, 5, 1), part(2)).unwrap();
        assert!(again.complete.is_none());
        let last = assemblies.add(place(1, 5, 0), part(3)).unwrap();
        let parts = last.complete.as_ref().unwrap();
        assert_eq!(parts.iter().map(|p| p.files[0].1[0]).collect::<Vec<_>>(), [3, 2]);
        assert_eq!((known(&first), known(&last)), (None, None));
        let late = assemblies.add(place(1, 5, 1), part(4)).unwrap();
        assert!(late.complete.is_none(), "they are being written");
        assemblies.finish(place(1, 5, 0), Ok(()));
        for taken in [first, again, last, late] {
            assert_eq!(verdict(taken.verdict).await, Ok(()));
        }
    }

    #[tokio::test]
    async fn a_newer_checkpoint_and_a_dead_rank_drop_the_parts_of_an_older_one() {
        let assemblies = Assemblies::default();
        let refused = |taken: Taken| async { verdict(taken.verdict).await.unwrap_err().reason };
        let old = assemblies.add(place(1, 5, 0), part(1)).unwrap();
        let newer = assemblies.add(place(1, 6, 0), part(1)).unwrap();
        assert_eq!(refused(old).await, "checkpoint_dropped");
        assert!(assemblies.add(place(1, 5, 1), part(1)).is_err());
        let newest = assemblies.add(place(2, 1, 0), part(1)).unwrap();
        assert_eq!(refused(newer).await, "checkpoint_dropped");
        // Rank 0 has given its part and may go.
        assemblies.sweep(|_, _, rank| rank == 1);
        assert_eq!(known(&newest), None);
        assemblies.sweep(|_, generation, _| generation != Generation(2));
        assert_eq!(refused(newest).await, "checkpoint_dropped");
        assert!(assemblies.coming.lock().is_empty());
    }
}
