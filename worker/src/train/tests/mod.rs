//! Whole training runs with all ranks in this process: the result must not depend on how many there are.

mod audit;
mod evaluation;
mod guard;
mod recipes;
pub(crate) mod recovery;
mod systems;
mod whitening;

use super::Number;
use super::error::TrainError;
use super::evaluate::evaluate;
use super::replica::{PhaseUpdate, RawTensors, Replica};
use super::trainer::{StepDone, Trainer};
use super::wishes::Wishes;
use crate::data::batch::Decoder;
use crate::data::loader::{Loader, Timetable};
use crate::data::pool::Pool;
use crate::data::preparation::{Basis, Use};
use crate::evaluation::report::Report;
use crate::tasks::TaskPlan;
use lockstep_collectives::{CollectiveError, Group};
use lockstep_common::dataset::{DatasetReader, ShardCache, Store};
use lockstep_common::job::JobSpec;
use lockstep_common::placement::Placement;
use lockstep_common::rng::Stream;
use lockstep_common::sampler::Sampler;
use lockstep_common::wire::Position;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// 70 images of 8 × 8 and their labels: an epoch of nine batches of 8, the last of them uneven.
fn write_idx(folder: &Path) {
    let mut stream = Stream::new(3, "images", &[]);
    let mut images = vec![0, 0, 8, 3, 0, 0, 0, 70, 0, 0, 0, 8, 0, 0, 0, 8];
    let mut labels = vec![0, 0, 8, 1, 0, 0, 0, 70];
    for _ in 0..70 {
        let label = stream.below(4) as u8;
        labels.push(label);
        images
            .extend((0..64).map(|i| if i / 16 == u64::from(label) { 200 } else { stream.below(100) as u8 }));
    }
    std::fs::write(folder.join("train-images-idx3-ubyte"), images).unwrap();
    std::fs::write(folder.join("train-labels-idx1-ubyte"), labels).unwrap();
}

/// A store with those images as `tiny/train`, and with their whitening as `tiny/white`.
fn tiny() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    write_idx(folder.path());
    let store = Store::open(&folder.path().join("store")).unwrap();
    store.import_idx("tiny", folder.path(), |_| {}).unwrap();
    store.whiten("tiny/train", "tiny/white", |_| {}).unwrap();
    (folder, store)
}

/// The file of a job of these networks.
pub(crate) fn job_text(networks: &str, more: &str) -> String {
    format!(
        "name = \"test\"\nseed = 5\nepochs = 2\nglobal_batch = 8\nlogical_shards = 4\n{more}\n{networks}\n\
         [data]\ntrain = \"tiny/train\"\ntest = \"tiny/train\"\n[optimizer]\nname = \"adam\"\nlr = 0.01\n"
    )
}

pub(crate) fn job(networks: &str, more: &str) -> JobSpec {
    JobSpec::parse("test.toml", &job_text(networks, more)).unwrap()
}

struct Outcome {
    digest: String,
    losses: Vec<f64>,
    evaluation: Option<Report>,
    saved: Saved,
}

/// What a checkpoint has.
struct Saved {
    step: u64,
    weights: RawTensors,
    optimizer: RawTensors,
    wires: Option<RawTensors>,
}

fn unpacked(tensors: &RawTensors) -> BTreeMap<String, Tensor> {
    tensors.iter().map(|(name, raw)| (name.clone(), raw.to_tensor().unwrap())).collect()
}

/// Trains `job` on `ranks` ranks; all of them must agree.
fn train<T: Number>(job: &JobSpec, ranks: u32, threads: usize) -> Outcome {
    train_part::<T>(job, ranks, threads, None, None)
}

