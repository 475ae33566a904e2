//! A replica as bytes: a manifest, and chunks that it has the hashes of.

use crate::tasks::TaskPlan;
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use lockstep_common::ids::JobId;
use lockstep_common::wire::{Position, encode};
use lockstep_nn::bytes::RawTensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use tch::Tensor;

/// Large enough to fill a link for longer than a round trip, small enough to be asked of another source instead.
pub(crate) const CHUNK_BYTES: usize = 1 << 20;

const WEIGHTS: &str = "weights/";
const OPTIMIZER: &str = "optimizer/";

/// One tensor of a state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TensorEntry {
    name: String,
    dtype: String,
    shape: Vec<u64>,
}

/// What a state consists of, and the hash of every chunk of it. The same on all replicas at one position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub(crate) job: JobId,
    pub(crate) position: Position,
    /// What the phases of the step in progress that have been applied came to.
    pub(crate) figures: BTreeMap<String, f64>,
    tensors: Vec<TensorEntry>,
    /// Of all tensors together.
    pub(crate) bytes: u64,
    /// BLAKE3 of every [`CHUNK_BYTES`].
    chunks: Vec<[u8; 32]>,
}

/// BLAKE3 of a manifest, by which visitors name a state.
pub(crate) type StateId = [u8; 32];

impl Manifest {
    pub(crate) fn id(&self) -> Result<StateId, TrainError> {
        let bytes = encode(self).map_err(|e| TrainError::Fatal(format!("the state's manifest: {e}")))?;
        Ok(*blake3::hash(&bytes).as_bytes())
    }

    /// How many chunks there are.
    pub(crate) fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Where a chunk lies in the state; empty for one that there is not.
    pub(crate) fn range(&self, chunk: usize) -> Range<usize> {
        let (start, end) = (chunk.saturating_mul(CHUNK_BYTES), self.bytes as usize);
        start.min(end)..start.saturating_add(CHUNK_BYTES).min(end)
    }

    /// Whether `bytes` are that chunk.
    pub(crate) fn matches(&self, chunk: usize, bytes: &[u8]) -> bool {
        self.chunks.get(chunk).is_some_and(|hash| hash == blake3::hash(bytes).as_bytes())
    }

    /// What is wrong with this manifest as one of `job` whose replicas are like `replica`; `None` if nothing is. Then a
    /// state of [`Self::bytes`] can be taken in.
    pub(crate) fn problem(
        &self,
        job: JobId,
        replica: &Replica,
        plan: &TaskPlan,
    ) -> Result<Option<String>, TrainError> {
        let layout = layout(replica, plan)?;
        if self.job != job {
            return Ok(Some(format!("is one of {}", self.job)));
        }
        for place in 0..layout.len().max(self.tensors.len()) {
            let (mine, theirs) = (layout.get(place).map(|(entry, _)| entry), self.tensors.get(place));
            if mine != theirs {
                let name = theirs.or(mine).map_or("?", |entry| entry.name.as_str());
                return Ok(Some(format!("has another tensor `{name}` than this job's")));
            }
        }
        let bytes: usize = layout.iter().map(|(_, bytes)| bytes).sum();
        if self.bytes != bytes as u64 || self.chunks.len() != bytes.div_ceil(CHUNK_BYTES) {
            return Ok(Some(format!("announces {} bytes instead of {bytes}", self.bytes)));
        }
        if usize::from(self.position.phase) >= plan.phases.len() {
            return Ok(Some(format!("is at {}, which no step has", self.position)));
        }
        Ok(None)
    }
}

/// A copy of a replica's state, to be hashed while training goes on.
pub(crate) struct Copied {
    position: Position,
    figures: BTreeMap<String, f64>,
    tensors: Vec<TensorEntry>,
    bytes: Vec<u8>,
}

/// A state that can be handed out.
pub(crate) struct Packed {
    pub(crate) manifest: Manifest,
    pub(crate) id: StateId,
    bytes: Vec<u8>,
}

