//! All-reduces of device memory.

use super::comm::{NcclComm, Patience};
use super::cuda::Event;
use super::error::NcclError;
use super::library::{Code, Library, SUCCESS};
use super::pieces::Pieces;
use crate::error::CollectiveError;
use crate::tag::Tag;
use cudarc::nccl::sys::{ncclComm_t, ncclDataType_t, ncclRedOp_t};
use lockstep_common::ids::Rank;
use lockstep_common::job::Reduction;
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::Arc;

/// The types that device memory may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceElement {
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
    /// The upper half of single precision.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Signed, wrapping.
    I64,
}

impl DeviceElement {
    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    fn code(self) -> c_int {
        let code = match self {
            Self::F32 => ncclDataType_t::ncclFloat32,
            Self::F64 => ncclDataType_t::ncclFloat64,
            Self::Bf16 => ncclDataType_t::ncclBfloat16,
            Self::F16 => ncclDataType_t::ncclFloat16,
            Self::I64 => ncclDataType_t::ncclInt64,
        };
        code as c_int
    }
}

/// Device memory to reduce.
#[derive(Clone, Debug)]
pub struct Nodes {
    /// Where this rank's nodes begin, in the order of [`Group::own_tree`](crate::Group::own_tree). The result
    /// replaces the first.
    pub pointers: Vec<u64>,
    /// Elements of each, the same on all ranks.
    pub len: usize,
    /// What they hold.
    pub element: DeviceElement,
    /// Where the scratch memory begins, where [`NcclComm::needs_scratch`] says so.
    pub scratch: u64,
    /// The elements that the scratch memory holds, the same on all ranks: at least one per node of any rank. With
    /// less than a share of all ranks' nodes a reduction goes in pieces.
    pub scratch_elements: usize,
}

/// Adds one span of the scratch memory to another, in order with the work of NCCL's stream: `into`, `from` and the
/// number of elements.
pub type Add<'a> = dyn FnMut(usize, usize, usize) -> Result<(), String> + 'a;

/// A reduction in flight on the GPU. Dropped before its end it aborts the communicator, because its memory may be
/// freed next.
#[must_use = "a reduction's failure shows only in `wait`"]
pub struct NcclWork {
    comm: Arc<NcclComm>,
    tag: Tag,
    /// The caller's own computation is done.
    ready: Event,
    done: Event,
    over: bool,
}

impl NcclComm {
    /// Whether reductions need scratch memory.
    pub fn needs_scratch(&self) -> bool {
        self.group.reduction() == Reduction::Exact
    }

    /// Starts to sum all ranks' nodes, after what the compute stream (CUDA's default one) has been given so far.
    /// Returns without waiting for the GPU. All ranks start the same reductions in the same order.
    ///
    /// `add` adds on the device, which takes kernels; it is called in an exact group only.
    ///
    /// # Safety
    /// The nodes and the scratch memory are memory of this communicator's device of the stated sizes. They stay
    /// allocated, and nothing but compute-stream work from before this call uses the nodes, until the result has
    /// been waited for or dropped. The scratch memory is used by this communicator's reductions alone.
    pub unsafe fn all_reduce(
        self: &Arc<Self>,
        tag: Tag,
        nodes: &Nodes,
        add: &mut Add<'_>,
    ) -> Result<NcclWork, CollectiveError> {
        let owned = self.group.plan().kept.len();
        if nodes.pointers.len() != owned {
            let detail =
                format!("{} pieces of memory for the {owned} nodes of this rank", nodes.pointers.len());
            return Err(CollectiveError::Misuse { tag, detail });
        }
        let _turn = self.turn.lock();
        let ready = self.cuda(tag, Event::after(&self.compute))?;
        self.cuda(tag, self.stream.wait_for(&ready))?;
        // A failure from here on ends the communicator, and with it the use of the memory.
        match self.group.reduction() {
            Reduction::Fast => self.sum(tag, nodes)?,
            Reduction::Exact => self.sum_in_order(tag, nodes, add)?,
        }
        let done = self.cuda(tag, Event::after(&self.stream))?;
        Ok(NcclWork { comm: self.clone(), tag, ready, done, over: false })
    }

    /// NCCL's own sum, in place, in an order of its own.
    fn sum(&self, tag: Tag, nodes: &Nodes) -> Result<(), CollectiveError> {
        let doing = "starting an all-reduce";
        let memory = nodes.pointers[0] as *mut c_void;
        let (element, sum) = (nodes.element.code(), ncclRedOp_t::ncclSum as c_int);
        // SAFETY: the memory is what the caller of `all_reduce` promises.
        self.call(tag, doing, |library, raw| unsafe {
            (library.functions.all_reduce)(memory, memory, nodes.len, element, sum, raw, self.stream.raw())
        })?;
        self.settle(tag, doing)
    }

