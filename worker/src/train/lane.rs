//! One logical shard's thread: its module objects, its autograd graph, its gradient hooks.

use super::Number;
use super::error::TrainError;
use super::gradients::Gradients;
use super::permits::Permits;
use super::phase::{PhasePlan, ShardBatch};
use super::rendezvous::{PhaseSync, Rendezvous};
use crate::fault::{self, Point};
use crate::tasks::LaneTask;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use lockstep_collectives::CollectiveError;
use lockstep_common::audit::ShardSamples;
use lockstep_common::ids::LogicalShard;
use lockstep_nn::NnError;
use lockstep_nn::forward::{BatchNormSync, BnRecord, Forward};
use lockstep_nn::shim::{GradientHook, backward, on_gradient};
use lockstep_nn::vars::Vars;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;
use tch::Tensor;

/// What a lane is asked to do in a phase.
pub(crate) struct PhaseWork<T> {
    pub(crate) plan: PhasePlan,
    pub(crate) phase: u16,
    pub(crate) step: u64,
    pub(crate) seed: u64,
    pub(crate) batch: ShardBatch,
    /// Into how many pieces the batch is divided.
    pub(crate) pieces: usize,
    pub(crate) buckets: Arc<Gradients<T>>,
}

/// What a lane has done in a phase.
pub(crate) struct PhaseDone {
    pub(crate) shard: LogicalShard,
    /// The samples that it was given.
    pub(crate) samples: ShardSamples,
    pub(crate) figures: Vec<f64>,
    pub(crate) records: Vec<BnRecord>,
    /// Seconds of computing, without waiting.
    pub(crate) forward: f64,
    pub(crate) backward: f64,
}

type Job<T> = Box<dyn FnOnce(&mut LaneState<T>) + Send>;

/// The network that learns in the current phase, and where its gradients go.
struct Sink<T> {
    slot: usize,
    learns: u16,
    buckets: Arc<Gradients<T>>,
    /// Gradients of the pieces of the batch before this one, by parameter.
    sums: BTreeMap<usize, Tensor>,
    /// Whether this is the last piece.
    last: bool,
}

impl<T: Number> Sink<T> {
    /// Takes the gradient of `parameter` from a piece of the batch.
    fn take(&mut self, parameter: usize, gradient: &Tensor) -> Result<(), NnError> {
        let sum = match self.sums.remove(&parameter) {
            Some(sum) => tch::no_grad(|| sum.f_add(gradient))?,
            None => gradient.shallow_clone(),
        };
        if self.last {
            return self.buckets.deliver(self.slot, parameter, &sum);
        }
        self.sums.insert(parameter, sum);
        Ok(())
    }

    /// Delivers what the last piece has added nothing to.
    fn finish(&mut self) -> Result<(), NnError> {
        for (parameter, sum) in std::mem::take(&mut self.sums) {
            self.buckets.deliver(self.slot, parameter, &sum)?;
        }
        self.buckets.finish(self.slot)
    }
}

/// What lives on the lane's thread.
struct LaneState<T> {
    shard: LogicalShard,
    slot: usize,
    task: Box<dyn LaneTask>,
    /// Where the hooks deliver; set for the duration of a phase.
    sink: Arc<Mutex<Option<Sink<T>>>>,
    rendezvous: Arc<Rendezvous>,
    permits: Arc<Permits>,
    _hooks: Vec<GradientHook>,
}

/// The handle on a lane. Dropping it ends the thread after the job in progress.
pub(crate) struct Lane<T> {
    jobs: Option<Sender<Job<T>>>,
    thread: Option<JoinHandle<()>>,
}

/// An answer that a lane owes.
pub(crate) struct Owed<R>(Receiver<Result<R, TrainError>>);

impl<R> Owed<R> {
    /// Waits for it.
    pub(crate) fn wait(self) -> Result<R, TrainError> {
        self.0.recv().unwrap_or_else(|_| {
            Err(TrainError::Fatal("a training thread panicked; see the worker's log".to_owned()))
        })
    }
}

