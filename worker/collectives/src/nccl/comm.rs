//! A communicator: made once per generation, ended in order or aborted.

use super::cuda::{Device, Event, Rest, Stream};
use super::error::NcclError;
use super::library::{Code, Library, SUCCESS};
use crate::error::CollectiveError;
use crate::group::Group;
use crate::tag::{Tag, TagKind};
use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclUniqueId};
use parking_lot::Mutex;
use std::ffi::c_int;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The name by which the ranks of one communicator find each other. Rank 0 makes it; all need the same.
#[derive(Clone)]
pub struct UniqueId(ncclUniqueId);

impl UniqueId {
    /// The length of its bytes.
    pub const BYTES: usize = size_of::<ncclUniqueId>();

    /// A new one. This process then waits for the other ranks on a port of its own.
    pub fn new(library: &Library) -> Result<Self, NcclError> {
        let mut id = ncclUniqueId { internal: [0; Self::BYTES] };
        // SAFETY: writes one identifier.
        let code = unsafe { (library.functions.get_unique_id)(&raw mut id) };
        library.check("making an identifier", code).map(|_| Self(id))
    }

    /// As rank 0 sent it; `None` for another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        Some(Self(ncclUniqueId { internal: bytes.map(|byte| byte.cast_signed()) }))
    }

    /// To send to the other ranks.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.internal.iter().map(|byte| byte.cast_unsigned()).collect()
    }
}

/// NCCL's communicator of one rank of one generation.
///
/// It is non-blocking: no call into NCCL lasts, so that [`abort`](Self::abort) from any thread has its turn, and
/// every wait is one of this module's, with a deadline. Dropped, it ends in order while its group is well, and is
/// aborted otherwise.
pub struct NcclComm {
    pub(super) library: Library,
    pub(super) group: Group,
    /// Where NCCL works.
    pub(super) stream: Stream,
    /// Where the caller computes.
    pub(super) compute: Stream,
    state: Mutex<State>,
    /// Held while a reduction is started: its parts must not mix with another one's.
    pub(super) turn: Mutex<()>,
}

enum State {
    Open(Raw),
    /// With the first cause.
    Closed(CollectiveError),
}

struct Raw(ncclComm_t);

// SAFETY: NCCL allows a communicator's use from any thread, one at a time, which the mutex around it ensures.
unsafe impl Send for Raw {}

impl NcclComm {
    /// Forms the communicator of all ranks of `group`, which call this at the same time with the same `id`, each
    /// with its GPU's own `stream` for NCCL. Returns when all of them have, within the group's time-out.
    pub fn form(
        group: &Group,
        library: Library,
        stream: Stream,
        id: &UniqueId,
    ) -> Result<Arc<Self>, CollectiveError> {
        let tag = set_up();
        let device = stream.device().clone();
        device.bind().map_err(|e| e.in_collective(tag))?;
        let (mut raw, mut config) = (ptr::null_mut(), non_blocking(&library));
        let (world, rank) = (group.world_size() as c_int, group.rank().0 as c_int);
        // SAFETY: writes the communicator and reads the configuration before it returns.
        let code = unsafe { (library.functions.init_rank)(&raw mut raw, world, id.0, rank, &raw mut config) };
        let outcome = library.check("forming a communicator", code);
        let comm = Arc::new(Self {
            library,
            group: group.clone(),
            stream,
            compute: Stream::default_of(&device),
            state: Mutex::new(State::Open(Raw(raw))),
            turn: Mutex::new(()),
        });
        match outcome {
            Ok(_) => comm.settle(tag, "forming a communicator")?,
            Err(error) => return Err(comm.end(error.in_collective(tag))),
        }
        Ok(comm)
    }

    /// The GPU.
    pub fn device(&self) -> &Arc<Device> {
        self.stream.device()
    }

    /// Ends all work in flight here with `cause`, and waits until the GPU has let go of its memory. Later calls
    /// return the first cause. The other ranks hear of it through the group only.
    pub fn abort(&self, cause: CollectiveError) {
        let State::Open(Raw(raw)) = ({
            let mut state = self.state.lock();
            match *state {
                State::Closed(_) => return,
                State::Open(_) => std::mem::replace(&mut *state, State::Closed(cause)),
            }
        }) else {
            return;
        };
        // A failure leaves nothing to do: the communicator is given up.
        let _ = self.device().bind();
        if !raw.is_null() {
            // SAFETY: the state held the communicator, and from now on nobody else finds it there.
            let _ = unsafe { (self.library.functions.abort)(raw) };
        }
        // What was queued behind the aborted reduction still uses the caller's memory.
        if let Ok(end) = Event::after(&self.stream) {
            let limit = Instant::now() + self.group.timeout();
            let _ = end.wait_while(|| Instant::now() < limit);
        }
    }

