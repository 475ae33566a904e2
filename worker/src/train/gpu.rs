//! How a GPU's gradients travel: over NCCL, or through the host.
//!
//! All ranks choose alike: from their devices' names first, then from what each says that it can.
#![allow(unsafe_code)]

use super::Number;
use super::device_buckets::{Carried, Carrier};
use super::error::TrainError;
use super::staging::Staging;
use lockstep_collectives::nccl::{
    Choice, Device as Gpu, DeviceElement, Library, NcclComm, NcclError, NcclWork, Nodes, RankDevice, Stream,
    UniqueId, choose,
};
use lockstep_collectives::{Group, Tag, TagKind};
use lockstep_common::ids::Rank;
use lockstep_common::job::{Backend, CollectiveSpec, WireFormat};
use lockstep_common::wire::Peer;
use lockstep_nn::NnError;
use lockstep_nn::shim::SideStream;
use parking_lot::Mutex;
use std::marker::PhantomData;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Scratch memory for exact reductions: enough for a bucket of the default size between up to three ranks in one piece,
/// and little beside what a network takes.
const SCRATCH_BYTES: usize = 64 << 20;

/// Chooses from the devices of all ranks. An error names the rank that has no GPU where the job wants NCCL.
pub(crate) fn choice(peers: &[Peer], backend: Backend) -> Result<Choice, TrainError> {
    let ranks: Vec<_> = peers.iter().map(|p| RankDevice { host: &p.host, device: &p.device }).collect();
    choose(backend, &ranks).map_err(|error| TrainError::Fatal(error.to_string()))
}

/// What carries this rank's gradients; `None` for a CPU, whose gradients are where the group takes them, and for a
/// compressed wire.
///
/// Where `choice` is NCCL, all ranks call this at the same time.
pub(crate) fn carrier<T: Number>(
    group: &Group,
    peers: &[Peer],
    collective: &CollectiveSpec,
    choice: Choice,
    device: Device,
) -> Result<Option<Arc<dyn Carrier>>, TrainError> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let backend = collective.backend;
    if collective.wire != WireFormat::F32 {
        // Compressed on the host, on its way to the network.
        if backend == Backend::Nccl {
            return Err(TrainError::Fatal(
                "backend \"nccl\" carries gradients as they are; remove `wire`, or the backend".to_owned(),
            ));
        }
        return Ok(None);
    }
    if group.world_size() == 1 {
        return Ok(Some(Arc::new(OnDevice::<T>::new(group.clone(), device, None)?)));
    }
    let why = match choice {
        Choice::Host(why) => why,
        Choice::Nccl => {
            let mine = Library::open().and_then(|library| Ok((library, Gpu::open(index)?)));
            let obstacle = obstacle(group, peers, &in_short(&mine))?;
            match (mine, obstacle) {
                (Ok((library, gpu)), None) => {
                    let link = Link::form(group, library, &gpu, index)?;
                    return Ok(Some(Arc::new(OnDevice::<T>::new(group.clone(), device, Some(link))?)));
                }
                (_, why) => why.unwrap_or_else(|| "NCCL cannot be used here".to_owned()),
            }
        }
    };
    if backend == Backend::Nccl {
        return Err(TrainError::Fatal(format!("backend \"nccl\" cannot be used: {why}")));
    }
    tracing::warn!("gradients travel through host memory: {why}");
    let staging = Staging::<T>::new(group.clone(), index, device);
    Ok(Some(Arc::new(staging.map_err(|e| TrainError::Fatal(e.to_string()))?)))
}

/// What a rank tells the others: NCCL's version, or why it cannot use it.
type Say = Result<i32, String>;

fn in_short(mine: &Result<(Library, Arc<Gpu>), NcclError>) -> Say {
    mine.as_ref().map(|(library, _)| library.version()).map_err(ToString::to_string)
}

/// Why the ranks cannot use NCCL together, the same on all of them.
fn obstacle(group: &Group, peers: &[Peer], mine: &Say) -> Result<Option<String>, TrainError> {
    let bytes = serde_json::to_vec(mine).map_err(|e| TrainError::Fatal(e.to_string()))?;
    let all = group.all_gather(set_up(0), bytes)?.wait()?;
    let said = all.iter().map(|bytes| {
        serde_json::from_slice(bytes).unwrap_or_else(|_| Err("said something unintelligible".to_owned()))
    });
    Ok(disagreement(peers, &said.collect::<Vec<_>>()))
}

