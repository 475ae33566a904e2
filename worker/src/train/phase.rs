//! What a step consists of.

use tch::{Device, Kind, Tensor};

/// One update of one network within a step.
#[derive(Clone, Debug)]
pub(crate) struct PhasePlan {
    /// Its name in metrics and errors, such as `discriminator`.
    pub(crate) name: String,
    /// The network that learns; all others are constants in this phase.
    pub(crate) learns: u16,
    /// Which of the step's minibatches it sees. The phase is left out when an epoch's last step has fewer.
    pub(crate) minibatch: usize,
    /// The names of the figures that its shards add up.
    pub(crate) figures: &'static [&'static str],
}

/// One logical shard's part of one minibatch.
pub(crate) struct ShardBatch {
    /// Samples by their number in the dataset, one per row.
    pub(crate) samples: Vec<u64>,
    /// [n, channels, height, width].
    pub(crate) images: Tensor,
    /// `[n]`, integers.
    pub(crate) labels: Tensor,
    /// Samples of the minibatch over all shards.
    pub(crate) global: u64,
}

impl ShardBatch {
    /// The same rows for another phase; the tensors share their memory.
    pub(crate) fn share(&self) -> Self {
        Self {
            samples: self.samples.clone(),
            images: self.images.shallow_clone(),
            labels: self.labels.shallow_clone(),
            ..*self
        }
    }
}

impl ShardBatch {
    /// Part `piece` of `pieces` of the rows, which differ by one row at most. It may have none.
    pub(crate) fn piece(&self, piece: usize, pieces: usize) -> Result<Self, tch::TchError> {
        let rows = self.samples.len();
        let at = |piece| rows * piece / pieces;
        let (from, to) = (at(piece), at(piece + 1));
        let narrow = |tensor: &Tensor| tensor.f_narrow(0, from as i64, (to - from) as i64);
        Ok(Self {
            samples: self.samples[from..to].to_vec(),
            images: narrow(&self.images)?,
            labels: narrow(&self.labels)?,
            ..*self
        })
    }
}

/// What a shard's forward pass comes to. Losses and figures are shares: over all shards they simply add up.
pub(crate) struct ShardLoss {
    /// A scalar, to run backward from.
    pub(crate) loss: Tensor,
    /// In the order of [`PhasePlan::figures`], each a scalar, perhaps on a GPU that has not computed it yet.
    pub(crate) figures: Vec<Tensor>,
}

impl ShardLoss {
    /// The figures. Waits for the device.
    pub(crate) fn take_figures(&mut self) -> Result<Vec<f64>, tch::TchError> {
        let wide = std::mem::take(&mut self.figures)
            .into_iter()
            .map(|figure| figure.f_detach()?.f_to_kind(Kind::Double));
        let wide = wide.collect::<Result<Vec<_>, _>>()?;
        Vec::try_from(Tensor::f_stack(&wide, 0)?.f_to_device(Device::Cpu)?)
    }
}
