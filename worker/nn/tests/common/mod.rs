//! Several logical shards in the threads of one process, with the exchange that workers do over sockets.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

pub mod formula;

use lockstep_common::ids::LogicalShard;
use lockstep_common::job::{BatchNorm, ModelSpec, OptimizerSpec};
use lockstep_nn::NnError;
use lockstep_nn::forward::{BatchNormSync, BnCall, BnRecord, Forward};
use lockstep_nn::moments::{apply_running_stats, average_records, merge_moments, weighted_records};
use lockstep_nn::optim::Optimizer;
use lockstep_nn::vars::Vars;
use lockstep_nn::{loss, models, shim};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;
use tch::{Kind, Tensor};

/// Merges in shard order once all shards have arrived.
pub struct Rendezvous {
    shards: usize,
    calls: Mutex<HashMap<BnCall, Call>>,
    arrived: Condvar,
}

#[derive(Default)]
struct Call {
    parts: BTreeMap<LogicalShard, Vec<f64>>,
    taken: usize,
}

impl Rendezvous {
    pub fn new(shards: usize) -> Arc<Self> {
        Arc::new(Self { shards, calls: Mutex::default(), arrived: Condvar::new() })
    }

    fn exchange(
        &self,
        call: BnCall,
        shard: LogicalShard,
        local: Vec<f64>,
        add: fn(&mut [f64], &[f64]),
    ) -> Result<Vec<f64>, NnError> {
        let mut calls = self.calls.lock().unwrap();
        assert!(
            calls.entry(call).or_default().parts.insert(shard, local).is_none(),
            "{shard} calls twice: {call:?}"
        );
        self.arrived.notify_all();
        let complete = |calls: &mut HashMap<BnCall, Call>| calls[&call].parts.len() < self.shards;
        let (mut calls, timeout) =
            self.arrived.wait_timeout_while(calls, Duration::from_secs(60), complete).unwrap();
        assert!(!timeout.timed_out(), "{shard} waits in vain at {call:?}");
        let entry = calls.get_mut(&call).unwrap();
        let mut parts = entry.parts.values();
        let mut merged = parts.next().unwrap().clone();
        parts.for_each(|part| add(&mut merged, part));
        entry.taken += 1;
        if entry.taken == self.shards {
            calls.remove(&call);
        }
        Ok(merged)
    }
}

fn add(into: &mut [f64], other: &[f64]) {
    into.iter_mut().zip(other).for_each(|(a, b)| *a += b);
}

impl BatchNormSync for Rendezvous {
    fn merge_moments(&self, call: BnCall, shard: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        assert!(!call.backward);
        self.exchange(call, shard, local, merge_moments)
    }

    fn sum(&self, call: BnCall, shard: LogicalShard, local: Vec<f64>) -> Result<Vec<f64>, NnError> {
        assert!(call.backward);
        self.exchange(call, shard, local, add)
    }

    fn is_alone(&self) -> bool {
        false
    }
}

/// A classifier trained data-parallel by threads.
pub struct Trainer {
    pub spec: ModelSpec,
    pub vars: Vars,
    pub optimizer: Optimizer,
    pub label_smoothing: f64,
    pub step: u64,
}

pub struct StepResult {
    pub loss: f64,
    pub gradients: Vec<(String, Tensor)>,
}

struct ShardResult {
    loss: f64,
    gradients: BTreeMap<String, Tensor>,
    records: Vec<BnRecord>,
}

pub fn spec(name: &str, batch_norm: BatchNorm, options: serde_json::Value) -> ModelSpec {
    let options = options.as_object().cloned().unwrap();
    ModelSpec { name: name.to_owned(), batch_norm, options, ..ModelSpec::default() }
}

pub fn optimizer(spec: serde_json::Value) -> OptimizerSpec {
    serde_json::from_value(spec).unwrap()
}

pub fn sgd(lr: f64) -> OptimizerSpec {
    optimizer(json!({ "name": "sgd", "lr": lr, "momentum": 0.9, "weight_decay": 5e-4 }))
}

