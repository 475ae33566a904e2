//! Where a step's time goes.

use std::time::Instant;

/// The parts of a step, as the metric `lockstep_step_phase_seconds` names them.
pub(crate) const PARTS: [&str; 6] = ["data", "forward", "backward", "comm", "optimizer", "check"];

/// Seconds by part. `comm` is what is left of the wall time: waiting for peers that no computing hides.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepTimes {
    pub(crate) data: f64,
    pub(crate) forward: f64,
    pub(crate) backward: f64,
    pub(crate) optimizer: f64,
    /// Taking fingerprints of the replica.
    pub(crate) check: f64,
    /// The part of `comm` that lies between a phase's last backward and its reduced gradients.
    pub(crate) gradients: f64,
}

impl StepTimes {
    /// Waiting that no computing hides, given the step's wall time.
    pub(crate) fn comm(&self, wall: f64) -> f64 {
        (wall - (self.data + self.forward + self.backward + self.optimizer + self.check)).max(0.0)
    }

    /// Seconds in the order of [`PARTS`], given the step's wall time.
    pub(crate) fn parts(&self, wall: f64) -> [f64; 6] {
        [self.data, self.forward, self.backward, self.comm(wall), self.optimizer, self.check]
    }
}

/// Runs `work` and adds its seconds to `total`.
pub(crate) fn timed<R>(total: &mut f64, work: impl FnOnce() -> R) -> R {
    let start = Instant::now();
    let result = work();
    *total += start.elapsed().as_secs_f64();
    result
}
