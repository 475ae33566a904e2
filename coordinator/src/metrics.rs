//! The coordinator's metrics.

use lockstep_common::ids::JobId;
use lockstep_common::wire::{JobState, StepRecord};
use lockstep_core::{Activity, Core};
use prometheus::{
    CounterVec, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, Opts, Registry,
    core::Collector,
};
use std::collections::BTreeMap;

/// Series of jobs that ended longer ago than this are dropped, so that their number stays bounded.
const ENDED_JOBS_MS: u64 = 3_600_000;

const STATES: [JobState; 7] = [
    JobState::Queued,
    JobState::Running,
    JobState::Stopping,
    JobState::Paused,
    JobState::Finished,
    JobState::Failed,
    JobState::Cancelled,
];

/// All metrics of a coordinator.
pub struct Metrics {
    jobs: GaugeVec,
    workers: GaugeVec,
    generation: GaugeVec,
    steps: CounterVec,
    samples: CounterVec,
    loss: GaugeVec,
    straggler: GaugeVec,
    refused: IntCounterVec,
    stale_messages: IntCounter,
    checkpoint_seconds: Histogram,
    checkpoints_unstored: GaugeVec,
    shard_hash_failures: IntCounter,
    per_job: parking_lot::Mutex<BTreeMap<JobId, Option<u64>>>,
}

impl Metrics {
    /// Makes the metrics and registers them in `registry`, which must not have them yet.
    pub fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let opts = |name: &str, help: &str| Opts::new(name, help);
        let buckets = vec![0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];
        let checkpoint =
            HistogramOpts::new("lockstep_checkpoint_seconds", "Time to receive and store a checkpoint");
        let stale = "Messages ignored because their generation was over";
        let metrics = Self {
            jobs: GaugeVec::new(opts("lockstep_jobs", "Jobs by state"), &["state"])?,
            workers: GaugeVec::new(opts("lockstep_workers", "Enrolled workers by state"), &["state"])?,
            generation: GaugeVec::new(opts("lockstep_generation", "A job's newest membership"), &["job"])?,
            steps: CounterVec::new(
                opts("lockstep_steps_total", "Committed steps, repeated ones too"),
                &["job"],
            )?,
            samples: CounterVec::new(opts("lockstep_samples_total", "Samples in committed steps"), &["job"])?,
            loss: GaugeVec::new(opts("lockstep_loss", "Loss of the newest step"), &["job"])?,
            straggler: GaugeVec::new(
                opts(
                    "lockstep_straggler_ratio",
                    "How many times the others' median a shard takes a persistently slow rank",
                ),
                &["job", "worker"],
            )?,
            refused: IntCounterVec::new(
                opts("lockstep_refused_connections_total", "Connections and requests refused"),
                &["reason"],
            )?,
            stale_messages: IntCounter::with_opts(opts("lockstep_stale_messages_total", stale))?,
            checkpoint_seconds: Histogram::with_opts(checkpoint.buckets(buckets))?,
            checkpoints_unstored: GaugeVec::new(
                opts(
                    "lockstep_checkpoints_unstored",
                    "A job's newest checkpoints in a row that could not be stored",
                ),
                &["job"],
            )?,
            shard_hash_failures: IntCounter::with_opts(opts(
                "lockstep_shard_hash_failures_total",
                "Dataset shards refused because their bytes do not match their hash",
            ))?,
            per_job: parking_lot::Mutex::default(),
        };
        let collectors: [Box<dyn Collector>; 12] = [
            Box::new(metrics.jobs.clone()),
            Box::new(metrics.workers.clone()),
            Box::new(metrics.generation.clone()),
            Box::new(metrics.steps.clone()),
            Box::new(metrics.samples.clone()),
            Box::new(metrics.loss.clone()),
            Box::new(metrics.straggler.clone()),
            Box::new(metrics.refused.clone()),
            Box::new(metrics.stale_messages.clone()),
            Box::new(metrics.checkpoint_seconds.clone()),
            Box::new(metrics.checkpoints_unstored.clone()),
            Box::new(metrics.shard_hash_failures.clone()),
        ];
        for collector in collectors {
            registry.register(collector)?;
        }
        Ok(metrics)
    }

    /// Counts a refused connection or request.
    pub fn refused(&self, reason: &str) {
        self.refused.with_label_values(&[reason]).inc();
    }

    /// Counts a dataset shard whose bytes do not match its hash.
    pub fn shard_refused(&self) {
        self.shard_hash_failures.inc();
    }

    /// Notes how long a checkpoint took.
    pub fn checkpoint_stored(&self, seconds: f64) {
        self.checkpoint_seconds.observe(seconds);
    }

    /// Notes how many of a job's checkpoints in a row could not be stored.
    pub fn checkpoints_unstored(&self, job: JobId, checkpoints: u64) {
        self.checkpoints_unstored.with_label_values(&[job.to_string()]).set(checkpoints as f64);
    }

    /// Notes committed steps of a job.
    pub fn stepped(&self, job: JobId, records: &[StepRecord]) {
        let label = [job.to_string()];
        self.steps.with_label_values(&label).inc_by(records.len() as f64);
        self.samples.with_label_values(&label).inc_by(records.iter().map(|r| r.samples as f64).sum());
        if let Some(loss) = records.last().and_then(|r| r.values.get("loss")) {
            self.loss.with_label_values(&label).set(*loss);
        }
    }

    /// Brings the gauges up to date with the core.
    pub fn observe(&self, core: &Core, now_ms: u64) {
        let mut per_job = self.per_job.lock();
        let mut by_state = [0.0; STATES.len()];
        for job in core.jobs() {
            if let Some(count) = STATES.iter().position(|s| *s == job.state) {
                by_state[count] += 1.0;
            }
            let is_final = job.state.is_final();
            if is_final {
                // Nobody stores any more; most jobs never had this series.
                let _ = self.checkpoints_unstored.remove_label_values(&[job.id.to_string()]);
            }
            if is_final && !per_job.contains_key(&job.id) {
                continue; // It ended long ago.
            }
            let ended = per_job.entry(job.id).or_default();
            *ended = is_final.then(|| ended.unwrap_or(now_ms));
            self.generation.with_label_values(&[job.id.to_string()]).set(job.generation.0 as f64);
        }
        // Those of a moment ago need not be stragglers now.
        self.straggler.reset();
        for job in core.jobs().filter(|job| job.state == JobState::Running) {
            for straggler in core.stragglers(job.id) {
                let labels = [job.id.to_string(), straggler.worker.to_string()];
                self.straggler.with_label_values(&labels).set(straggler.times);
            }
        }
        for (state, count) in STATES.iter().zip(by_state) {
            self.jobs.with_label_values(&[state.to_string()]).set(count);
        }
        for activity in Activity::ALL {
            let count = core.workers().filter(|w| w.activity == activity).count();
            self.workers.with_label_values(&[activity.as_str()]).set(count as f64);
        }
        self.stale_messages.inc_by(core.stale_messages().saturating_sub(self.stale_messages.get()));
        let old: Vec<_> = per_job
            .iter()
            .filter(|(_, at)| at.is_some_and(|at| at + ENDED_JOBS_MS < now_ms))
            .map(|(id, _)| *id)
            .collect();
        for id in old {
            per_job.remove(&id);
            let label = [id.to_string()];
            // A job that never stepped has no such series.
            for series in [&self.steps, &self.samples] {
                let _ = series.remove_label_values(&label);
            }
            for series in [&self.generation, &self.loss] {
                let _ = series.remove_label_values(&label);
            }
        }
    }
}
