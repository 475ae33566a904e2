//! The loop: for every step its phases, for every phase forward, backward, reduce, update.

use super::Number;
use super::buckets::{BucketPlan, decode_order, encode_order, initial_order};
use super::clock::{StepTimes, timed};
use super::compress::Shapes;
use super::compress::state::{self, NamedWire};
use super::device_buckets::Carrier;
use super::error::TrainError;
use super::gradients::Gradients;
use super::lane::{Lane, PhaseDone, PhaseWork};
use super::mismatch::{Mismatch, ReplicaReport};
use super::permits::Permits;
use super::phase::PhasePlan;
use super::rendezvous::Rendezvous;
use super::replica::{PhaseUpdate, RawTensors, Replica, learning_rate};
use super::samples;
use super::statistics::PhaseStatistics;
use super::wishes::Wishes;
use crate::data::loader::StepBatches;
use crate::fault::{self, Point};
use crate::lease::Lease;
use crate::state::desk::Desk;
use crate::tasks::TaskPlan;
use bytes::Bytes;
use lockstep_collectives::{CollectiveError, Group, Numbers, Pending, ReduceOp, Tag, TagKind};
use lockstep_common::audit::ShardSamples;
use lockstep_common::checkpoint::WIRE_FILE;
use lockstep_common::ids::{LogicalShard, Rank};
use lockstep_common::job::{BatchNorm, JobSpec};
use lockstep_common::wire::Position;
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Leads this worker's lanes through a job's steps.
pub(crate) struct Trainer<T> {
    pub(crate) job: JobSpec,
    pub(crate) plan: Arc<TaskPlan>,
    pub(crate) group: Group,
    pub(crate) replica: Replica,
    lanes: Vec<Lane<T>>,
    /// By network.
    buckets: Vec<Arc<BucketPlan>>,
    /// Whether the order of a network's buckets has been learnt.
    learnt: Vec<bool>,
    /// By network.
    wires: Vec<NamedWire<T>>,
    modes: Vec<BatchNorm>,
    /// Where those that follow get the updates.
    desk: Option<Arc<Desk>>,
    /// Without one, updates are applied at any time.
    lease: Option<Arc<Lease>>,
    /// Reduces a GPU's gradients.
    carrier: Option<Arc<dyn Carrier>>,
    device: Device,
    threads: usize,
    /// The replicas are compared before the updates of every so-manieth step.
    compared_every: u64,
}

/// What a step came to, the same on all ranks.
pub(crate) struct StepDone {
    /// Figures by name, averaged over the global batch.
    pub(crate) figures: BTreeMap<String, f64>,
    /// What the ranks together want.
    pub(crate) wishes: Wishes,
    /// What each logical shard was given.
    pub(crate) shards: Vec<ShardSamples>,
    pub(crate) times: StepTimes,
}

impl<T: Number> Trainer<T> {
    /// Builds the networks and starts a lane for every owned shard. The replicas are compared before the updates of every
    /// `compared_every`th step, or, with 0, of none.
    pub(crate) fn new(
        job: JobSpec,
        plan: Arc<TaskPlan>,
        group: Group,
        replica: Replica,
        threads: usize,
        compared_every: u64,
    ) -> Result<Self, TrainError> {
        let device = replica.device();
        let owned = group.placement().range(group.rank());
        let modes: Vec<_> = plan.networks.iter().map(|n| n.model.batch_norm).collect();
        let permits = Arc::new(Permits::new(threads));
        let rendezvous = Arc::new(Rendezvous::new(group.clone(), permits.clone(), threads));
        let mut lanes = Vec::new();
        for (slot, shard) in owned.enumerate() {
            let alias = |learns: bool| {
                let each = replica.vars.iter().map(|v| if learns { v.replica() } else { v.frozen() });
                each.collect::<Result<Vec<_>, _>>()
            };
            let (mut learning, mut frozen) = (alias(true)?, alias(false)?);
            let task = plan.lane(&mut learning, &mut frozen)?;
            let shard = LogicalShard(shard);
            lanes.push(Lane::start(shard, slot, task, &learning, rendezvous.clone(), permits.clone())?);
        }
        let owned = lanes.len();
        let wires = plan.networks.iter().zip(&replica.vars).map(|(network, vars)| {
            let parameters = vars.parameters().map(|(n, var)| (n.to_owned(), var.tensor.size())).collect();
            let shapes = Shapes { network: network.name, parameters };
            let wire = T::wire(&job, &shapes, owned);
            let parameters = shapes.parameters.into_iter().map(|(name, _)| name).collect();
            NamedWire { network: network.name, parameters, wire }
        });
        let mut trainer = Self {
            wires: wires.collect(),
            buckets: Vec::new(),
            learnt: vec![false; replica.vars.len()],
            job,
            plan,
            group,
            replica,
            lanes,
            modes,
            carrier: None,
            desk: None,
            lease: None,
            device,
            threads,
            compared_every,
        };
        for network in 0..trainer.replica.vars.len() {
            let order = initial_order(trainer.replica.vars[network].parameters().count());
            let buckets = trainer.bucket_plan(network, &order);
            trainer.buckets.push(buckets);
        }
        // One that was sealed in another generation is to be as it was then.
        if trainer.is_compared(trainer.replica.step) && !trainer.replica.is_sealed() {
            trainer.replica.seal()?;
        }
        Ok(trainer)
    }

