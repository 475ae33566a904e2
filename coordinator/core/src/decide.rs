//! Which waiting job starts on which workers, and why another one waits.

use lockstep_common::ids::{JobId, WorkerId};
use std::fmt;

/// A job in the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The job.
    pub job: JobId,
    /// It does not start with fewer workers.
    pub min: u32,
    /// It takes no more workers.
    pub max: u32,
    /// Workers that have its state in memory or are about to, in ascending order. If they suffice it starts on them alone:
    /// others would have to be waited for, and can join while it runs.
    pub kept: Vec<WorkerId>,
    /// Workers that it does not take.
    pub barred: Vec<WorkerId>,
}

/// What becomes of a waiting job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It starts on these workers, in the order of their ranks.
    Start(Vec<WorkerId>),
    /// It stays in the queue.
    Wait(WaitReason),
}

/// Why a job stays in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// It is first, and there are too few idle workers.
    Workers {
        /// How many it needs.
        needed: u32,
        /// How many are idle.
        free: u32,
    },
    /// An earlier job waits.
    Behind {
        /// Its place in the queue, from 1.
        position: usize,
    },
}

impl fmt::Display for WaitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workers { needed, free } => {
                let workers = if *needed == 1 { "worker" } else { "workers" };
                let are = if *free == 1 { "is" } else { "are" };
                write!(f, "needs {needed} {workers}, {free} {are} free")
            }
            Self::Behind { position } => write!(f, "position {position} in the queue"),
        }
    }
}

/// Decides over the whole `queue`, the earliest job first, with `idle` workers in ascending order.
///
/// First come, first served, and all or nothing: a job takes its workers at once, up to its maximum. A later job never
/// overtakes one that waits, so that a job that needs many workers is not starved by small ones.
pub fn decide(queue: &[Waiting], idle: &[WorkerId]) -> Vec<(JobId, Decision)> {
    let mut free = idle.to_vec();
    let mut waiting = 0;
    let mut decisions = Vec::with_capacity(queue.len());
    for job in queue {
        let usable: Vec<_> = free.iter().copied().filter(|w| !job.barred.contains(w)).collect();
        let others = usable.iter().copied().filter(|w| !job.kept.contains(w));
        let (min, max) = (job.min.max(1) as usize, job.max as usize);
        let chosen: Vec<_> = match job.kept.len() {
            enough if enough >= min => job.kept.iter().copied().take(max).collect(),
            _ => job.kept.iter().copied().chain(others).take(max).collect(),
        };
        let decision = if waiting > 0 {
            waiting += 1;
            Decision::Wait(WaitReason::Behind { position: waiting })
        } else if chosen.len() < min {
            waiting = 1;
            Decision::Wait(WaitReason::Workers { needed: job.min, free: chosen.len() as u32 })
        } else {
            free.retain(|w| !chosen.contains(w));
            Decision::Start(chosen)
        };
        decisions.push((job.job, decision));
    }
    decisions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The decisions for jobs (min, max) and idle workers, in words.
    fn check(jobs: &[(u32, u32)], idle: &[u64], expected: &[&str]) {
        let queue: Vec<_> = jobs.iter().zip(1..).map(|(&(min, max), n)| waiting(n, min, max)).collect();
        let idle: Vec<_> = idle.iter().copied().map(WorkerId).collect();
        let words: Vec<_> = decide(&queue, &idle)
            .into_iter()
            .map(|(job, decision)| match decision {
                Decision::Start(workers) => {
                    let names: Vec<_> = workers.iter().map(ToString::to_string).collect();
                    format!("{job} on {}", names.join(" "))
                }
                Decision::Wait(reason) => format!("{job} {reason}"),
            })
            .collect();
        assert_eq!(words, expected);
    }

    fn waiting(job: u64, min: u32, max: u32) -> Waiting {
        Waiting { job: JobId(job), min, max, kept: Vec::new(), barred: Vec::new() }
    }

    #[test]
    fn a_job_goes_on_with_those_that_have_its_state_and_takes_others_only_if_they_are_too_few() {
        let idle = [1, 2, 3, 4].map(WorkerId);
        let kept = |min| Waiting { kept: vec![WorkerId(2), WorkerId(3)], ..waiting(1, min, 4) };
        let start = |workers: &[u64]| Decision::Start(workers.iter().copied().map(WorkerId).collect());
        assert_eq!(decide(&[kept(2)], &idle)[0].1, start(&[2, 3]));
        assert_eq!(decide(&[kept(3)], &idle)[0].1, start(&[2, 3, 1, 4]));
        let barred = Waiting { barred: vec![WorkerId(1)], ..kept(3) };
        assert_eq!(decide(&[barred], &idle)[0].1, start(&[2, 3, 4]));
    }

    #[test]
    fn jobs_start_in_order_with_all_their_workers_or_wait() {
        check(&[], &[1], &[]);
        check(&[(1, 8)], &[], &["j1 needs 1 worker, 0 are free"]);
        check(&[(2, 8)], &[4], &["j1 needs 2 workers, 1 is free"]);
        check(
            &[(2, 2), (1, 2), (1, 1)],
            &[1, 3, 5],
            &["j1 on w1 w3", "j2 on w5", "j3 needs 1 worker, 0 are free"],
        );
    }

    #[test]
    fn a_small_job_never_overtakes_a_large_one() {
        check(
            &[(4, 8), (1, 1), (1, 1)],
            &[1, 2],
            &["j1 needs 4 workers, 2 are free", "j2 position 2 in the queue", "j3 position 3 in the queue"],
        );
    }
}
