//! Fetching a state: from all that have it at a time, every chunk checked.

use super::message::{Answer, Ask, Question};
use super::pack::{Manifest, StateId};
use crate::fault::{self, Point};
use lockstep_collectives::quic::Visit;
use lockstep_common::ids::Rank;
use lockstep_common::wire::{FrameError, Peer};
use quinn::Connection;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Chunks that are asked of one source at a time: enough that the link is full while it answers the next.
const AT_A_TIME: usize = 4;

/// How long a source may take for a chunk.
const CHUNK: Duration = Duration::from_secs(15);

/// How long the other sources may take for their manifests once one has sent its own.
const OTHERS: Duration = Duration::from_secs(2);

/// A rank whose desk is being visited.
#[derive(Clone)]
pub(super) struct Source {
    pub(super) rank: Rank,
    /// For messages: rank, worker and host.
    pub(super) name: String,
    pub(super) connection: Connection,
}

/// Why a state could not be fetched.
#[derive(Debug, PartialEq)]
pub(crate) struct FetchError {
    pub(crate) what: String,
    /// The rank that is to blame, if it can be told.
    pub(crate) culprit: Option<Rank>,
    /// Whether it is that sources hold different states.
    pub(crate) differ: bool,
}

/// A state, whole.
pub(super) struct Fetched {
    pub(super) bytes: Vec<u8>,
    /// What was wrong with sources that could be done without.
    pub(super) complaints: Vec<String>,
}

impl Source {
    /// Calls on `peer`.
    pub(super) async fn reach(visit: &Visit, peer: &Peer) -> Result<Self, String> {
        let name = format!("{} ({} on {})", peer.rank, peer.worker, peer.host);
        match visit.call(crate::mesh::peer(peer)).await {
            Ok(connection) => Ok(Self { rank: peer.rank, name, connection }),
            Err(error) => Err(format!("{name}: {error}")),
        }
    }

    /// Asks for the state that this rank starts from, and its ledger.
    async fn state(&self) -> Result<(Manifest, Vec<u8>), FrameError> {
        let mut question = Question::ask(&self.connection, &Ask::State).await?;
        match question.answer().await? {
            Answer::State { manifest, ledger_bytes } => Ok((manifest, question.ledger(ledger_bytes).await?)),
            Answer::NotHere { reason } => Err(FrameError::Malformed(reason)),
            Answer::Chunk => Err(FrameError::Malformed("it answered another question".to_owned())),
        }
    }

    /// One chunk, checked.
    async fn chunk(&self, manifest: &Manifest, of: StateId, chunk: usize) -> Result<Vec<u8>, Fault> {
        let ask = Ask::Chunk { of, chunk: chunk as u32 };
        let exchange = async {
            let mut question = Question::ask(&self.connection, &ask).await?;
            match question.answer().await? {
                Answer::Chunk => question.bytes(manifest.range(chunk).len()).await,
                Answer::NotHere { reason } => Err(FrameError::Malformed(reason)),
                Answer::State { .. } => Err(FrameError::Malformed("it answered another question".to_owned())),
            }
        };
        match timeout(CHUNK, exchange).await {
            Ok(Ok(bytes)) if manifest.matches(chunk, &bytes) => Ok(bytes),
            Ok(Ok(_)) => Err(Fault::Wrong(format!(
                "{} sent chunk {chunk} of the state with other bytes than its hash",
                self.name
            ))),
            Ok(Err(error)) => Err(Fault::Gone(format!("{}: {error}", self.name))),
            Err(_) => Err(Fault::Gone(format!("{}: no chunk within {} s", self.name, CHUNK.as_secs()))),
        }
    }
}

/// What is wrong with a source.
enum Fault {
    /// It cannot be reached, or has the state no more.
    Gone(String),
    /// What it sent is not what it announced.
    Wrong(String),
}