fn disagreement(peers: &[Peer], said: &[Say]) -> Option<String> {
    let named = |rank: usize| {
        let host = peers.get(rank).map_or("?", |p| p.host.as_str());
        format!("{} ({host})", Rank(rank as u32))
    };
    let mut versions = Vec::new();
    for (rank, say) in said.iter().enumerate() {
        match say {
            Err(reason) => return Some(format!("{}: {reason}", named(rank))),
            Ok(version) => versions.push(*version),
        }
    }
    let other = versions.iter().position(|version| *version != versions[0])?;
    let (first, other) = ((named(0), versions[0]), (named(other), versions[other]));
    Some(format!(
        "{} has NCCL {} and {} has {}; install one version on all hosts",
        first.0,
        in_words(first.1),
        other.0,
        in_words(other.1)
    ))
}

/// 22809 is 2.28.9.
fn in_words(version: i32) -> String {
    format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
}

fn set_up(index: u32) -> Tag {
    Tag::new(0, 0, TagKind::Communicator).index(index)
}

/// The way to the other GPUs.
struct Link {
    comm: Arc<NcclComm>,
    side: SideStream,
}

impl Link {
    fn form(group: &Group, library: Library, gpu: &Arc<Gpu>, index: usize) -> Result<Self, TrainError> {
        let side = SideStream::new(index)?;
        // SAFETY: libtorch's streams live as long as the process, and this one belongs to the same GPU.
        let stream = unsafe { Stream::borrowed(gpu, side.handle()) };
        let fatal = |error: NcclError| TrainError::Fatal(error.to_string());
        let own = match group.rank() {
            Rank(0) => Some(UniqueId::new(&library).map_err(fatal)?.to_bytes()),
            _ => None,
        };
        let id = group.broadcast(set_up(1), Rank(0), own)?.wait()?;
        let id = UniqueId::from_bytes(&id)
            .ok_or_else(|| TrainError::Fatal("rank 0 sent no identifier of NCCL's".to_owned()))?;
        let (version, path) = (in_words(library.version()), library.path().to_owned());
        let comm = NcclComm::form(group, library, stream, &id)?;
        tracing::info!("gradients travel over NCCL {version} (`{}`)", path.display());
        Ok(Self { comm, side })
    }
}

/// Reduces without leaving the GPUs.
struct OnDevice<T> {
    group: Group,
    link: Option<Link>,
    /// See [`Group::own_tree`].
    merges: Vec<(usize, usize)>,
    kept: Vec<usize>,
    scratch: Mutex<Option<Tensor>>,
    elements: PhantomData<fn() -> T>,
}

impl<T: Number> OnDevice<T> {
    fn new(group: Group, device: Device, link: Option<Link>) -> Result<Self, TrainError> {
        let (merges, kept) = group.own_tree();
        let scratch = match &link {
            Some(link) if link.comm.needs_scratch() => {
                let elements = (SCRATCH_BYTES / size_of::<T>()) as i64;
                Some(Tensor::f_empty([elements], (T::KIND, device))?)
            }
            _ => None,
        };
        let scratch = Mutex::new(scratch);
        Ok(Self { group, link, merges, kept, scratch, elements: PhantomData })
    }

    /// Starts NCCL on what is left of the shards' vectors.
    fn exchange(&self, link: &Link, tag: Tag, nodes: &[Tensor]) -> Result<NcclWork, TrainError> {
        let scratch = self.scratch.lock();
        let address = |tensor: &Tensor| tensor.data_ptr() as u64;
        let described = Nodes {
            pointers: nodes.iter().map(address).collect(),
            len: nodes.first().map_or(0, Tensor::numel),
            element: element(T::KIND)?,
            scratch: scratch.as_ref().map_or(0, address),
            scratch_elements: scratch.as_ref().map_or(0, Tensor::numel),
        };
        let mut add = |into: usize, from: usize, len: usize| {
            let Some(scratch) = &*scratch else { return Err("there is no scratch memory".to_owned()) };
            let part = |at: usize| scratch.f_narrow(0, at as i64, len as i64);
            let sum = link.side.run(|| Ok(part(into)?.f_add_(&part(from)?)?));
            sum.map(drop).map_err(|error: NnError| error.to_string())
        };
        // SAFETY: the tensors are contiguous memory of the device for which `link` was formed, of these sizes;
        // `InFlight` keeps the nodes until the work is waited for or dropped, and nobody else has them. The scratch
        // memory is this carrier's alone, and the buckets drop their work before their carrier.
        Ok(unsafe { link.comm.all_reduce(tag, &described, &mut add) }?)
    }
}

