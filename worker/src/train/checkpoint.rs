//! Checkpoints: copied at a step boundary, packed and sent to the coordinator while training goes on.

use super::error::TrainError;
use super::replica::{RawTensors, Replica, tensor_bytes};
use crate::control::Control;
use crate::fault::{self, Point};
use crate::tasks::TaskPlan;
use lockstep_common::checkpoint::{
    CheckpointFiles, CheckpointInfo, CheckpointManifest, OPTIMIZER_FILE, WEIGHTS_FILE, WIRE_FILE,
    decode_tensors, encode_tensors,
};
use lockstep_common::ids::{Generation, JobId};
use lockstep_common::wire::{CheckpointHead, FileHead, Position};
use lockstep_nn::bytes::RawTensor;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tch::Tensor;

/// Writes one checkpoint at a time in the background.
pub(crate) struct Checkpointer {
    control: Control,
    job: JobId,
    generation: Generation,
    observe: Arc<dyn Fn(f64) + Send + Sync>,
    writing: Option<JoinHandle<Result<(), TrainError>>>,
}

impl Checkpointer {
    /// `observe` is told the seconds that each took from the copy to being durable.
    pub(crate) fn new(
        control: Control,
        job: JobId,
        generation: Generation,
        observe: Arc<dyn Fn(f64) + Send + Sync>,
    ) -> Self {
        Self { control, job, generation, observe, writing: None }
    }

    /// Copies the replica's state and begins to store it, and `wires`, which all ranks have brought together.
    /// [`Self::finish`] the previous one first.
    pub(crate) fn begin(
        &mut self,
        replica: &Replica,
        plan: &TaskPlan,
        wires: Option<RawTensors>,
        info: CheckpointInfo,
    ) -> Result<(), TrainError> {
        let start = Instant::now();
        let (weights, optimizer) = (replica.weights()?, replica.optimizer_state(plan)?);
        let (control, job, generation, observe) =
            (self.control.clone(), self.job, self.generation, self.observe.clone());
        let write = move || {
            let step = info.step;
            let mut files = vec![
                (WEIGHTS_FILE.to_owned(), pack(&weights)?),
                (OPTIMIZER_FILE.to_owned(), pack(&optimizer)?),
            ];
            if let Some(wires) = wires {
                files.push((WIRE_FILE.to_owned(), pack(&wires)?));
            }
            let packed = CheckpointFiles::new(info, files).and_then(CheckpointFiles::into_parts);
            let all = packed.map_err(|e| TrainError::Fatal(e.to_string()))?;
            fault::point(Point::Checkpoint, step);
            let heads =
                all.iter().map(|(n, b)| FileHead { name: n.clone(), bytes: b.len() as u64 }).collect();
            control.store_checkpoint(CheckpointHead { job, generation, step, files: heads }, &all)?;
            observe(start.elapsed().as_secs_f64());
            Ok(())
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(write);
        self.writing = Some(thread.map_err(|e| TrainError::Fatal(format!("cannot start a thread: {e}")))?);
        Ok(())
    }

    /// Waits a moment for the checkpoint in progress, if there is one; whether it has ended. The other ranks wait
    /// meanwhile, so training must not stand still because nobody takes a checkpoint, or takes it slowly.
    pub(crate) fn make_way(&mut self) -> Result<bool, TrainError> {
        /// Far below the time-out of a collective.
        const MOMENT: Duration = Duration::from_millis(300);
        const LOOK: Duration = Duration::from_millis(2);
        let start = Instant::now();
        while self.writing.as_ref().is_some_and(|w| !w.is_finished()) {
            if !self.control.is_connected() || start.elapsed() > MOMENT {
                return Ok(false);
            }
            std::thread::sleep(LOOK);
        }
        self.finish().map(|()| true)
    }

    /// Waits until the last checkpoint is durable.
    pub(crate) fn finish(&mut self) -> Result<(), TrainError> {
        match self.writing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => {
                Err(TrainError::Fatal("the checkpoint thread panicked; see the worker's log".to_owned()))
            }
        }
    }
}

fn pack(tensors: &RawTensors) -> Result<Vec<u8>, TrainError> {
    encode_tensors(tensors.iter().map(|(name, tensor)| tensor_bytes(name, tensor)))
        .map_err(|e| TrainError::Fatal(format!("cannot pack the checkpoint: {e}")))
}

/// Fetches the checkpoint after `step` and takes it over, but for what the wires kept, which is handed back: the ranks
/// share that out once they are connected.
pub(crate) fn restore(
    control: &Control,
    job: JobId,
    generation: Generation,
    step: u64,
    plan: &TaskPlan,
    replica: &mut Replica,
) -> Result<(CheckpointManifest, Option<BTreeMap<String, Tensor>>), TrainError> {
    let refused =
        |what: String| TrainError::Fatal(format!("the checkpoint of step {step} is of no use: {what}"));
    let files = CheckpointFiles::from_parts(control.checkpoint(job, generation, step)?)
        .map_err(|e| refused(e.to_string()))?;
    let tensors = |name: &str| -> Result<BTreeMap<String, Tensor>, TrainError> {
        let bytes = files.file(name).ok_or_else(|| refused(format!("it has no {name}")))?;
        let tensors = decode_tensors(bytes).map_err(|e| refused(format!("{name}: {e}")))?;
        let unpack = |t: lockstep_common::digest::TensorBytes<'_>| {
            Ok((t.name.to_string(), RawTensor::tensor_of(&t.dtype, &t.shape, &t.bytes)?))
        };
        tensors.into_iter().map(unpack).collect()
    };
    let (weights, optimizer) = (tensors(WEIGHTS_FILE)?, tensors(OPTIMIZER_FILE)?);
    replica
        .restore(plan, Position::at(files.manifest.info.step), &weights, &optimizer)
        .map_err(|e| refused(e.to_string()))?;
    let wires = files.file(WIRE_FILE).map(|_| tensors(WIRE_FILE)).transpose()?;
    Ok((files.manifest, wires))
}
