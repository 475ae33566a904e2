//! Checkpoints: every rank copies its share of the state at a step boundary, and packs and sends it to the coordinator
//! while training goes on.

use super::error::TrainError;
use super::replica::{RawTensors, Replica, tensor_bytes};
use crate::control::Control;
use crate::fault::{self, Point};
use crate::tasks::TaskPlan;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use lockstep_common::checkpoint::{
    CheckpointFiles, CheckpointInfo, CheckpointManifest, OPTIMIZER_FILE, WEIGHTS_FILE, WIRE_FILE,
    decode_tensors, encode_tensors, senders,
};
use lockstep_common::digest::blake3_hex;
use lockstep_common::ids::{Generation, JobId};
use lockstep_common::net::NetError;
use lockstep_common::wire::{Assignment, CheckpointPart, PartFile, Position};
use lockstep_nn::bytes::RawTensor;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tch::Tensor;

/// How often a wait for a checkpoint looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(20);

/// Tensors by file and name. They are used again for the next checkpoint: fresh memory costs more than the copy into it.
type Copies = BTreeMap<(&'static str, String), RawTensor>;

/// How long all ranks try to have the last checkpoint stored, which nothing but the coordinator's disk keeps from it: enough
/// for what a clean-up frees, and not for a person, who can resume the job.
const LAST_PATIENCE: Duration = Duration::from_secs(30);

/// Between two tries of the last checkpoint.
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// How one ended.
type End = (Result<(), TrainError>, Work);

/// Writes one checkpoint at a time in the background.
pub(crate) struct Checkpointer {
    control: Control,
    job: JobId,
    generation: Generation,
    rank: usize,
    ranks: usize,
    observe: Arc<dyn Fn(f64) + Send + Sync>,
    writing: Option<Receiver<End>>,
    /// How the last one ended, until somebody asks.
    last: Result<(), TrainError>,
    /// The last one, for another try, and for its memory.
    done: Option<Work>,
}

/// What a checkpoint says beside the tensors.
pub(crate) struct Heading {
    /// The step after which it is taken.
    pub(crate) step: u64,
    /// The digest of weights and buffers, in which all ranks have agreed.
    pub(crate) weights_digest: String,
    /// From rank 0: where the job is.
    pub(crate) info: Option<CheckpointInfo>,
}

impl Checkpointer {
    /// `observe` is told the seconds that each took from the copy to being durable.
    pub(crate) fn new(
        control: Control,
        assignment: &Assignment,
        observe: Arc<dyn Fn(f64) + Send + Sync>,
    ) -> Self {
        Self {
            control,
            job: assignment.job,
            generation: assignment.generation,
            rank: assignment.rank.index(),
            ranks: assignment.peers.len(),
            observe,
            writing: None,
            last: Ok(()),
            done: None,
        }
    }

    /// Copies this rank's share of the replica's state and begins to store it, and `wires`, which all ranks have brought
    /// together on rank 0. [`Self::finish`] the previous one first. All ranks begin the same one.
    pub(crate) fn begin(
        &mut self,
        replica: &Replica,
        plan: &TaskPlan,
        wires: Option<RawTensors>,
        heading: Heading,
    ) -> Result<(), TrainError> {
        let begun = Instant::now();
        let weights = replica.weight_tensors().map(|(name, tensor)| ((WEIGHTS_FILE, name), tensor));
        let optimizer = replica.optimizer_tensors(plan)?.into_iter();
        let optimizer = optimizer.map(|(name, tensor)| ((OPTIMIZER_FILE, name), tensor));
        let tensors: BTreeMap<(&str, String), Tensor> = weights.chain(optimizer).collect();
        let sizes = tensors.values().map(|tensor| tensor.numel() * tensor.kind().elt_size_in_bytes());
        let sizes: Vec<_> = sizes.collect();
        let mut senders = senders(&sizes, self.ranks).into_iter();
        let mut is_mine = || senders.next() == Some(self.rank);

        let mut copies = self.done.take().map(|done| done.copies).unwrap_or_default();
        for (key, tensor) in tensors {
            if is_mine() {
                match copies.entry(key) {
                    Entry::Occupied(mut copy) => copy.get_mut().copy_again(&tensor)?,
                    Entry::Vacant(place) => drop(place.insert(RawTensor::copy_from(&tensor)?)),
                }
            }
        }

        self.send(Work {
            control: self.control.clone(),
            job: self.job,
            generation: self.generation,
            is_first: self.rank == 0,
            copies,
            wires,
            heading,
            begun,
        })
    }

    /// Sends `work` in the background.
    fn send(&mut self, mut work: Work) -> Result<(), TrainError> {
        let observe = self.observe.clone();
        let (ended, writing) = bounded(1);
        let write = move || {
            let result = work.send();
            if result.is_ok() {
                observe(work.begun.elapsed().as_secs_f64());
                work.wires = None;
            }
            // The session may have ended without waiting.
            let _ = ended.send((result, work));
        };
        let thread = std::thread::Builder::new().name("checkpoint".to_owned()).spawn(write);
        thread.map_err(|e| TrainError::Fatal(format!("cannot start a thread: {e}")))?;
        self.writing = Some(writing);
        Ok(())
    }

    /// Waits a moment for the checkpoint in progress, if there is one; whether another can begin. The other ranks wait
    /// meanwhile, so training must not stand still because nobody takes a checkpoint, or takes it slowly.
    pub(crate) fn make_way(&mut self) -> bool {
        /// Far below the time-out of a collective.
        const MOMENT: Duration = Duration::from_millis(300);
        let start = Instant::now();
        self.wait(|control| !control.is_connected() || start.elapsed() > MOMENT)
    }

    /// Waits until the last checkpoint is durable, unless this rank is told to leave at once.
    pub(crate) fn finish(&mut self, aborted: &AtomicBool) -> Result<(), TrainError> {
        match self.wait(|_| aborted.load(Ordering::Relaxed)) {
            true => self.take_last(),
            false => Err(TrainError::Aborted),
        }
    }

    /// As [`Self::finish`], for the checkpoint after which nothing comes. While the coordinator's disk does not take it, all
    /// ranks try again together, for [`LAST_PATIENCE`].
    pub(crate) fn finish_last(&mut self, aborted: &AtomicBool) -> Result<(), TrainError> {
        let start = Instant::now();
        loop {
            match self.finish(aborted) {
                Err(error) if error.not_stored().is_some() && start.elapsed() < LAST_PATIENCE => {
                    let Some(work) = self.done.take() else { return Err(error) };
                    let pause = Instant::now();
                    while pause.elapsed() < LAST_PAUSE {
                        if aborted.load(Ordering::Relaxed) {
                            return Err(TrainError::Aborted);
                        }
                        std::thread::sleep(LOOK);
                    }
                    self.send(work)?;
                }
                result => return result,
            }
        }
    }

    /// How the last one ended; told once.
    pub(crate) fn take_last(&mut self) -> Result<(), TrainError> {
        std::mem::replace(&mut self.last, Ok(()))
    }

    /// Waits for the checkpoint in progress; whether it ended before the wait was given up.
    fn wait(&mut self, give_up: impl Fn(&Control) -> bool) -> bool {
        while let Some(writing) = &self.writing {
            match writing.recv_timeout(LOOK) {
                Ok((result, work)) => (self.writing, self.last, self.done) = (None, result, Some(work)),
                Err(RecvTimeoutError::Timeout) if give_up(&self.control) => return false,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let what = "the checkpoint thread panicked; see the worker's log";
                    (self.writing, self.last) = (None, Err(TrainError::Fatal(what.to_owned())));
                }
            }
        }
        true
    }
}