/// The same from `saved` on, up to the step `until`.
fn train_part<T: Number>(
    job: &JobSpec,
    ranks: u32,
    threads: usize,
    saved: Option<&Saved>,
    until: Option<u64>,
) -> Outcome {
    let (folder, store) = tiny();
    let placement = Placement::even(job.logical_shards, ranks);
    let groups = Group::in_process(&placement, job.reduction, Duration::from_secs(60)).unwrap();
    let mut outcomes: Vec<Outcome> = std::thread::scope(|scope| {
        let runs: Vec<_> = groups
            .into_iter()
            .map(|group| {
                let cache = folder.path().join(format!("cache-{}", group.rank().0));
                let store = &store;
                scope.spawn(move || {
                    // Many tests run at a time, and an idle thread of libtorch's spins.
                    tch::set_num_threads(1);
                    let cache = ShardCache::new(&cache, 1 << 30).unwrap();
                    let cache = Arc::new(cache.with_local([store.shards_dir().to_owned()]));
                    run::<T>(job, group, store, &cache, threads, saved, until)
                })
            })
            .collect();
        runs.into_iter().map(|r| r.join().unwrap()).collect()
    });
    let first = outcomes.remove(0);
    for other in outcomes {
        assert_eq!(other.digest, first.digest);
        assert_eq!(other.losses, first.losses);
        assert_eq!(other.evaluation, first.evaluation);
        assert!(other.saved.wires.is_none(), "only rank 0 has what goes into a checkpoint");
    }
    first
}

/// A trainer of `plan` and its data, from its replica's next step on.
pub(crate) struct Bench<T> {
    pub(crate) trainer: Trainer<T>,
    loader: Loader,
    test: Arc<Decoder<T>>,
    total: u64,
    per_epoch: u64,
}

impl<T: Number> Bench<T> {
    fn new(
        job: &JobSpec,
        plan: TaskPlan,
        group: Group,
        store: &Store,
        cache: &Arc<ShardCache>,
        threads: usize,
        replica: Replica,
    ) -> Self {
        let pool = Arc::new(Pool::new(2).unwrap());
        let decoder = |purpose| {
            let manifest = Arc::new(store.manifest(&job.data.train).unwrap());
            let reader = DatasetReader::new(manifest, cache.clone()).unwrap();
            let basis = Basis::read(&job.data, &reader).unwrap();
            let pool = pool.clone();
            Decoder::<T>::new(reader, &job.data, purpose, &basis, job.seed, Device::Cpu, pool).unwrap()
        };
        let sampler =
            Sampler::new(job.seed, 70, u64::from(job.global_batch), job.logical_shards, true).unwrap();
        let timetable = Timetable { sampler: Arc::new(sampler), per_step: plan.minibatches as u64 };
        let (per_epoch, total) = (timetable.steps_per_epoch(), job.total_steps(timetable.steps_per_epoch()));
        let shards = group.placement().range(group.rank());
        let next = replica.step;
        let trainer = Trainer::<T>::new(job.clone(), Arc::new(plan), group, replica, threads, 1).unwrap();
        let loader = Loader::start(decoder(Use::Train), timetable, shards, next..total).unwrap();
        Self {
            trainer,
            loader,
            test: Arc::new(decoder(Use::Evaluate(job.evaluation.crops))),
            total,
            per_epoch,
        }
    }

    /// One step.
    pub(crate) fn try_step(&mut self, wishes: Wishes) -> Result<StepDone, TrainError> {
        let batches = self.loader.next(&AtomicBool::new(false))?;
        self.trainer.step(batches, self.total, self.per_epoch, wishes)
    }

    /// One step; its loss.
    pub(crate) fn step(&mut self) -> f64 {
        let done = self.try_step(Wishes::default()).unwrap();
        done.figures.get("loss").copied().unwrap_or(f64::NAN)
    }
}