    /// The same with gradients that stay in device memory until `carrier` takes them.
    pub(crate) fn carried_by(self, carrier: Option<Arc<dyn Carrier>>) -> Self {
        Self { carrier, ..self }
    }

    /// The same with updates that are shown at `desk`.
    pub(crate) fn followed_at(self, desk: Arc<Desk>) -> Self {
        Self { desk: Some(desk), ..self }
    }

    /// Applies updates only while `lease` holds.
    pub(crate) fn leased_by(self, lease: Arc<Lease>) -> Self {
        Self { lease: Some(lease), ..self }
    }

    fn bucket_plan(&self, network: usize, order: &[usize]) -> Arc<BucketPlan> {
        let vars = &self.replica.vars[network];
        Arc::new(BucketPlan::new(vars, order, self.job.collective.bucket_bytes, size_of::<T>()))
    }

    /// Ends the lanes; hands back the replica.
    pub(crate) fn into_replica(self) -> Replica {
        self.replica
    }

    /// The lanes, for evaluation.
    pub(crate) fn lanes(&self) -> &[Lane<T>] {
        &self.lanes
    }

    /// Runs the step that comes next on its `batches`, from the phase that comes next, and commits it. `wishes` are this
    /// rank's.
    pub(crate) fn step(
        &mut self,
        batches: StepBatches,
        total_steps: u64,
        steps_per_epoch: u64,
        wishes: Wishes,
    ) -> Result<StepDone, TrainError> {
        let result = self.try_step(batches, total_steps, steps_per_epoch, wishes);
        // All ranks come to the same verdict on their replicas, if nobody keeps the others from it.
        if let Err(error) = &result
            && !matches!(error, TrainError::Mismatch(_))
        {
            // Whoever still waits, here or elsewhere, hears the first cause.
            self.group.abort(match error {
                TrainError::Collective(cause) => cause.clone(),
                other => CollectiveError::Aborted(other.to_string()),
            });
        }
        result.map_err(|error| self.first_cause(error))
    }

    /// A lane that was woken by another one's failure reports the consequence; the group knows the cause.
    fn first_cause(&self, error: TrainError) -> TrainError {
        match (error, self.group.failure()) {
            (TrainError::Collective(_), Some(cause)) => TrainError::Collective(cause),
            (error, _) => error,
        }
    }