    /// Aborts with `cause`; the first cause of the end.
    pub(super) fn end(&self, cause: CollectiveError) -> CollectiveError {
        self.abort(cause.clone());
        match &*self.state.lock() {
            State::Closed(first) => first.clone(),
            State::Open(_) => cause,
        }
    }

    /// Calls NCCL; whether it is done already. A failure ends the communicator.
    pub(super) fn call(
        &self,
        tag: Tag,
        doing: &'static str,
        call: impl FnOnce(&Library, ncclComm_t) -> Code,
    ) -> Result<bool, CollectiveError> {
        let result = match &*self.state.lock() {
            State::Closed(first) => return Err(first.clone()),
            State::Open(Raw(raw)) => {
                self.device().bind().and_then(|()| self.library.check(doing, call(&self.library, *raw)))
            }
        };
        result.map_err(|error| self.end(error.in_collective(tag)))
    }

    /// Waits until NCCL has taken in what it was given last.
    pub(super) fn settle(&self, tag: Tag, doing: &'static str) -> Result<(), CollectiveError> {
        let mut patience = Patience::new(self.group.timeout());
        while !self.is_settled(tag, doing)? {
            self.pause(tag, &mut patience)?;
        }
        Ok(())
    }

    /// Whether NCCL has taken in what it was given last. Fails if anything has failed since.
    pub(super) fn is_settled(&self, tag: Tag, doing: &'static str) -> Result<bool, CollectiveError> {
        self.call(tag, doing, |library, raw| {
            let mut state = SUCCESS;
            // SAFETY: `raw` is open, and one number is written.
            let code = unsafe { (library.functions.async_error)(raw, &raw mut state) };
            if code == SUCCESS { state } else { code }
        })
    }

    /// Rests between two looks; fails when the group has, or at the end of the `patience`.
    pub(super) fn pause(&self, tag: Tag, patience: &mut Patience) -> Result<(), CollectiveError> {
        if let Some(failure) = self.group.failure() {
            return Err(self.end(failure));
        }
        if let Some(waited) = patience.overrun() {
            let detail = format!(
                "NCCL made no progress for {:.1} s: a rank has not entered, or cannot be reached,",
                waited.as_secs_f64()
            );
            return Err(self.end(CollectiveError::Device { tag, detail }));
        }
        patience.rest.take();
        Ok(())
    }

    /// Ends in order: what was started is finished, here and on the other ranks.
    fn close(&self) -> Result<(), CollectiveError> {
        let doing = "closing a communicator";
        // SAFETY: the communicator is open.
        self.call(set_up(), doing, |library, raw| unsafe { (library.functions.finalize)(raw) })?;
        self.settle(set_up(), doing)?;
        let closed = State::Closed(CollectiveError::Aborted("the communicator is closed".to_owned()));
        if let State::Open(Raw(raw)) = std::mem::replace(&mut *self.state.lock(), closed) {
            // SAFETY: finalized, and nobody else finds it any more.
            let _ = unsafe { (self.library.functions.destroy)(raw) };
        }
        Ok(())
    }
}

impl Drop for NcclComm {
    fn drop(&mut self) {
        match self.group.failure() {
            Some(failure) => self.abort(failure),
            None => {
                // What goes wrong here has aborted the communicator, and there is nobody left to tell.
                let _ = self.close();
            }
        }
    }
}

/// What errors call the forming and the closing of a communicator.
fn set_up() -> Tag {
    Tag::new(0, 0, TagKind::Communicator)
}

/// nccl.h's `NCCL_CONFIG_INITIALIZER`, with `blocking` switched off.
fn non_blocking(library: &Library) -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        // NCCL takes fields that are newer than this for absent.
        version: library.version().unsigned_abs().min(22809),
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: ptr::null(),
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: ptr::null(),
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

/// How long a wait may last.
pub(super) struct Patience {
    since: Instant,
    limit: Duration,
    rest: Rest,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        Self { since: Instant::now(), limit, rest: Rest::default() }
    }

    /// The waiting starts now.
    pub(super) fn restart(&mut self) {
        self.since = Instant::now();
    }

    fn overrun(&self) -> Option<Duration> {
        let waited = self.since.elapsed();
        (waited >= self.limit).then_some(waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identifier_survives_the_wire_and_another_length_is_refused() {
        let bytes: Vec<u8> = (0..UniqueId::BYTES).map(|i| (i * 7) as u8).collect();
        assert_eq!(UniqueId::from_bytes(&bytes).unwrap().to_bytes(), bytes);
        assert!(UniqueId::from_bytes(&bytes[1..]).is_none());
    }

    #[test]
    fn patience_ends_at_its_limit() {
        assert!(Patience::new(Duration::ZERO).overrun().is_some());
        assert!(Patience::new(Duration::from_secs(3600)).overrun().is_none());
    }
}