fn element(kind: Kind) -> Result<DeviceElement, TrainError> {
    match kind {
        Kind::Float => Ok(DeviceElement::F32),
        Kind::Double => Ok(DeviceElement::F64),
        Kind::BFloat16 => Ok(DeviceElement::Bf16),
        Kind::Half => Ok(DeviceElement::F16),
        Kind::Int64 => Ok(DeviceElement::I64),
        other => Err(TrainError::Fatal(format!("gradients of type {other:?} have no way over NCCL"))),
    }
}

impl<T: Number> Carrier for OnDevice<T> {
    fn launch(&self, tag: Tag, mut leaves: Vec<Tensor>) -> Result<Box<dyn Carried>, TrainError> {
        for &(into, from) in &self.merges {
            let right = leaves[from].shallow_clone();
            let _ = leaves[into].f_add_(&right)?;
        }
        let nodes: Vec<_> = self.kept.iter().map(|&node| leaves[node].shallow_clone()).collect();
        let work = match &self.link {
            None => self.group.failure().map_or(Ok(None), |failure| Err(TrainError::from(failure)))?,
            Some(link) => Some(self.exchange(link, tag, &nodes)?),
        };
        Ok(Box::new(InFlight { work, nodes }))
    }
}

/// A reduction on the GPU. The fields are dropped in this order: the work before its memory.
struct InFlight {
    work: Option<NcclWork>,
    nodes: Vec<Tensor>,
}

impl Carried for InFlight {
    fn advance(&mut self, _finish: bool) -> Result<(), TrainError> {
        Ok(())
    }

    fn wait(mut self: Box<Self>) -> Result<Tensor, TrainError> {
        if let Some(work) = self.work.take() {
            work.wait()?;
        }
        Ok(self.nodes.swap_remove(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::ids::WorkerId;

    fn peers() -> Vec<Peer> {
        let peer = |(rank, host): (u32, &str)| Peer {
            rank: Rank(rank),
            worker: WorkerId(u64::from(rank) + 1),
            host: host.to_owned(),
            host_key: None,
            device: "cuda:0".to_owned(),
            addresses: Vec::new(),
        };
        [(0, "a"), (1, "b"), (2, "c")].map(peer).into()
    }

    #[test]
    fn ranks_agree_or_name_the_one_that_cannot() {
        assert_eq!(disagreement(&peers(), &[Ok(22809), Ok(22809), Ok(22809)]), None);
        let reason = disagreement(&peers(), &[Ok(22809), Err("no NCCL here".to_owned()), Ok(22703)]);
        assert_eq!(reason.as_deref(), Some("rank 1 (b): no NCCL here"));
        let reason = disagreement(&peers(), &[Ok(22809), Ok(22809), Ok(22703)]);
        let expected =
            "rank 0 (a) has NCCL 2.28.9 and rank 2 (c) has 2.27.3; install one version on all hosts";
        assert_eq!(reason.as_deref(), Some(expected));
    }

    #[test]
    fn a_job_that_wants_nccl_is_refused_where_a_rank_has_no_gpu() {
        let mut peers = peers();
        peers[1].device = "cpu".to_owned();
        let refusal = choice(&peers, Backend::Nccl).unwrap_err().to_string();
        assert!(refusal.contains("rank 1 (b) has no GPU"), "{refusal}");
        assert!(matches!(choice(&peers, Backend::Auto), Ok(Choice::Host(_))));
    }

    /// On one rank the shards are added here, in the tree's order, as the group would.
    #[test]
    fn one_rank_adds_its_shards_as_the_group_does() {
        let placement = lockstep_common::placement::Placement::even(5, 1);
        let group = Group::solo(placement, lockstep_common::job::Reduction::Exact).unwrap();
        let leaves: Vec<Vec<f32>> = (0..5).map(|i| vec![0.1 + i as f32 * 1e7, 1e-3 * i as f32]).collect();
        let expected = group.all_reduce(set_up(7), leaves.clone(), lockstep_collectives::ReduceOp::Sum);
        let expected = expected.unwrap().wait().unwrap();
        let carrier = OnDevice::<f32>::new(group, Device::Cpu, None).unwrap();
        let tensors = leaves.iter().map(|leaf| Tensor::from_slice(leaf)).collect();
        let sum = carrier.launch(set_up(8), tensors).unwrap().wait().unwrap();
        assert_eq!(sum, Tensor::from_slice(expected.as_slice()));
    }
}