    fn try_step(
        &mut self,
        batches: StepBatches,
        total_steps: u64,
        steps_per_epoch: u64,
        wishes: Wishes,
    ) -> Result<StepDone, TrainError> {
        let Position { step, phase: applied } = self.replica.position();
        let mut done = StepDone {
            figures: BTreeMap::new(),
            wishes: Wishes::default(),
            shards: Vec::new(),
            times: StepTimes::default(),
        };
        let plan = self.plan.clone();
        let runs = |(_, phase): &(usize, &PhasePlan)| phase.minibatch < batches.minibatches.len();
        let last = plan.phases.iter().enumerate().filter(runs).map(|(phase, _)| phase).next_back();
        let phases = plan.phases.iter().enumerate().filter(runs);
        for (phase, phase_plan) in phases.skip_while(|(phase, _)| *phase < usize::from(applied)) {
            let minibatch = &batches.minibatches[phase_plan.minibatch];
            let commits = Some(phase) == last;
            let network = usize::from(phase_plan.learns);
            let lr = learning_rate(&self.job, &plan, network, step, total_steps, steps_per_epoch);
            let phase = phase as u16;
            let buckets: Arc<Gradients<T>> = Arc::new(Gradients::new(
                self.buckets[network].clone(),
                self.wires[network].wire.clone(),
                &self.group,
                self.carrier.as_ref(),
                self.device,
                step,
                phase,
            )?);
            let owed: Vec<_> = self
                .lanes
                .iter()
                .zip(minibatch)
                .map(|(lane, batch)| {
                    lane.run(PhaseWork {
                        plan: phase_plan.clone(),
                        phase,
                        step,
                        seed: self.job.seed,
                        batch: batch.share(),
                        pieces: self.job.accumulation as usize,
                        buckets: buckets.clone(),
                    })
                })
                .collect();
            // All lanes are waited for, even after a failure: none may still use the weights afterwards.
            let lanes: Vec<Result<PhaseDone, TrainError>> = owed.into_iter().map(|o| o.wait()).collect();
            let lanes = first_failure(lanes)?;
            let forward: f64 = lanes.iter().map(|l| l.forward).sum();
            let backward: f64 = lanes.iter().map(|l| l.backward).sum();
            let parallel = self.threads.min(lanes.len()).max(1) as f64;
            done.times.forward += forward / parallel;
            done.times.backward += backward / parallel;

            self.fail_on_purpose(Point::Reduce, step + 1)?;
            let figures = self.share_figures(step, phase, &lanes, &wishes)?;
            let records = lanes.into_iter().map(|l| l.records).collect();
            let statistics = PhaseStatistics::start(&self.group, step, phase, &self.modes, records)?;
            let comparison = self.is_compared(step).then(|| {
                let report = timed(&mut done.times.check, || self.report(false))?;
                self.start_comparison(Tag::new(step, phase, TagKind::Digest), report)
            });
            let comparison = comparison.transpose()?;
            let (gradients, statistics, figures) =
                timed(&mut done.times.gradients, || -> Result<_, TrainError> {
                    Ok((buckets.wait(self.device)?, statistics.finish()?, figures.wait()?))
                })?;
            let (mut figures, shards) = self.take_figures(phase_plan, &figures, step, &mut done.wishes)?;
            if phase_plan.learns == 0 {
                figures.insert("lr".to_owned(), lr);
            }
            if let Some(comparison) = comparison {
                self.judge(comparison)?;
            }
            // Nothing that can fail on one rank alone comes after the update.
            if !self.learnt[network] {
                self.learn_order(step, phase, network, &buckets)?;
            }
            fault::point(Point::Optimizer, step + 1);
            if let Some(lease) = &self.lease {
                lease.check()?;
            }
            let seen = plan.phases[..usize::from(phase)].iter().any(|p| p.minibatch == phase_plan.minibatch);
            self.replica.note_samples(shards, !seen);
            let update = PhaseUpdate { phase, commits, network, lr, gradients, statistics, figures };
            if let Some(desk) = self.desk.as_ref().filter(|desk| desk.is_followed()) {
                desk.note(&update, self.replica.position())?;
            }
            if fault::flips(Point::Optimizer, step + 1) {
                update.flip_bit()?;
            }
            let seals = self.is_compared(update.after(self.replica.position()).step);
            let committed =
                timed(&mut done.times.optimizer, || self.replica.apply(update, &self.job.clip, seals))?;
            done.figures.extend(committed.into_iter().flatten());
        }
        match self.replica.step == step {
            true => Err(TrainError::Fatal(format!("no phase is left in step {}", step + 1))),
            false => {
                done.shards = self.replica.take_samples();
                Ok(done)
            }
        }
    }

    /// Adds the shards' figures, what they were given, and the ranks' wishes, over all shards.
    fn share_figures(
        &self,
        step: u64,
        phase: u16,
        lanes: &[PhaseDone],
        wishes: &Wishes,
    ) -> Result<Pending<Numbers<f64>>, TrainError> {
        let leaf = |(slot, lane): (usize, &PhaseDone)| {
            let samples = samples::leaf(self.job.logical_shards, lane.shard, lane.samples);
            lane.figures.iter().copied().chain(samples).chain(wishes.to_numbers(slot)).collect::<Vec<f64>>()
        };
        let tag = Tag::new(step, phase, TagKind::Commit);
        Ok(self.group.all_reduce(tag, lanes.iter().enumerate().map(leaf).collect(), ReduceOp::Sum)?)
    }

    /// Names the summed figures and what the shards were given; adds what the ranks together want to `wishes`.
    fn take_figures(
        &self,
        phase: &PhasePlan,
        sums: &[f64],
        step: u64,
        wishes: &mut Wishes,
    ) -> Result<(BTreeMap<String, f64>, Vec<ShardSamples>), TrainError> {
        let mut figures = BTreeMap::new();
        for (name, value) in phase.figures.iter().zip(sums) {
            if name.starts_with("loss") && !value.is_finite() {
                return Err(TrainError::Fatal(format!(
                    "the {} phase's {name} became {value} at step {}; lower the learning rate, or clip the gradient",
                    phase.name,
                    step + 1
                )));
            }
            figures.insert((*name).to_owned(), *value);
        }
        let rest = sums.get(phase.figures.len()..).unwrap_or_default();
        let (shards, rest) = samples::split(rest, self.job.logical_shards);
        wishes.add(rest);
        Ok((figures, shards))
    }