impl<T: Number> Lane<T> {
    /// Starts the lane of the owned shard in `slot`. `replicas` are its autograd leaves, network by network.
    pub(crate) fn start(
        shard: LogicalShard,
        slot: usize,
        task: Box<dyn LaneTask>,
        replicas: &[Vars],
        rendezvous: Arc<Rendezvous>,
        permits: Arc<Permits>,
    ) -> Result<Self, TrainError> {
        let sink = Arc::new(Mutex::new(None::<Sink<T>>));
        let mut hooks = Vec::new();
        for (network, vars) in replicas.iter().enumerate() {
            for (index, (name, var)) in vars.parameters().enumerate() {
                let (sink, name) = (sink.clone(), name.to_owned());
                let deliver = move |gradient: &Tensor| match &mut *sink.lock() {
                    Some(sink) if usize::from(sink.learns) == network => sink.take(index, gradient),
                    _ => Err(NnError::Variable {
                        name: name.clone(),
                        problem: "got a gradient in a phase in which its network does not learn".to_owned(),
                    }),
                };
                hooks.push(on_gradient(&var.tensor, Box::new(deliver))?);
            }
        }
        let mut state = LaneState { shard, slot, task, sink, rendezvous, permits, _hooks: hooks };
        let (jobs, inbox) = unbounded::<Job<T>>();
        let thread = std::thread::Builder::new()
            .name(format!("lane-{}", shard.0))
            .spawn(move || {
                // One intra-op thread: the shard's bits must not depend on how many cores this worker has.
                tch::set_num_threads(1);
                for job in inbox {
                    job(&mut state);
                }
            })
            .map_err(|e| TrainError::Fatal(format!("cannot start a training thread: {e}")))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    fn submit<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut LaneState<T>) -> Result<R, TrainError> + Send + 'static,
    ) -> Owed<R> {
        let (answer, owed) = bounded(1);
        if let Some(jobs) = &self.jobs {
            // A lane that is gone drops the sender, which `Owed::wait` reports.
            let _ = jobs.send(Box::new(move |state| {
                let result = catch_unwind(AssertUnwindSafe(|| job(state))).unwrap_or_else(|payload| {
                    let text = payload.downcast_ref::<String>().map(String::as_str);
                    let text =
                        text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
                    Err(TrainError::Fatal(format!("internal error: a training thread panicked: {text}")))
                });
                if let Err(error) = &result {
                    // The other lanes may be waiting for this one.
                    state.rendezvous.fail(CollectiveError::Aborted(error.to_string()));
                }
                let _ = answer.send(result);
            }));
        }
        Owed(owed)
    }

    /// Runs one phase.
    pub(crate) fn run(&self, work: PhaseWork<T>) -> Owed<PhaseDone> {
        self.submit(move |state| {
            let done = state.run(work);
            *state.sink.lock() = None;
            done
        })
    }

    /// Runs `work` on this lane's networks in evaluation.
    pub(crate) fn evaluate<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut dyn LaneTask) -> Result<R, TrainError> + Send + 'static,
    ) -> Owed<R> {
        self.submit(move |state| {
            let permits = state.permits.clone();
            permits.with(|| tch::no_grad(|| work(state.task.as_mut())))
        })
    }
}

impl<T> Drop for Lane<T> {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported through `Owed`.
            let _ = thread.join();
        }
    }
}

impl<T: Number> LaneState<T> {
    fn run(&mut self, work: PhaseWork<T>) -> Result<PhaseDone, TrainError> {
        *self.sink.lock() = Some(Sink {
            slot: self.slot,
            learns: work.plan.learns,
            buckets: work.buckets.clone(),
            sums: BTreeMap::new(),
            last: false,
        });
        let permits = self.permits.clone();
        permits.with(|| self.compute(&work))
    }

    fn compute(&mut self, work: &PhaseWork<T>) -> Result<PhaseDone, TrainError> {
        let sync: Arc<dyn BatchNormSync> =
            Arc::new(PhaseSync { rendezvous: self.rendezvous.clone(), step: work.step, phase: work.phase });
        let audited = ShardSamples::of(&work.batch.samples);
        let mut forward = Forward::training(work.seed, work.step, self.shard, Vec::new(), sync);
        forward.phase = work.phase;
        let (mut forward_seconds, mut backward_seconds) = (0.0, 0.0);
        let mut figures = vec![0.0; work.plan.figures.len()];
        self.rendezvous.take_waited(self.slot);
        for piece in 0..work.pieces {
            if let Some(sink) = &mut *self.sink.lock() {
                sink.last = piece + 1 == work.pieces;
            }
            let batch = work.batch.piece(piece, work.pieces)?;
            forward.begin_piece(&batch.samples);

            fault::point(Point::Forward, work.step + 1);
            let start = Instant::now();
            let mut shard_loss = self.task.forward(&work.plan, &batch, &mut forward)?;
            forward_seconds += start.elapsed().as_secs_f64() - self.rendezvous.take_waited(self.slot);

            fault::point(Point::Backward, work.step + 1);
            let start = Instant::now();
            if shard_loss.loss.requires_grad() {
                backward(&shard_loss.loss)?;
            }
            if piece + 1 == work.pieces
                && let Some(sink) = &mut *self.sink.lock()
            {
                sink.finish()?;
            }
            let own = shard_loss.take_figures().map_err(NnError::from)?;
            figures.iter_mut().zip(own).for_each(|(sum, figure)| *sum += figure);
            backward_seconds += start.elapsed().as_secs_f64() - self.rendezvous.take_waited(self.slot);
        }
        Ok(PhaseDone {
            shard: self.shard,
            samples: audited,
            figures,
            records: forward.take_records()?,
            forward: forward_seconds,
            backward: backward_seconds,
        })
    }
}