impl Copied {
    /// Copies the state of `replica`.
    pub(crate) fn of(replica: &Replica, plan: &TaskPlan) -> Result<Self, TrainError> {
        let (mut tensors, mut bytes) = (Vec::new(), Vec::new());
        for (name, tensor) in all_tensors(replica, plan)? {
            let raw = RawTensor::copy_from(&tensor)?;
            tensors.push(entry(name, &tensor)?);
            bytes.extend_from_slice(&raw.bytes);
        }
        Ok(Self { position: replica.position(), figures: replica.figures().clone(), tensors, bytes })
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Hashes it.
    pub(crate) fn pack(self, job: JobId) -> Result<Packed, TrainError> {
        let Self { position, figures, tensors, bytes } = self;
        let chunks = bytes.chunks(CHUNK_BYTES).map(|chunk| *blake3::hash(chunk).as_bytes()).collect();
        let manifest = Manifest { job, position, figures, tensors, bytes: bytes.len() as u64, chunks };
        Ok(Packed { id: manifest.id()?, manifest, bytes })
    }
}

impl Packed {
    /// The bytes of a chunk; none for one that there is not.
    pub(crate) fn chunk(&self, chunk: usize) -> &[u8] {
        &self.bytes[self.manifest.range(chunk)]
    }

    /// Changes one bit, as bad memory does.
    #[cfg(test)]
    pub(crate) fn flip(&mut self, byte: usize) {
        self.bytes[byte] ^= 4;
    }
}

/// Makes `replica` the state of `bytes`, in which [`Manifest::problem`] found none.
pub(crate) fn unpack(
    manifest: &Manifest,
    bytes: &[u8],
    replica: &mut Replica,
    plan: &TaskPlan,
) -> Result<(), TrainError> {
    let (mut weights, mut optimizer) = (BTreeMap::new(), BTreeMap::new());
    let mut rest = bytes;
    for ((entry, length), _) in layout(replica, plan)?.iter().zip(&manifest.tensors) {
        let Some((own, after)) = rest.split_at_checked(*length) else {
            return Err(TrainError::Fatal(format!("the state ends before `{}`", entry.name)));
        };
        rest = after;
        let shape: Vec<usize> = entry.shape.iter().map(|d| *d as usize).collect();
        let tensor = RawTensor::tensor_of(&entry.dtype, &shape, own)?;
        match (entry.name.strip_prefix(WEIGHTS), entry.name.strip_prefix(OPTIMIZER)) {
            (Some(name), _) => weights.insert(name.to_owned(), tensor),
            (None, Some(name)) => optimizer.insert(name.to_owned(), tensor),
            (None, None) => None,
        };
    }
    replica.restore(plan, manifest.position, &weights, &optimizer)?;
    replica.set_figures(manifest.figures.clone());
    Ok(())
}

fn all_tensors(replica: &Replica, plan: &TaskPlan) -> Result<Vec<(String, Tensor)>, TrainError> {
    let weights = replica.weight_tensors().map(|(name, tensor)| (format!("{WEIGHTS}{name}"), tensor));
    let optimizer = replica.optimizer_tensors(plan)?.into_iter();
    Ok(weights.chain(optimizer.map(|(name, tensor)| (format!("{OPTIMIZER}{name}"), tensor))).collect())
}

/// The tensors of states like `replica`, and their bytes.
fn layout(replica: &Replica, plan: &TaskPlan) -> Result<Vec<(TensorEntry, usize)>, TrainError> {
    let tensors = all_tensors(replica, plan)?.into_iter();
    let sized = tensors.map(|(name, tensor)| {
        let bytes = tensor.numel() * tensor.f_kind()?.elt_size_in_bytes();
        Ok((entry(name, &tensor)?, bytes))
    });
    sized.collect()
}

fn entry(name: String, tensor: &Tensor) -> Result<TensorEntry, TrainError> {
    let shape = tensor.size().into_iter().map(|d| d as u64).collect();
    Ok(TensorEntry { name, dtype: RawTensor::dtype_of(tensor)?.to_owned(), shape })
}
