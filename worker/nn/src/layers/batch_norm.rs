//! Batch normalization (Ioffe and Szegedy 2015) over the global batch or over each logical shard.

use crate::error::NnError;
use crate::forward::{BatchNormSync, BnCall, BnRecord, Forward, LocalOnly};
use crate::init::Init;
use crate::shim;
use crate::vars::Scope;
use lockstep_common::job::BatchNorm as Mode;
use parking_lot::Mutex;
use std::sync::Arc;
use tch::{Device, Tensor};

/// The two constants of a batch normalization.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added to the variance.
    pub eps: f64,
    /// The share of a new batch in the running statistics: PyTorch's momentum, 1 minus TensorFlow's decay.
    pub momentum: f64,
}

impl Default for NormSpec {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self { eps: 1e-5, momentum: 0.1 }
    }
}

/// Normalization per channel, then an affine map, then perhaps a ReLU in the same pass over memory.
///
/// Forward never changes the running statistics: it leaves a [`BnRecord`], and the trainer applies it when the
/// step is committed.
#[derive(Debug)]
pub struct BatchNorm {
    name: String,
    index: u32,
    sync: bool,
    relu: bool,
    spec: NormSpec,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
}

impl BatchNorm {
    /// A layer over `channels` with PyTorch's constants, or none in [`Mode::None`]. `relu` fuses a ReLU behind it.
    pub fn new(scope: &mut Scope, channels: i64, mode: Mode, relu: bool) -> Result<Option<Self>, NnError> {
        Self::with(scope, channels, mode, relu, NormSpec::default())
    }

    /// [`new`](Self::new) with other constants.
    pub fn with(
        scope: &mut Scope,
        channels: i64,
        mode: Mode,
        relu: bool,
        spec: NormSpec,
    ) -> Result<Option<Self>, NnError> {
        if mode == Mode::None {
            return Ok(None);
        }
        Ok(Some(Self {
            name: scope.path().to_owned(),
            index: scope.next_batch_norm(),
            sync: mode == Mode::Sync,
            relu,
            spec,
            weight: scope.parameter("weight", &[channels], Init::Constant(1.0))?,
            bias: scope.parameter("bias", &[channels], Init::Constant(0.0))?,
            running_mean: scope.buffer("running_mean", &[channels], 0.0)?,
            running_var: scope.buffer("running_var", &[channels], 1.0)?,
        }))
    }

    /// [N, C, ...] to the same shape. N may be 0 in training: the shard then takes part in the exchange with
    /// nothing to add.
    pub fn forward(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        if fwd.train { self.normalize_by_batch(x, fwd) } else { self.normalize_by_running(x) }
    }

    fn normalize_by_batch(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        if x.device() != Device::Cpu && (!self.sync || fwd.sync.is_alone()) {
            return self.normalize_alone(x, fwd);
        }
        let exchange = Exchange {
            sync: if self.sync { fwd.sync.clone() } else { Arc::new(LocalOnly) },
            call: BnCall {
                network: fwd.network,
                layer: self.index,
                use_index: fwd.use_index(&self.name),
                backward: false,
            },
            shard: fwd.shard,
            layer: self.name.clone(),
            merged: Arc::default(),
        };
        let merged = exchange.merged.clone();
        let merge = Box::new(move |backward, values: &mut [f64]| exchange.run(backward, values));
        let y = shim::batch_norm(x, &self.weight, &self.bias, self.spec.eps, self.relu, merge)?;
        if fwd.update_stats {
            let moments = std::mem::take(&mut *merged.lock());
            let (count, moments) = moments.split_first().map_or((0.0, &[][..]), |(n, rest)| (*n, rest));
            let mut record = self.record(fwd.network, count);
            record.set_moments(moments);
            fwd.records.push(record);
        }
        Ok(y)
    }

    /// On a GPU, without waiting for it.
    fn normalize_alone(&self, x: &Tensor, fwd: &mut Forward) -> Result<Tensor, NnError> {
        let (y, statistics) = shim::lone_batch_norm(x, &self.weight, &self.bias, self.spec.eps, self.relu)?;
        if fwd.update_stats {
            let count = (x.numel() as i64 / x.size()[1].max(1)) as f64;
            fwd.record_later(self.record(fwd.network, count), statistics, self.spec.eps);
        }
        Ok(y)
    }

    fn normalize_by_running(&self, x: &Tensor) -> Result<Tensor, NnError> {
        let y = x.f_batch_norm(
            Some(&self.weight),
            Some(&self.bias),
            Some(&self.running_mean),
            Some(&self.running_var),
            false,
            0.0,
            self.spec.eps,
            false,
        )?;
        if self.relu { Ok(y.f_relu()?) } else { Ok(y) }
    }

    /// One over `count` values of each channel, without their moments.
    fn record(&self, network: u16, count: f64) -> BnRecord {
        let (layer, momentum) = (self.name.clone(), self.spec.momentum);
        BnRecord { network, layer, momentum, count, mean: Vec::new(), var_unbiased: Vec::new() }
    }
}

/// The exchange of one use of one layer, kept by the graph until its backward.
struct Exchange {
    sync: Arc<dyn BatchNormSync>,
    call: BnCall,
    shard: lockstep_common::ids::LogicalShard,
    layer: String,
    /// What forward's exchange returned, for the record.
    merged: Arc<Mutex<Vec<f64>>>,
}

impl Exchange {
    fn run(&self, backward: bool, values: &mut [f64]) -> Result<(), NnError> {
        let call = BnCall { backward, ..self.call };
        let local = values.to_vec();
        let merged = if backward {
            self.sync.sum(call, self.shard, local)?
        } else {
            self.sync.merge_moments(call, self.shard, local)?
        };
        if merged.len() != values.len() {
            let (expected, got) = (values.len(), merged.len());
            return Err(NnError::MergedLength { layer: self.layer.clone(), expected, got });
        }
        values.copy_from_slice(&merged);
        if !backward {
            *self.merged.lock() = merged;
        }
        Ok(())
    }
}