    /// The tree's sum, piece by piece: NCCL carries, `add` adds.
    fn sum_in_order(&self, tag: Tag, nodes: &Nodes, add: &mut Add<'_>) -> Result<(), CollectiveError> {
        let (plan, me) = (self.group.plan(), self.group.rank().index());
        let ranks = plan.ranks.nodes.len();
        let total = plan.ranks.nodes.iter().sum();
        let Some(pieces) = Pieces::new(nodes.len, ranks, total, nodes.scratch_elements) else {
            let detail = format!("{} elements of scratch memory for {total} nodes", nodes.scratch_elements);
            return Err(self.end(CollectiveError::Misuse { tag, detail }));
        };
        // Where each rank's nodes begin among all ranks' nodes.
        let first: Vec<usize> =
            plan.ranks.nodes.iter().scan(0, |sum, n| Some(std::mem::replace(sum, *sum + n))).collect();
        for parts in pieces.parts() {
            let mine = parts[me].clone();
            for (node, pointer) in nodes.pointers.iter().enumerate() {
                let slot = (first[me] + node) * mine.len();
                self.copy(tag, nodes, nodes.scratch_at(slot), nodes.at(*pointer, mine.start), mine.len())?;
            }
            self.exchange(tag, nodes, &|rank| {
                let sent = nodes.pointers.iter().map(|p| nodes.at(*p, parts[rank].start)).collect();
                let slots = first[rank]..first[rank] + plan.ranks.nodes[rank];
                let received = slots.map(|slot| nodes.scratch_at(slot * mine.len())).collect();
                Transfer { sent, send_len: parts[rank].len(), received, receive_len: mine.len() }
            })?;
            if !mine.is_empty() {
                for merge in &plan.ranks.merges {
                    add(merge.into * mine.len(), merge.from * mine.len(), mine.len())
                        .map_err(|detail| self.end(CollectiveError::Device { tag, detail }))?;
                }
            }
            let root = nodes.pointers[0];
            self.copy(tag, nodes, nodes.at(root, mine.start), nodes.scratch_at(0), mine.len())?;
            self.exchange(tag, nodes, &|rank| {
                let part: &Range<usize> = &parts[rank];
                Transfer {
                    sent: vec![nodes.at(root, mine.start)],
                    send_len: mine.len(),
                    received: vec![nodes.at(root, part.start)],
                    receive_len: part.len(),
                }
            })?;
        }
        Ok(())
    }

    fn copy(&self, tag: Tag, nodes: &Nodes, to: u64, from: u64, len: usize) -> Result<(), CollectiveError> {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: node memory and scratch memory are apart, and are what the caller of `all_reduce` promises.
        self.cuda(tag, unsafe { self.stream.copy(to, from, len * nodes.element.bytes()) })
    }

    /// Sends to and receives from every other rank at the same time.
    fn exchange(
        &self,
        tag: Tag,
        nodes: &Nodes,
        with: &dyn Fn(usize) -> Transfer,
    ) -> Result<(), CollectiveError> {
        let doing = "exchanging parts";
        let me = self.group.rank().index();
        let others = (0..self.group.world_size() as usize).filter(|rank| *rank != me);
        let transfers: Vec<_> = others.map(|rank| (Rank(rank as u32), with(rank))).collect();
        let element = nodes.element.code();
        self.call(tag, doing, |library, raw| {
            // SAFETY: the memory is what the caller of `all_reduce` promises; `raw` is open. A started group is
            // ended in every case.
            unsafe {
                let started = (library.functions.group_start)();
                if started != SUCCESS {
                    return started;
                }
                let queued = self.queue(library, raw, &transfers, element);
                let ended = (library.functions.group_end)();
                if queued == SUCCESS { ended } else { queued }
            }
        })?;
        self.settle(tag, doing)
    }

    /// # Safety
    /// As for [`all_reduce`](Self::all_reduce), with `raw` open and NCCL in a group.
    unsafe fn queue(
        &self,
        library: &Library,
        raw: ncclComm_t,
        transfers: &[(Rank, Transfer)],
        element: c_int,
    ) -> Code {
        let (functions, stream) = (&library.functions, self.stream.raw());
        for (peer, transfer) in transfers {
            let peer = peer.0 as c_int;
            let sent = transfer.sent.iter().filter(|_| transfer.send_len > 0);
            let received = transfer.received.iter().filter(|_| transfer.receive_len > 0);
            // SAFETY: as the caller promises.
            let sends = sent.map(|memory| unsafe {
                (functions.send)(*memory as *const c_void, transfer.send_len, element, peer, raw, stream)
            });
            // SAFETY: as the caller promises.
            let receives = received.map(|memory| unsafe {
                (functions.recv)(*memory as *mut c_void, transfer.receive_len, element, peer, raw, stream)
            });
            // In progress is no failure: the group's end says what becomes of it.
            if let Some(failed) = sends.chain(receives).find(|code| library.check("", *code).is_err()) {
                return failed;
            }
        }
        SUCCESS
    }

    fn cuda<T>(&self, tag: Tag, result: Result<T, NcclError>) -> Result<T, CollectiveError> {
        result.map_err(|error| self.end(error.in_collective(tag)))
    }
}

/// What one rank sends to another and receives from it, at the same time.
struct Transfer {
    sent: Vec<u64>,
    /// Elements of each.
    send_len: usize,
    received: Vec<u64>,
    receive_len: usize,
}

impl Nodes {
    fn at(&self, pointer: u64, element: usize) -> u64 {
        pointer + (element * self.element.bytes()) as u64
    }

    fn scratch_at(&self, element: usize) -> u64 {
        self.at(self.scratch, element)
    }
}

impl NcclWork {
    /// Waits until the result is there, and lets the compute stream know. Fails with the group, when NCCL
    /// reports an error, or when the job's time-out has passed since this rank's own computation was done.
    pub fn wait(mut self) -> Result<(), CollectiveError> {
        let (comm, tag) = (self.comm.clone(), self.tag);
        let mut patience = Patience::new(comm.group.timeout());
        let mut is_ready = false;
        while !comm.cuda(tag, self.done.is_done())? {
            comm.is_settled(tag, "reducing")?;
            if !is_ready {
                // A slow backward pass is no fault of NCCL's.
                is_ready = comm.cuda(tag, self.ready.is_done())?;
                patience.restart();
            }
            comm.pause(tag, &mut patience)?;
        }
        self.over = true;
        comm.cuda(tag, comm.compute.wait_for(&self.done))
    }
}

impl Drop for NcclWork {
    fn drop(&mut self) {
        if !self.over {
            let reason = format!("{} was given up", self.tag);
            self.comm.abort(CollectiveError::Aborted(reason));
        }
    }
}
