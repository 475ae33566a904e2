//! Tells the coordinator where this rank's time goes, so that it can tell which rank is slow.

use crate::control::Control;
use crate::train::clock::{PARTS, StepTimes};
use lockstep_common::wire::{Assignment, FromWorker, Pace};
use std::time::{Duration, Instant};

/// Between two reports: long enough for a mean, short enough to notice a slow rank within seconds.
const INTERVAL: Duration = Duration::from_secs(1);

/// A report covers at least so many steps.
const LEAST_STEPS: u32 = 3;

/// Means over the steps since the last report.
pub(crate) struct PaceReporter {
    since: Instant,
    steps: u32,
    /// Seconds in the order of [`PARTS`].
    sums: [f64; PARTS.len()],
    shards: u32,
}

impl PaceReporter {
    pub(crate) fn new(assignment: &Assignment) -> Self {
        let shards = assignment.placement.range(assignment.rank).len() as u32;
        Self { since: Instant::now(), steps: 0, sums: [0.0; PARTS.len()], shards }
    }

    /// A step took `times` of `wall` seconds.
    pub(crate) fn step(&mut self, control: &Control, assignment: &Assignment, times: &StepTimes, wall: f64) {
        self.steps += 1;
        self.sums.iter_mut().zip(times.parts(wall)).for_each(|(sum, seconds)| *sum += seconds);
        if self.since.elapsed() < INTERVAL || self.steps < LEAST_STEPS {
            return;
        }
        let [data, forward, backward, comm, optimizer, check] =
            self.sums.map(|sum| sum / f64::from(self.steps));
        let (steps, shards) = (self.steps, self.shards);
        let pace = Pace { steps, shards, data, forward, backward, comm, optimizer: optimizer + check };
        control.tell_news(FromWorker::Pace { job: assignment.job, generation: assignment.generation, pace });
        *self = Self { since: Instant::now(), steps: 0, sums: [0.0; PARTS.len()], shards };
    }
}
