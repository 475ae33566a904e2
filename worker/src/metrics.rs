//! The worker's Prometheus metrics.

use crate::train::clock::{PARTS, StepTimes};
use anyhow::Result;
use lockstep_collectives::Stats;
use lockstep_common::http::process_registry;
use prometheus::{
    Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    exponential_buckets,
};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

#[derive(Clone)]
pub(crate) struct Metrics(Arc<Inner>);

struct Inner {
    registry: Registry,
    steps: IntCounter,
    samples: IntCounter,
    phase_seconds: HistogramVec,
    loss: Gauge,
    collective_bytes: IntCounterVec,
    collective_wait: Gauge,
    stale_frames: IntCounter,
    generation: IntGauge,
    workers: IntGauge,
    checkpoint_seconds: Histogram,
    checkpoint_pause: Histogram,
    digest_seconds: Histogram,
    mismatches: IntCounter,
    shard_hash_failures: IntCounter,
    shard_fetches: IntCounter,
}

impl Metrics {
    pub(crate) fn new() -> Result<Self> {
        let registry = process_registry();
        // From a fraction of a millisecond (an optimizer step of a small network) to minutes.
        let seconds = exponential_buckets(0.000_25, 2.0, 20)?;
        let inner = Inner {
            steps: IntCounter::new("lockstep_steps_total", "Steps committed by this worker")?,
            samples: IntCounter::new(
                "lockstep_samples_total",
                "Training samples of the committed steps, all ranks",
            )?,
            phase_seconds: HistogramVec::new(
                HistogramOpts::new("lockstep_step_phase_seconds", "Wall time of each part of a step")
                    .buckets(seconds.clone()),
                &["phase"],
            )?,
            loss: Gauge::new("lockstep_loss", "Training loss of the last committed step")?,
            collective_bytes: IntCounterVec::new(
                Opts::new(
                    "lockstep_collective_bytes_total",
                    "Bytes of collectives sent to and received from peers",
                ),
                &["direction"],
            )?,
            collective_wait: Gauge::new(
                "lockstep_collective_wait_seconds",
                "How long the oldest collective has been in flight; 0 if there is none",
            )?,
            stale_frames: IntCounter::new(
                "lockstep_stale_messages_total",
                "Messages refused because they belong to an old generation",
            )?,
            generation: IntGauge::new(
                "lockstep_generation",
                "The generation this worker is in; 0 outside of a job",
            )?,
            workers: IntGauge::new("lockstep_workers", "Workers in this worker's job; 0 outside of a job")?,
            checkpoint_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "lockstep_checkpoint_seconds",
                    "From copying this rank's share of the state to the whole checkpoint's being durable",
                )
                .buckets(seconds.clone()),
            )?,
            checkpoint_pause: Histogram::with_opts(
                HistogramOpts::new(
                    "lockstep_checkpoint_pause_seconds",
                    "For how long training stands still for a checkpoint: to copy this rank's share",
                )
                .buckets(seconds.clone()),
            )?,
            digest_seconds: Histogram::with_opts(
                HistogramOpts::new(
                    "lockstep_replica_digest_seconds",
                    "What the comparisons of the replicas in a step, or after it, take from training",
                )
                .buckets(seconds),
            )?,
            mismatches: IntCounter::new(
                "lockstep_replica_mismatches_total",
                "Times that this worker's replica was not what it should be",
            )?,
            shard_hash_failures: IntCounter::new(
                "lockstep_shard_hash_failures_total",
                "Dataset shards refused because their bytes did not match their hash",
            )?,
            shard_fetches: IntCounter::new(
                "lockstep_shard_fetches_total",
                "Dataset shards fetched from the coordinator",
            )?,
            registry,
        };
        let r = &inner.registry;
        r.register(Box::new(inner.steps.clone()))?;
        r.register(Box::new(inner.samples.clone()))?;
        r.register(Box::new(inner.phase_seconds.clone()))?;
        r.register(Box::new(inner.loss.clone()))?;
        r.register(Box::new(inner.collective_bytes.clone()))?;
        r.register(Box::new(inner.collective_wait.clone()))?;
        r.register(Box::new(inner.stale_frames.clone()))?;
        r.register(Box::new(inner.generation.clone()))?;
        r.register(Box::new(inner.workers.clone()))?;
        r.register(Box::new(inner.checkpoint_seconds.clone()))?;
        r.register(Box::new(inner.checkpoint_pause.clone()))?;
        r.register(Box::new(inner.digest_seconds.clone()))?;
        r.register(Box::new(inner.mismatches.clone()))?;
        r.register(Box::new(inner.shard_hash_failures.clone()))?;
        r.register(Box::new(inner.shard_fetches.clone()))?;
        for part in PARTS {
            inner.phase_seconds.with_label_values(&[part]);
        }
        for direction in ["sent", "received"] {
            inner.collective_bytes.with_label_values(&[direction]);
        }
        Ok(Self(Arc::new(inner)))
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// A generation has begun (or, with zeros, ended).
    pub(crate) fn membership(&self, generation: u64, workers: u32) {
        self.0.generation.set(generation as i64);
        self.0.workers.set(i64::from(workers));
    }

    /// A step has been committed.
    pub(crate) fn step(&self, figures: &BTreeMap<String, f64>, samples: u64, times: &StepTimes, wall: f64) {
        self.0.steps.inc();
        self.0.samples.inc_by(samples);
        if let Some(loss) = figures.get("loss") {
            self.0.loss.set(*loss);
        }
        for (part, seconds) in PARTS.iter().zip(times.parts(wall)) {
            self.0.phase_seconds.with_label_values(&[part]).observe(seconds);
        }
    }

    /// What the collectives have moved between two readings.
    pub(crate) fn collectives(&self, before: &Stats, now: &Stats) {
        let bytes = |direction| self.0.collective_bytes.with_label_values(&[direction]);
        bytes("sent").inc_by(now.bytes_sent.saturating_sub(before.bytes_sent));
        bytes("received").inc_by(now.bytes_received.saturating_sub(before.bytes_received));
        self.0.stale_frames.inc_by(now.stale_frames.saturating_sub(before.stale_frames));
    }

    /// How long the oldest collective has been in flight.
    pub(crate) fn collective_wait(&self, wait: Duration) {
        self.0.collective_wait.set(wait.as_secs_f64());
    }

    /// What the shard cache has seen since this worker started.
    pub(crate) fn shards(&self, hash_failures: u64, fetches: u64) {
        for (counter, total) in
            [(&self.0.shard_hash_failures, hash_failures), (&self.0.shard_fetches, fetches)]
        {
            counter.inc_by(total.saturating_sub(counter.get()));
        }
    }

    /// Training has stood still for a checkpoint.
    pub(crate) fn paused(&self, seconds: f64) {
        self.0.checkpoint_pause.observe(seconds);
    }

    /// The replicas have been compared.
    pub(crate) fn compared(&self, seconds: f64) {
        self.0.digest_seconds.observe(seconds);
    }

    /// This worker's replica was not what the others' were.
    pub(crate) fn mismatched(&self) {
        self.0.mismatches.inc();
    }

    /// A checkpoint is durable.
    pub(crate) fn checkpoint(&self, seconds: f64) {
        self.0.checkpoint_seconds.observe(seconds);
    }
}
