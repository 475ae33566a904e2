//! Many seeds, on all cores.

use crate::cluster::{Report, run};
use crate::plan::{Breakage, Plan};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What became of many seeds.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Seeds that ran.
    pub seeds: u64,
    /// Those in which something was not as it must be, by seed.
    pub failures: Vec<Report>,
    /// Events of all.
    pub events: u64,
    /// Generations of all.
    pub generations: u64,
    /// Committed steps that were done again, of all.
    pub recomputed: u64,
    /// Simulated milliseconds of all.
    pub simulated_ms: u64,
}

/// Runs all seeds, or until the first failure.
fn try_all(seeds: Range<u64>, breakage: Option<Breakage>, stop_at_failure: bool) -> Verdict {
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let verdict = Mutex::new(Verdict::default());
    let work = || {
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let report = run(Plan { seed, breakage });
            if let Ok(mut all) = verdict.lock() {
                all.seeds += 1;
                all.events += report.events;
                all.generations += report.generations;
                all.recomputed += report.recomputed;
                all.simulated_ms += report.simulated_ms;
                if report.breach.is_some() {
                    stop.fetch_or(stop_at_failure, Ordering::Relaxed);
                    all.failures.push(report);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        (0..cores).for_each(|_| drop(scope.spawn(work)));
    });
    let mut verdict = verdict.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
    verdict.failures.sort_by_key(|report| report.plan.seed);
    verdict
}

/// Runs all seeds.
pub fn try_seeds(seeds: Range<u64>) -> Verdict {
    try_all(seeds, None, false)
}

/// Runs seeds with something broken until it shows.
pub fn first_failure(seeds: Range<u64>, breakage: Breakage) -> Option<Report> {
    try_all(seeds, Some(breakage), true).failures.into_iter().next()
}