fn run<T: Number>(
    job: &JobSpec,
    group: Group,
    store: &Store,
    cache: &Arc<ShardCache>,
    threads: usize,
    saved: Option<&Saved>,
    until: Option<u64>,
) -> Outcome {
    let plan = TaskPlan::new(job);
    let mut replica = Replica::new(&plan, T::KIND, Device::Cpu).unwrap();
    if let Some(saved) = saved {
        let (weights, optimizer) = (unpacked(&saved.weights), unpacked(&saved.optimizer));
        replica.restore(&plan, Position::at(saved.step), &weights, &optimizer).unwrap();
    }
    let mut bench = Bench::<T>::new(job, plan, group, store, cache, threads, replica);
    if let Some(saved) = saved {
        bench.trainer.restore_wires(saved.wires.as_ref().map(unpacked).as_ref()).unwrap();
    }
    let steps = bench.trainer.replica.step..until.unwrap_or(bench.total);
    let losses = steps.map(|_| bench.step()).collect();
    let test = bench.test.clone();
    let evaluation = bench
        .trainer
        .plan
        .is_evaluated
        .then(|| bench.trainer.averaged(|trainer| evaluate(trainer, &test)).unwrap());
    let (trainer, replica) = (&bench.trainer, &bench.trainer.replica);
    let saved = Saved {
        step: replica.step,
        weights: replica.weights().unwrap(),
        optimizer: replica.optimizer_state(&trainer.plan).unwrap(),
        wires: trainer.wire_state().unwrap(),
    };
    Outcome { digest: trainer.compare_replicas().unwrap(), losses, evaluation, saved }
}

pub(crate) fn classifier(batch_norm: &str) -> String {
    format!(
        "task = \"classify\"\n[model]\nname = \"small-cnn\"\nclasses = 4\nwidth = 4\nbatch_norm = \"{batch_norm}\""
    )
}

pub(crate) const GAN: &str = "task = \"gan\"\n[generator]\nname = \"gan-generator\"\nlatent = 6\nhidden = 10\noutputs = 64\n\
    [discriminator]\nname = \"gan-discriminator\"\ninputs = 64\nhidden = 8\n[gan]\ndiscriminator_steps = 2";

#[test]
fn every_number_of_workers_ends_with_the_same_weights() {
    for batch_norm in ["sync", "local", "none"] {
        let job = job(&classifier(batch_norm), "");
        let alone = train::<f32>(&job, 1, 1);
        for (ranks, threads) in [(1, 4), (2, 1), (3, 2), (4, 1)] {
            assert_eq!(
                train::<f32>(&job, ranks, threads).digest,
                alone.digest,
                "{batch_norm}, {ranks} ranks"
            );
        }
        assert!(alone.losses.last() < alone.losses.first(), "{:?}", alone.losses);
    }
}

#[test]
fn a_gan_ends_with_the_same_weights_on_every_number_of_workers() {
    let job = job(GAN, "");
    let alone = train::<f32>(&job, 1, 1);
    for ranks in [2, 3, 4] {
        assert_eq!(train::<f32>(&job, ranks, 1).digest, alone.digest, "{ranks} ranks");
    }
}

/// The negative control: added in another order, the same gradients come to other bits.
#[test]
fn fast_reduction_depends_on_the_number_of_workers() {
    let job = job(&classifier("none"), "reduction = \"fast\"");
    assert_ne!(train::<f32>(&job, 1, 1).digest, train::<f32>(&job, 3, 1).digest);
}

#[test]
fn batch_norm_modes_and_seeds_end_with_different_weights() {
    let digest = |job: &JobSpec| train::<f64>(job, 1, 1).digest;
    let (sync, local) = (job(&classifier("sync"), ""), job(&classifier("local"), ""));
    let mut reseeded = sync.clone();
    reseeded.seed += 1;
    assert_ne!(digest(&sync), digest(&local));
    assert_ne!(digest(&sync), digest(&reseeded));
}

/// `networks` with gradients that travel as `wire`, in several buckets.
fn over(wire: &str, networks: &str, bucket_bytes: u64) -> JobSpec {
    let rank = if wire == "powersgd" { "wire_rank = 1" } else { "" };
    let collective = format!("[collective]\nwire = \"{wire}\"\nbucket_bytes = {bucket_bytes}\n{rank}");
    job(&format!("{networks}\n{collective}"), "")
}

