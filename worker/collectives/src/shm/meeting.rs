//! How the ranks of a host find each other, once all ranks are connected over the network.

use super::arena::{Arena, PeerArena};
use super::doorbell::Doorbell;
use super::introduce::{Invitation, Listener, Offer, Peer, connect};
use super::neighbours::{ChannelEnds, Neighbours};
use super::ring::{CAPACITY_BYTES, Consumer, Producer, ring_bytes};
use super::segment::Segment;
use crate::error::CollectiveError;
use crate::group::Group;
use crate::tag::{Tag, TagKind};
use bytes::Bytes;
use lockstep_common::ids::Rank;
use lockstep_common::job::Backend;
use lockstep_common::net::host_key;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The ring of the small lane: some frames of the largest kind that travels on it, 64 KiB.
const SMALL_CAPACITY_BYTES: usize = 512 << 10;

/// How long two processes of one host may take to swap descriptors.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes of an invitation for one rank: rank 4, name 16, secret 32.
const INVITATION_BYTES: usize = 52;

/// Sets up shared memory between the ranks of each host, and says on which host each rank is, numbered in order of first
/// appearance. All ranks of `group` call it, and all come to the same
/// decision: if one pair of ranks cannot share memory, none does, and the log says why; with [`Backend::Shm`] that is
/// an error.
pub(crate) async fn share(group: &Group, backend: Backend) -> Result<Option<Vec<usize>>, CollectiveError> {
    let me = group.rank();
    // A host that cannot tell what it is shares with nobody.
    let key = host_key().map_or_else(|| format!("the host of {me}"), |key| key.0);
    let keys = exchange(group, 0, key.into_bytes()).await?;
    let hosts = number(&keys);
    if backend == Backend::Shm
        && let Some(far) = hosts.iter().position(|host| *host != hosts[0])
    {
        return Err(CollectiveError::Config(format!(
            "`backend = \"shm\"` needs all ranks on one host, in one network namespace and of one user, and {} is apart from \
             rank 0: use \"auto\" or \"quic\"",
            Rank(far as u32)
        )));
    }
    if hosts.iter().max().is_none_or(|last| last + 1 == hosts.len()) {
        return Ok(None);
    }
    let mates: Vec<Rank> = (0..hosts.len() as u32)
        .map(Rank)
        .filter(|rank| *rank != me && hosts[rank.index()] == hosts[me.index()])
        .collect();

    let prepared = prepare(me, &mates);
    let mine = prepared.as_ref().map(Prepared::invitations).unwrap_or_default();
    let invitations = exchange(group, 1, mine).await?;
    let met = match prepared {
        Ok(prepared) => prepared.meet(me, hosts.len(), &invitations).await,
        Err(reason) => Err(reason),
    };
    let outcome = met.as_ref().map(|_| String::new()).unwrap_or_else(String::clone);
    let outcomes = exchange(group, 2, outcome.into_bytes()).await?;
    if let Some(rank) = outcomes.iter().position(|outcome| !outcome.is_empty()) {
        let reason = String::from_utf8_lossy(&outcomes[rank]).into_owned();
        let rank = Rank(rank as u32);
        if backend == Backend::Shm {
            return Err(CollectiveError::Connect { rank, detail: reason });
        }
        tracing::warn!("ranks of one host talk over the network, since {rank} says: {reason}");
        return Ok(None);
    }
    let Ok((near, lifelines)) = met else { return Ok(None) };
    for (rank, lifeline) in lifelines {
        near.watch(rank, lifeline);
    }
    let names: Vec<_> = mates.iter().map(Rank::to_string).collect();
    if !names.is_empty() {
        tracing::info!("{me} shares memory with {}", names.join(", "));
    }
    group.attach(near)?;
    // Nobody may leave before everyone listens.
    exchange(group, 3, vec![]).await?;
    Ok(Some(hosts))
}

/// What a rank has ready before it meets the others of its host.
struct Prepared {
    doorbell: Doorbell,
    arena: Arena,
    /// What this rank sends to each.
    rings: BTreeMap<Rank, Arc<Segment>>,
    /// For the higher ranks.
    listeners: BTreeMap<Rank, Listener>,
}

fn prepare(me: Rank, mates: &[Rank]) -> Result<Prepared, String> {
    let make = || -> io::Result<Prepared> {
        let bytes = ring_bytes(SMALL_CAPACITY_BYTES) + ring_bytes(CAPACITY_BYTES);
        let ring = |rank: &Rank| Ok((*rank, Arc::new(Segment::create("lockstep-rings", bytes)?)));
        let listen = |rank: &Rank| Ok((*rank, Listener::bind().map_err(io::Error::other)?));
        Ok(Prepared {
            doorbell: Doorbell::create()?,
            arena: Arena::create()?,
            rings: mates.iter().map(ring).collect::<io::Result<_>>()?,
            listeners: mates.iter().filter(|rank| **rank > me).map(listen).collect::<io::Result<_>>()?,
        })
    };
    make().map_err(|error| format!("cannot set up shared memory: {error}"))
}

impl Prepared {
    fn invitations(&self) -> Vec<u8> {
        let each = self.listeners.iter().flat_map(|(rank, listener)| {
            let Invitation { name, secret } = listener.invitation();
            [&rank.0.to_le_bytes()[..], name, secret].concat()
        });
        each.collect()
    }