    /// From the next step on, buckets are packed in the order in which rank 0 saw the gradients become final.
    fn learn_order(
        &mut self,
        step: u64,
        phase: u16,
        network: usize,
        buckets: &Gradients<T>,
    ) -> Result<(), TrainError> {
        let own = (self.group.rank() == Rank(0)).then(|| encode_order(&buckets.observed_order()));
        let tag = Tag::new(step, phase, TagKind::Broadcast);
        let bytes = self.group.broadcast(tag, Rank(0), own)?.wait()?;
        let parameters = self.buckets[network].parameters();
        let order = decode_order(&bytes, parameters).ok_or_else(|| {
            TrainError::Fatal("rank 0 sent an order of gradients that is not a permutation".to_owned())
        })?;
        self.buckets[network] = self.bucket_plan(network, &order);
        self.learnt[network] = true;
        Ok(())
    }

    /// Runs `work` with the averages of the weights in their place, where the job keeps some.
    pub(crate) fn averaged<R>(
        &mut self,
        work: impl FnOnce(&Self) -> Result<R, TrainError>,
    ) -> Result<R, TrainError> {
        self.replica.exchange_averages()?;
        let result = work(self);
        self.replica.exchange_averages()?;
        result
    }

    /// What the wires of all ranks keep, for a checkpoint of this step; nothing where they keep nothing. Every rank
    /// calls this.
    pub(crate) fn wire_state(&self) -> Result<Option<RawTensors>, TrainError> {
        state::collect(&self.wires, &self.group, self.replica.step)
    }

    /// Takes over the checkpoint's part of [`Self::wire_state`] that belongs to the owned shards.
    pub(crate) fn restore_wires(&self, saved: Option<&BTreeMap<String, Tensor>>) -> Result<(), TrainError> {
        match saved {
            Some(saved) => state::restore(&self.wires, &self.group, saved),
            None if state::is_kept(&self.wires) => Err(TrainError::Fatal(format!(
                "the checkpoint has no {WIRE_FILE}, which this `wire` goes on from"
            ))),
            None => Ok(()),
        }
    }

    /// Compares weights, buffers and optimizers' states of all replicas; returns the digest of the weights and buffers.
    pub(crate) fn compare_replicas(&self) -> Result<String, TrainError> {
        let weights = self.replica.weights_digest()?;
        let report = self.report(true)?;
        // The next step's own comparison has the same position.
        let tag = Tag::new(self.replica.step, 0, TagKind::Digest).index(1);
        self.judge(self.start_comparison(tag, report)?)?;
        Ok(weights)
    }

    /// Whether the replicas are compared before the updates of the step after `step` are applied.
    fn is_compared(&self, step: u64) -> bool {
        self.compared_every > 0 && (step + 1).is_multiple_of(self.compared_every)
    }

    /// What this rank says of its replica, after it has looked at it, [`wholly`](Replica::examine) or not.
    fn report(&self, wholly: bool) -> Result<ReplicaReport, TrainError> {
        let (fingerprint, is_intact) = self.replica.examine(wholly)?;
        Ok(ReplicaReport { digest: fingerprint.to_vec(), is_intact })
    }

    /// Tells the others `report` and asks for theirs.
    fn start_comparison(&self, tag: Tag, report: ReplicaReport) -> Result<Pending<Vec<Bytes>>, TrainError> {
        Ok(self.group.all_gather(tag, report.into_bytes())?)
    }

    /// Goes on if all replicas are intact and the same.
    fn judge(&self, comparison: Pending<Vec<Bytes>>) -> Result<(), TrainError> {
        let reports: Vec<_> =
            comparison.wait()?.iter().map(|bytes| ReplicaReport::from_bytes(bytes)).collect();
        let is_guarded = self.compared_every == 1;
        match Mismatch::find(self.replica.position(), &reports, is_guarded) {
            Some(mismatch) => Err(TrainError::Mismatch(mismatch)),
            None => Ok(()),
        }
    }

    /// Has happen what [`fault`] has for this point of this step.
    pub(crate) fn fail_on_purpose(&self, point: Point, step: u64) -> Result<(), TrainError> {
        fault::point(point, step);
        match fault::flips(point, step) {
            true => self.replica.flip_bit(),
            false => Ok(()),
        }
    }
}

/// All results, or the most telling error: one that is not the mere consequence of another lane's.
fn first_failure<R>(results: Vec<Result<R, TrainError>>) -> Result<Vec<R>, TrainError> {
    let mut done = Vec::with_capacity(results.len());
    let mut failure: Option<TrainError> = None;
    for result in results {
        match result {
            Ok(value) => done.push(value),
            Err(error) => {
                let consequence = matches!(error, TrainError::Collective(CollectiveError::Aborted(_)));
                if failure.is_none() || !consequence {
                    failure = Some(error);
                }
            }
        }
    }
    failure.map_or(Ok(done), Err)
}