#[test]
fn every_wire_ends_with_the_same_weights_on_every_number_of_workers_and_in_every_packing() {
    let plain = train::<f32>(&job(&classifier("sync"), ""), 1, 1).digest;
    for wire in ["bf16", "int8", "powersgd"] {
        for networks in [&classifier("sync"), GAN] {
            let alone = train::<f32>(&over(wire, networks, 2048), 1, 1);
            for (ranks, bucket_bytes) in [(1, 1 << 20), (2, 2048), (3, 1 << 20), (4, 1024)] {
                let other = train::<f32>(&over(wire, networks, bucket_bytes), ranks, 1);
                assert_eq!(other.digest, alone.digest, "{wire}, {ranks} ranks, {bucket_bytes} bytes");
                assert_eq!(other.saved.wires, alone.saved.wires, "{wire}, {ranks} ranks");
            }
            assert_ne!(alone.digest, plain, "{wire} was not used");
            if networks != GAN {
                assert!(alone.losses.last() < alone.losses.first(), "{wire}: {:?}", alone.losses);
            }
        }
    }
}

#[test]
fn a_run_resumes_with_what_its_wires_kept_on_another_number_of_workers() {
    for wire in ["int8", "powersgd"] {
        for networks in [&classifier("sync"), GAN] {
            let job = over(wire, networks, 2048);
            let undisturbed = train::<f32>(&job, 2, 1);
            let mut saved = train_part::<f32>(&job, 3, 1, None, Some(5)).saved;
            let resumed = train_part::<f32>(&job, 2, 1, Some(&saved), None);
            assert_eq!(resumed.digest, undisturbed.digest, "{wire}");
            assert_eq!(resumed.saved.wires, undisturbed.saved.wires, "{wire}");
            // The negative control: what the wires kept does matter.
            let mut zeros = saved.wires.clone().unwrap();
            let feedback = zeros.iter_mut().filter(|(name, _)| name.contains("/feedback/"));
            feedback.for_each(|(_, tensor)| tensor.bytes.fill(0));
            saved.wires = Some(zeros);
            assert_ne!(
                train_part::<f32>(&job, 2, 1, Some(&saved), None).digest,
                undisturbed.digest,
                "{wire}"
            );
        }
    }
}

/// Which tensors of generator and discriminator change in a step that has only the phases that learn `network`.
fn changed_by(network: u16) -> Vec<String> {
    let (folder, store) = tiny();
    let cache = ShardCache::new(&folder.path().join("cache"), 1 << 30).unwrap();
    let cache = Arc::new(cache.with_local([store.shards_dir().to_owned()]));
    let job = job(GAN, "");
    let mut plan = TaskPlan::new(&job);
    plan.phases.retain(|p| p.learns == network);
    assert!(!plan.phases.is_empty());
    let group = Group::solo(Placement::even(4, 1), job.reduction).unwrap();
    let replica = Replica::new(&plan, Kind::Double, Device::Cpu).unwrap();
    let mut bench = Bench::<f64>::new(&job, plan, group, &store, &cache, 2, replica);
    let before = bench.trainer.replica.weights().unwrap();
    bench.step();
    let after = bench.trainer.replica.weights().unwrap();
    before.keys().filter(|name| before[*name] != after[*name]).cloned().collect()
}

#[test]
fn each_gan_phase_changes_its_own_network_only() {
    let (generator, discriminator) = (changed_by(0), changed_by(1));
    assert!(!generator.is_empty() && generator.iter().all(|n| n.starts_with("generator.")), "{generator:?}");
    assert!(
        !discriminator.is_empty() && discriminator.iter().all(|n| n.starts_with("discriminator.")),
        "{discriminator:?}"
    );
}