/// A share on its way to the coordinator.
struct Work {
    control: Control,
    job: JobId,
    generation: Generation,
    is_first: bool,
    copies: Copies,
    wires: Option<RawTensors>,
    heading: Heading,
    /// When its copies began to be made.
    begun: Instant,
}

impl Work {
    fn send(&self) -> Result<(), TrainError> {
        let copies = |file| self.copies.iter().filter(move |((f, _), _)| *f == file);
        let mut files = Vec::new();
        for file in [WEIGHTS_FILE, OPTIMIZER_FILE] {
            files.push((file, pack(copies(file).map(|((_, name), raw)| (name.as_str(), raw)))?));
        }
        if let Some(wires) = &self.wires {
            files.push((WIRE_FILE, pack(wires.iter().map(|(name, raw)| (name.as_str(), raw)))?));
        }
        let part_file = |(name, bytes): &(&str, Vec<u8>)| PartFile {
            name: (*name).to_owned(),
            bytes: bytes.len() as u64,
            blake3: blake3_hex(bytes),
        };
        let Heading { step, ref weights_digest, ref info } = self.heading;
        let part = CheckpointPart {
            job: self.job,
            generation: self.generation,
            step,
            info: info.clone().map(Box::new),
            weights_digest: weights_digest.clone(),
            files: files.iter().map(part_file).collect(),
        };
        if self.is_first {
            // Whoever resumes from the checkpoint does not do its steps again, so they must have been heard of.
            self.control.wait_until_heard(self.job, step);
        }
        fault::point(Point::Checkpoint, step);
        match self.control.store_checkpoint(part, &files) {
            // Somebody else is gone, or this generation is.
            Err(NetError::Refused { reason, message }) if OVER.contains(&reason.as_str()) => {
                Err(TrainError::Unavailable { what: message, culprit: None })
            }
            other => Ok(other?),
        }
    }
}

/// Reasons for which a checkpoint is refused that are no fault of it.
const OVER: [&str; 2] = ["checkpoint_dropped", "old_generation"];

fn pack<'a>(tensors: impl Iterator<Item = (&'a str, &'a RawTensor)>) -> Result<Vec<u8>, TrainError> {
    encode_tensors(tensors.map(|(name, tensor)| tensor_bytes(name, tensor)))
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
    let parts = control.checkpoint(job, generation, step).map_err(|error| match error {
        // It has gone or been damaged since it was chosen; another one may be of use.
        NetError::Refused { reason, message } if reason == "checkpoint" => {
            let what = format!("the checkpoint of step {step} cannot be had: {message}");
            TrainError::Unavailable { what, culprit: None }
        }
        other => other.into(),
    })?;
    let files = CheckpointFiles::from_parts(parts).map_err(|e| refused(e.to_string()))?;
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