    async fn meet(
        mut self,
        me: Rank,
        world: usize,
        invitations: &[Bytes],
    ) -> Result<(Arc<Neighbours>, Vec<(Rank, super::introduce::Lifeline)>), String> {
        let deadline = Instant::now() + PATIENCE;
        let mut ends: Vec<Option<ChannelEnds>> = (0..world).map(|_| None).collect();
        let mut lifelines = Vec::new();
        // In order of rank on every rank, so that each waits only for those that do not wait for it.
        for (rank, ring) in &self.rings {
            let offer = Offer { ring, doorbell: &self.doorbell, arena: &self.arena };
            let met = match self.listeners.remove(rank) {
                Some(listener) => listener.accept(&offer, deadline).await,
                None => {
                    let invitation = find_invitation(&invitations[rank.index()], me)
                        .ok_or_else(|| format!("{rank} has sent no invitation"))?;
                    connect(&invitation, &offer, deadline).await
                }
            };
            let Peer { ring: theirs, doorbell, arena, lifeline } =
                met.map_err(|error| format!("{rank}: {error}"))?;
            ends[rank.index()] = Some(channel(ring.clone(), theirs, doorbell, arena)?);
            lifelines.push((*rank, lifeline));
        }
        Ok((Neighbours::new(me, self.doorbell, self.arena, ends), lifelines))
    }
}

fn channel(
    ours: Arc<Segment>,
    theirs: Arc<Segment>,
    doorbell: Doorbell,
    arena: PeerArena,
) -> Result<ChannelEnds, String> {
    let bulk = ring_bytes(SMALL_CAPACITY_BYTES);
    let ends = || {
        Ok(ChannelEnds {
            send: [
                Producer::new(ours.clone(), 0, SMALL_CAPACITY_BYTES)?,
                Producer::new(ours, bulk, CAPACITY_BYTES)?,
            ],
            recv: [
                Consumer::new(theirs.clone(), 0, SMALL_CAPACITY_BYTES)?,
                Consumer::new(theirs, bulk, CAPACITY_BYTES)?,
            ],
            doorbell,
            arena,
        })
    };
    ends().map_err(|error: super::ring::RingError| error.to_string())
}

fn find_invitation(bytes: &[u8], me: Rank) -> Option<Invitation> {
    let (invitations, []) = bytes.as_chunks::<INVITATION_BYTES>() else { return None };
    let mine = invitations.iter().find(|invitation| invitation[..4] == me.0.to_le_bytes())?;
    let mut invitation = Invitation { name: [0; 16], secret: [0; 32] };
    invitation.name.copy_from_slice(&mine[4..20]);
    invitation.secret.copy_from_slice(&mine[20..]);
    Some(invitation)
}

fn number(keys: &[Bytes]) -> Vec<usize> {
    let mut seen: Vec<&Bytes> = Vec::new();
    let mut hosts = Vec::with_capacity(keys.len());
    for key in keys {
        let known = seen.iter().position(|other| *other == key);
        hosts.push(known.unwrap_or(seen.len()));
        if known.is_none() {
            seen.push(key);
        }
    }
    hosts
}

async fn exchange(group: &Group, index: u32, bytes: Vec<u8>) -> Result<Arc<Vec<Bytes>>, CollectiveError> {
    let pending = group.all_gather(Tag::new(0, 0, TagKind::Setup).index(index), bytes)?;
    let waited = tokio::task::spawn_blocking(move || pending.wait()).await;
    waited.unwrap_or_else(|error| Err(CollectiveError::Config(format!("a set-up task ended early: {error}"))))
}

/// The shared memory of ranks inside this process, each on the host with that number, for tests.
pub(crate) fn in_process(hosts: &[usize]) -> io::Result<Vec<Option<Arc<Neighbours>>>> {
    let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned();
    let bytes = ring_bytes(SMALL_CAPACITY_BYTES) + ring_bytes(CAPACITY_BYTES);
    let world = hosts.len();
    let doorbells = (0..world).map(|_| Doorbell::create()).collect::<io::Result<Vec<_>>>()?;
    let arenas = (0..world).map(|_| Arena::create()).collect::<io::Result<Vec<_>>>()?;
    let ring = |_| Segment::create("lockstep-rings", bytes).map(Arc::new);
    let rings = (0..world * world).map(ring).collect::<io::Result<Vec<_>>>()?;
    let one = |me: usize| {
        let mut ends: Vec<Option<ChannelEnds>> = (0..world).map(|_| None).collect();
        for peer in (0..world).filter(|&peer| peer != me && hosts[peer] == hosts[me]) {
            let theirs = Arc::new(Segment::open(own(rings[peer * world + me].fd())?, bytes)?);
            let doorbell = Doorbell::open(own(doorbells[peer].fd())?)?;
            let arena = PeerArena::open(own(arenas[peer].fd())?, arenas[peer].bytes())?;
            let ends_of_peer = channel(rings[me * world + peer].clone(), theirs, doorbell, arena);
            ends[peer] = Some(ends_of_peer.map_err(io::Error::other)?);
        }
        let alone = ends.iter().all(Option::is_none);
        let near = || Neighbours::new(Rank(me as u32), doorbells[me].clone(), arenas[me].clone(), ends);
        Ok((!alone).then(near))
    };
    (0..world).map(one).collect()
}
