//! Prefetching: a thread that stays some steps ahead of training.

use super::batch::Decoder;
use crate::train::Number;
use crate::train::error::TrainError;
use crate::train::phase::ShardBatch;
use crossbeam_channel::{Receiver, RecvTimeoutError, Select, bounded};
use lockstep_common::ids::LogicalShard;
use lockstep_common::sampler::Sampler;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Steps that are ready before they are needed.
const AHEAD: usize = 3;

/// How often a wait for data looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// What a worker's shards see in one step.
pub(crate) struct StepBatches {
    /// Per minibatch, per owned shard. An epoch's last step may have fewer minibatches than others.
    pub(crate) minibatches: Vec<Vec<ShardBatch>>,
    /// Samples over all shards and minibatches.
    pub(crate) samples: u64,
    /// The epoch, from 0.
    pub(crate) epoch: u64,
}

/// How steps map to minibatches.
#[derive(Clone)]
pub(crate) struct Timetable {
    pub(crate) sampler: Arc<Sampler>,
    /// Minibatches of one step.
    pub(crate) per_step: u64,
}

impl Timetable {
    /// Steps of one epoch; the last may have fewer minibatches, and its last minibatch fewer samples.
    pub(crate) fn steps_per_epoch(&self) -> u64 {
        self.sampler.steps_per_epoch().div_ceil(self.per_step)
    }

    /// Epoch and step within it, both from 0, of `step`.
    pub(crate) fn position(&self, step: u64) -> (u64, u64) {
        (step / self.steps_per_epoch(), step % self.steps_per_epoch())
    }
}

/// The prefetching thread's output. Dropping it ends the thread.
pub(crate) struct Loader {
    steps: Receiver<Result<StepBatches, TrainError>>,
}

impl Loader {
    /// Starts to load `steps` for the owned `shards`.
    pub(crate) fn start<T: Number>(
        decoder: Decoder<T>,
        timetable: Timetable,
        shards: Range<u32>,
        steps: Range<u64>,
    ) -> Result<Self, TrainError> {
        let (sender, receiver) = bounded(AHEAD);
        let work = move || {
            for step in steps {
                let batches = load(&decoder, &timetable, shards.clone(), step);
                let failed = batches.is_err();
                if sender.send(batches).is_err() || failed {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("loader".to_owned()).spawn(work);
        thread.map_err(|e| TrainError::Fatal(format!("cannot start the loader: {e}")))?;
        Ok(Self { steps: receiver })
    }

    /// Waits until the first step's batches are ready, or there are none to come.
    pub(crate) fn warm_up(&self, aborted: &AtomicBool) -> Result<(), TrainError> {
        let mut ready = Select::new();
        ready.recv(&self.steps);
        while ready.ready_timeout(LOOK).is_err() {
            if aborted.load(Ordering::Relaxed) {
                return Err(TrainError::Aborted);
            }
        }
        Ok(())
    }

    /// The next step's batches.
    pub(crate) fn next(&self, aborted: &AtomicBool) -> Result<StepBatches, TrainError> {
        loop {
            match self.steps.recv_timeout(LOOK) {
                Ok(batches) => return batches,
                Err(RecvTimeoutError::Timeout) if aborted.load(Ordering::Relaxed) => {
                    return Err(TrainError::Aborted);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let what = "the loader ended early; see the worker's log";
                    return Err(TrainError::Fatal(what.to_owned()));
                }
            }
        }
    }
}

fn load<T: Number>(
    decoder: &Decoder<T>,
    timetable: &Timetable,
    shards: Range<u32>,
    step: u64,
) -> Result<StepBatches, TrainError> {
    let (epoch, step_in_epoch) = timetable.position(step);
    let mut batches = StepBatches { minibatches: Vec::new(), samples: 0, epoch };
    for place in step_in_epoch * timetable.per_step..(step_in_epoch + 1) * timetable.per_step {
        let global = timetable.sampler.batch_size(place);
        if global == 0 {
            break;
        }
        let shard_batch = |shard| {
            let samples = timetable.sampler.shard_samples(epoch, place, LogicalShard(shard));
            decoder.augmented(epoch, samples, global)
        };
        batches.minibatches.push(shards.clone().map(shard_batch).collect::<Result<_, _>>()?);
        batches.samples += global;
    }
    Ok(batches)
}