/// Calls on `peers`, all at a time, and returns those that answer with what they start from.
pub(super) async fn states(
    visit: Arc<Visit>,
    peers: Vec<Peer>,
) -> Result<Vec<(Source, Manifest, Vec<u8>)>, FetchError> {
    let mut calls = JoinSet::new();
    for peer in peers {
        let visit = visit.clone();
        calls.spawn(async move {
            let source = Source::reach(&visit, &peer).await?;
            match source.state().await {
                Ok((manifest, ledger)) => Ok((source, manifest, ledger)),
                Err(error) => Err(format!("{}: {error}", source.name)),
            }
        });
    }
    let (mut found, mut reasons) = (Vec::new(), Vec::new());
    loop {
        let next = match found.is_empty() {
            true => calls.join_next().await,
            false => timeout(OTHERS, calls.join_next()).await.ok().flatten(),
        };
        match next {
            Some(Ok(Ok(state))) => found.push(state),
            Some(Ok(Err(reason))) => reasons.push(reason),
            Some(Err(error)) => reasons.push(error.to_string()),
            None => break,
        }
    }
    if found.is_empty() {
        let what = format!("nobody hands over the state: {}", reasons.join("; "));
        return Err(FetchError { what, culprit: None, differ: false });
    }
    found.sort_by_key(|(source, ..)| source.rank);
    agree(&found)?;
    Ok(found)
}

/// Refuses sources that have different states, and names the odd one where most agree.
fn agree(found: &[(Source, Manifest, Vec<u8>)]) -> Result<(), FetchError> {
    let like = |manifest: &Manifest| found.iter().filter(|(_, other, _)| other == manifest).count();
    let Some((_, most, _)) = found.iter().max_by_key(|(_, manifest, _)| like(manifest)) else {
        return Ok(());
    };
    let Some((odd, ..)) = found.iter().find(|(_, manifest, _)| manifest != most) else { return Ok(()) };
    let majority = 2 * like(most) > found.len();
    let what = match majority {
        true => format!("{} holds another state than the other ranks", odd.name),
        false => {
            let names: Vec<&str> = found.iter().map(|(source, ..)| source.name.as_str()).collect();
            format!("{} hold different states, and no majority tells which is right", names.join(" and "))
        }
    };
    Err(FetchError { what, culprit: majority.then_some(odd.rank), differ: true })
}

/// Fetches all chunks of `manifest`, spread over `sources`. One that fails is done without, as long as there are others.
pub(super) async fn chunks(
    sources: &[Source],
    manifest: &Arc<Manifest>,
    of: StateId,
) -> Result<Fetched, FetchError> {
    let mut bytes = vec![0; manifest.bytes as usize];
    let mut left: VecDeque<usize> = (0..manifest.chunk_count()).collect();
    // Per source: how many chunks it is asked for; `None` once it has failed.
    let mut asked: Vec<Option<usize>> = vec![Some(0); sources.len()];
    let (mut gone, mut wrong, mut culprit) = (Vec::new(), Vec::new(), None);
    let mut answers = JoinSet::new();
    loop {
        while let Some(place) = least_busy(&asked)
            && let Some(chunk) = left.pop_front()
        {
            let (source, manifest) = (sources[place].clone(), manifest.clone());
            answers.spawn(async move { (place, chunk, source.chunk(&manifest, of, chunk).await) });
            asked[place] = asked[place].map(|count| count + 1);
        }
        let Some(answer) = answers.join_next().await else { break };
        let (place, chunk, answer) = answer.map_err(|e| {
            let what = format!("a fetching task ended early: {e}");
            FetchError { what, culprit: None, differ: false }
        })?;
        asked[place] = asked[place].map(|count| count - 1);
        match answer {
            Ok(part) => {
                bytes[manifest.range(chunk)].copy_from_slice(&part);
                fault::point(Point::Heal, manifest.position.step + 1);
            }
            Err(fault) => {
                left.push_back(chunk);
                match fault {
                    // Its other answers say the same.
                    _ if asked[place].is_none() => {}
                    Fault::Gone(what) => gone.push(what),
                    Fault::Wrong(what) => {
                        culprit = Some(sources[place].rank);
                        wrong.push(what);
                    }
                }
                asked[place] = None;
            }
        }
    }
    if left.is_empty() {
        return Ok(Fetched { bytes, complaints: wrong });
    }
    wrong.extend(gone);
    let missing = left.len();
    let what = format!(
        "{missing} of {} chunks of the state are missing: {}",
        manifest.chunk_count(),
        wrong.join("; ")
    );
    Err(FetchError { what, culprit, differ: false })
}

/// The source that is asked for the fewest chunks, if one can be asked for another.
fn least_busy(asked: &[Option<usize>]) -> Option<usize> {
    let free = asked.iter().enumerate().filter_map(|(place, count)| Some((count.as_ref()?, place)));
    free.filter(|(count, _)| **count < AT_A_TIME).min().map(|(_, place)| place)
}
