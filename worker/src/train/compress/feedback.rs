//! What compression has lost so far, to be added to the next gradient.

use parking_lot::Mutex;

/// For each owned shard and each parameter of a network, what the sum of all that was sent lacks of the sum of all
/// gradients. Empty for a parameter that is sent as it is.
pub(crate) struct Feedback {
    /// Elements by parameter.
    lengths: Vec<usize>,
    /// By owned shard, then by parameter.
    kept: Vec<Vec<Mutex<Vec<f32>>>>,
}

impl Feedback {
    /// Nothing lost yet, for parameters of these `lengths`.
    pub(crate) fn new(owned: usize, lengths: Vec<usize>) -> Self {
        let zeros = |_| lengths.iter().map(|&len| Mutex::new(vec![0.0; len])).collect();
        Self { kept: (0..owned).map(zeros).collect(), lengths }
    }

    /// Elements by parameter.
    pub(crate) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// How many owned shards there are.
    pub(crate) fn owned(&self) -> usize {
        self.kept.len()
    }

    /// What the shard in `slot` keeps of `parameter`.
    pub(crate) fn of(&self, slot: usize, parameter: usize) -> &Mutex<Vec<f32>> {
        &self.kept[slot][parameter]
    }
}