impl Trainer {
    pub fn new(spec: ModelSpec, kind: Kind) -> Self {
        let mut vars = Vars::new("model", 1, kind, tch::Device::Cpu);
        models::build(&spec, &mut vars.root()).unwrap();
        let optimizer = Optimizer::new(&sgd(0.1), &vars).unwrap();
        Self { spec, vars, optimizer, label_smoothing: 0.0, step: 0 }
    }

    /// One step over `images` and `labels`, cut into shards of the given sizes.
    pub fn step(&mut self, images: &Tensor, labels: &Tensor, sizes: &[i64]) -> StepResult {
        let sync = Rendezvous::new(sizes.len());
        let count = images.size()[0] as f64;
        assert_eq!(sizes.iter().sum::<i64>(), images.size()[0]);
        let mut first = 0;
        let mut threads = Vec::new();
        for (s, &size) in sizes.iter().enumerate() {
            let samples = (first..first + size).map(|i| i as u64).collect();
            let fwd = Forward::training(1, self.step, LogicalShard(s as u32), samples, sync.clone());
            let batch = (images.narrow(0, first, size), labels.narrow(0, first, size));
            let (spec, smoothing, replica) =
                (self.spec.clone(), self.label_smoothing, self.vars.replica().unwrap());
            threads
                .push(std::thread::spawn(move || shard_step(&spec, replica, fwd, batch, smoothing, count)));
            first += size;
        }
        let mut shards: Vec<ShardResult> = threads.into_iter().map(|t| t.join().unwrap()).collect();

        let mut total = shards.remove(0);
        let mut summed = weighted_records(&total.records);
        for shard in shards {
            total.loss += shard.loss;
            for (name, gradient) in shard.gradients {
                *total.gradients.get_mut(&name).unwrap() += gradient;
            }
            if self.spec.batch_norm == BatchNorm::Sync {
                assert_eq!(
                    shard.records, total.records,
                    "synchronized statistics are the same on all shards"
                );
            }
            add(&mut summed, &weighted_records(&shard.records));
        }
        if self.spec.batch_norm == BatchNorm::Local {
            average_records(&mut total.records, &summed).unwrap();
        }
        let gradients: Vec<_> = total.gradients.into_iter().collect();
        self.optimizer.step(&self.vars, &gradients, 0.1, self.step).unwrap();
        apply_running_stats(&self.vars, &total.records).unwrap();
        self.step += 1;
        StepResult { loss: total.loss, gradients }
    }
}

fn shard_step(
    spec: &ModelSpec,
    mut replica: Vars,
    mut fwd: Forward,
    (images, labels): (Tensor, Tensor),
    smoothing: f64,
    count: f64,
) -> ShardResult {
    tch::set_num_threads(1);
    let model = models::build(spec, &mut replica.root()).unwrap();
    let gradients = Arc::new(Mutex::new(BTreeMap::new()));
    let hooks: Vec<_> = replica
        .parameters()
        .map(|(name, var)| {
            let (gradients, name) = (gradients.clone(), name.to_owned());
            let keep = move |g: &Tensor| {
                assert!(gradients.lock().unwrap().insert(name.clone(), g.copy()).is_none());
                Ok(())
            };
            shim::on_gradient(&var.tensor, keep).unwrap()
        })
        .collect();
    let logits = model.forward(&images, &mut fwd).unwrap().main;
    let loss = loss::cross_entropy(&logits, &labels, smoothing, count).unwrap();
    shim::backward(&loss).unwrap();
    drop(hooks);
    for (name, var) in replica.parameters() {
        assert!(!var.tensor.grad().defined(), "`{name}` keeps a gradient");
    }
    let gradients = std::mem::take(&mut *gradients.lock().unwrap());
    ShardResult { loss: loss.double_value(&[]), gradients, records: fwd.take_records().unwrap() }
}

/// The largest difference relative to the largest magnitude of `expected`.
pub fn relative_error(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(got.size(), expected.size());
    if got.numel() == 0 {
        return 0.0;
    }
    let scale = expected.abs().max().double_value(&[]).max(1e-30);
    (got - expected).abs().max().double_value(&[]) / scale
}
