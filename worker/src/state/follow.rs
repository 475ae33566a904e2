//! A worker that wants to join a running job: a copy of the state, kept up to date.
//!
//! The copy is at most a step or two behind when the generation changes, so that the others wait for no transfer. If
//! following fails, the worker fetches the whole state when it joins ([`heal`](super::heal)).

use super::fetch::{FetchError, Source, chunks};
use super::message::{Answer, Ask, News, Question};
use super::pack::{Manifest, unpack};
use super::station::NO_RANK;
use super::update::UpdateHead;
use crate::kept::State;
use crate::ledger::Ledger;
use crate::session::{Environment, data};
use crate::tasks::TaskPlan;
use crate::train::Number;
use crate::train::device::device;
use crate::train::error::TrainError;
use crate::train::replica::Replica;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use lockstep_collectives::quic::Visit;
use lockstep_common::ids::{Generation, JobId};
use lockstep_common::job::{JobSpec, Precision};
use lockstep_common::wire::{Following, FrameError, Peer, Position, read_frame};
use lockstep_nn::vars::Vars;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

/// How often following may begin again after it was too slow, or lost its source.
const ATTEMPTS: usize = 3;

/// A copy that is no more than this many steps behind is ready.
const CLOSE: u64 = 2;

/// Updates that are read before they are applied.
const AHEAD: usize = 4;

/// How long the last updates may take at the change of the generation.
const LAST_UPDATES: Duration = Duration::from_secs(10);

/// What a follower is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    Follow,
    /// Stop at this position and hand the copy over.
    Finish(Position),
    GiveUp,
}

/// A follower's handle. Dropping it ends it.
pub(crate) struct Follower {
    job: JobId,
    order: watch::Sender<Order>,
    copy: Receiver<Option<State>>,
}

/// How far a follower is: it is ready.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ready {
    pub(crate) job: JobId,
    pub(crate) generation: Generation,
    pub(crate) position: Position,
}

impl Follower {
    /// Begins to follow on a thread of its own; `ready` is called once.
    pub(crate) fn start(
        environment: Environment,
        following: Following,
        ready: impl FnOnce(Ready) + Send + 'static,
    ) -> Self {
        let (order, orders) = watch::channel(Order::Follow);
        let (hand_over, copy) = bounded(1);
        let job = following.job;
        let ready: Box<dyn FnOnce(Ready) + Send> = Box::new(ready);
        let work = move || follow(&environment, &following, orders, Some(ready), &hand_over);
        if let Err(error) = std::thread::Builder::new().name(format!("follow-{job}")).spawn(work) {
            tracing::warn!("{job}: cannot start the thread that follows: {error}");
        }
        Self { job, order, copy }
    }

    /// The copy, brought to `position`; `None` if it does not get there.
    pub(crate) fn finish(self, position: Position, aborted: &AtomicBool) -> Option<State> {
        const LOOK: Duration = Duration::from_millis(50);
        self.order.send_replace(Order::Finish(position));
        let deadline = Instant::now() + LAST_UPDATES;
        while !aborted.load(Ordering::Relaxed) && Instant::now() < deadline {
            match self.copy.recv_timeout(LOOK) {
                Ok(copy) => return copy,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        tracing::info!("{}: the copy did not get to {position} in time", self.job);
        None
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.order.send_replace(Order::GiveUp);
    }
}

type OnReady = Option<Box<dyn FnOnce(Ready) + Send>>;

fn follow(
    environment: &Environment,
    following: &Following,
    orders: watch::Receiver<Order>,
    ready: OnReady,
    hand_over: &Sender<Option<State>>,
) {
    tch::set_num_threads(1);
    let (job, generation) = (following.job, following.generation);
    let spec = match JobSpec::parse(&following.file, &following.toml) {
        Ok(spec) => spec,
        Err(error) => return tracing::warn!("{job}: cannot be followed: {error}"),
    };
    let mut follow = Follow { environment, following, plan: TaskPlan::new(&spec), spec, orders, ready };
    let copy = match follow.spec.precision {
        Precision::F32 | Precision::Bf16 => follow.run::<f32>(),
        Precision::F64 => follow.run::<f64>(),
    };
    if copy.is_none() && *follow.orders.borrow() == Order::Follow {
        tracing::info!("{job}: the state of {generation} will be fetched when this worker joins");
    }
    // Ready to join, if not with a copy.
    follow.tell(Position::default());
    // The other end has given up otherwise.
    let _ = hand_over.send(copy);
}

struct Follow<'a> {
    environment: &'a Environment,
    following: &'a Following,
    spec: JobSpec,
    plan: TaskPlan,
    orders: watch::Receiver<Order>,
    ready: OnReady,
}

/// Why an attempt ended without a copy.
enum Ended {
    /// Another attempt may do better.
    Again(String),
    /// The copy is not wanted, or no attempt would do.
    Never(String),
}

impl From<TrainError> for Ended {
    fn from(error: TrainError) -> Self {
        Self::Never(error.to_string())
    }
}

impl From<FetchError> for Ended {
    fn from(error: FetchError) -> Self {
        Self::Again(error.what)
    }
}

impl From<FrameError> for Ended {
    fn from(error: FrameError) -> Self {
        Self::Again(error.to_string())
    }
}

impl Follow<'_> {
    /// Says, once, that this worker can join.
    fn tell(&mut self, position: Position) {
        if let Some(ready) = self.ready.take() {
            let (job, generation) = (self.following.job, self.following.generation);
            ready(Ready { job, generation, position });
        }
    }

    /// The copy, once it is where it was ordered to be.
    fn run<T: Number>(&mut self) -> Option<State> {
        let job = self.following.job;
        let datasets = &self.following.datasets;
        if let Err(error) = data::warm_up::<T>(self.environment, &self.spec, datasets, &self.plan) {
            tracing::info!("{job}: the data could not be prepared: {error}");
        }
        let sources = self.following.sources.len();
        for attempt in 0..ATTEMPTS {
            // Followers are spread over the members.
            let first = self.environment.worker.0 as usize + attempt;
            let order: Vec<Peer> =
                (0..sources).map(|place| self.following.sources[(first + place) % sources].clone()).collect();
            let mut orders = self.orders.clone();
            let attempt = self.environment.runtime.clone().block_on(async {
                tokio::select! {
                    attempt = self.attempt(order, T::KIND) => attempt,
                    _ = orders.wait_for(|order| *order == Order::GiveUp) => {
                        Err(Ended::Never("it is not to join any more".to_owned()))
                    }
                }
            });
            match attempt {
                Ok(state) => return Some(state),
                Err(Ended::Again(why)) => tracing::info!("{job}: following begins again: {why}"),
                Err(Ended::Never(why)) => {
                    tracing::info!("{job}: no longer followed: {why}");
                    return None;
                }
            }
            if *self.orders.borrow() != Order::Follow {
                return None;
            }
        }
        None
    }

    /// Fetches a state from `order`, follows the first of them.
    async fn attempt(&mut self, order: Vec<Peer>, kind: tch::Kind) -> Result<State, Ended> {
        let mut orders = self.orders.clone();
        let visit =
            Arc::new(self.environment.mesh.visit((self.following.job, self.following.generation), NO_RANK));
        let (source, others) = self.reach(&visit, order).await?;
        let mut question = Question::ask(&source.connection, &Ask::Follow).await?;
        let answer = tokio::select! {
            answer = question.answer() => answer?,
            // Whoever is to join now has no copy yet.
            _ = orders.wait_for(|order| *order != Order::Follow) => {
                return Err(Ended::Never("it is to join before it has a copy".to_owned()));
            }
        };
        let (manifest, ledger) = match answer {
            Answer::State { manifest, ledger_bytes } => (manifest, question.ledger(ledger_bytes).await?),
            Answer::NotHere { reason } => return Err(Ended::Again(format!("{}: {reason}", source.name))),
            Answer::Chunk => return Err(Ended::Never(format!("{} answered another question", source.name))),
        };
        let ledger = Ledger::from_bytes(&ledger).unwrap_or_default();
        let mut replica = Replica::new(&self.plan, kind, device(self.environment.device))?;
        if let Some(problem) = manifest.problem(self.following.job, &replica, &self.plan)? {
            return Err(Ended::Never(format!("the state of {} {problem}", source.name)));
        }
        self.take(&source, others, manifest, &mut replica).await?;
        self.updates(question, replica, ledger.of_a_newcomer()).await
    }

    /// Connects to all of `order`; the first that answers is followed.
    async fn reach(&self, visit: &Arc<Visit>, order: Vec<Peer>) -> Result<(Source, Vec<Source>), Ended> {
        let mut calls = JoinSet::new();
        for (place, peer) in order.into_iter().enumerate() {
            let visit = visit.clone();
            calls.spawn(async move { (place, Source::reach(&visit, &peer).await) });
        }
        let (mut found, mut reasons) = (Vec::new(), Vec::new());
        while let Some(call) = calls.join_next().await {
            match call {
                Ok((place, Ok(source))) => found.push((place, source)),
                Ok((_, Err(reason))) => reasons.push(reason),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        found.sort_by_key(|(place, _)| *place);
        let mut found = found.into_iter().map(|(_, source)| source);
        match found.next() {
            Some(first) => Ok((first, found.collect())),
            None => Err(Ended::Again(reasons.join("; "))),
        }
    }

    /// Fetches the state of `manifest` from all that have it.
    async fn take(
        &self,
        source: &Source,
        others: Vec<Source>,
        manifest: Manifest,
        replica: &mut Replica,
    ) -> Result<(), Ended> {
        let id = manifest.id()?;
        let manifest = Arc::new(manifest);
        let sources: Vec<Source> = std::iter::once(source.clone()).chain(others).collect();
        let fetched = chunks(&sources, &manifest, id).await?;
        for complaint in fetched.complaints {
            tracing::warn!("{}: {complaint}", self.following.job);
        }
        Ok(unpack(&manifest, &fetched.bytes, replica, &self.plan)?)
    }

    /// Applies updates until the copy is where it was ordered to be.
    async fn updates(
        &mut self,
        question: Question,
        mut replica: Replica,
        ledger: Ledger,
    ) -> Result<State, Ended> {
        let mut orders = self.orders.clone();
        // Reading is not to be given up in the middle, so a task of its own does it; it ends with this one.
        let (incoming, mut updates) = mpsc::channel(AHEAD);
        let mut reader = JoinSet::new();
        reader.spawn(read(question, incoming, gradient_bytes(&replica)));
        let mut ended = false;
        loop {
            let position = replica.position();
            match *orders.borrow_and_update() {
                Order::Finish(at) if at == position => return Ok(State { replica, ledger }),
                Order::Finish(at) if at < position => {
                    let why = format!("the copy is at {position}, which is beyond {at}");
                    return Err(Ended::Never(why));
                }
                Order::Finish(at) if ended => {
                    return Err(Ended::Never(format!("the copy is at {position}, the others are at {at}")));
                }
                Order::GiveUp => return Err(Ended::Never("it is not to join any more".to_owned())),
                Order::Finish(_) | Order::Follow => {}
            }
            let update = tokio::select! {
                changed = orders.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return Err(Ended::Never("it is not to join any more".to_owned())),
                },
                update = updates.recv(), if !ended => update,
            };
            match update {
                Some(Ok(Told::Update { head, gradients, newest })) => {
                    if let Some(problem) = head.problem(&replica) {
                        return Err(Ended::Never(format!("an update {problem}")));
                    }
                    let update = head.with(&gradients, &replica)?;
                    replica.apply(update, &self.spec.clip, false)?;
                    if newest.step.saturating_sub(replica.step) <= CLOSE {
                        self.tell(replica.position());
                    }
                }
                // The generation has ended: the copy is wanted where it is, or not at all.
                Some(Ok(Told::End)) => ended = true,
                Some(Ok(Told::Overflow)) => return Err(Ended::Again("the copy fell behind".to_owned())),
                Some(Err(error)) => return Err(error.into()),
                None => return Err(Ended::Again("the source went away".to_owned())),
            }
        }
    }
}

/// What comes from the source.
enum Told {
    Update { head: Box<UpdateHead>, gradients: Vec<u8>, newest: Position },
    End,
    Overflow,
}

/// Reads until there is nothing more to read. No update has more than `most` bytes.
async fn read(mut question: Question, into: mpsc::Sender<Result<Told, FrameError>>, most: u64) {
    loop {
        let told = match read_frame(&mut question.recv).await {
            Ok(News::Update { head, .. }) if head.bytes > most => {
                Err(FrameError::TooLarge { bytes: head.bytes as usize })
            }
            Ok(News::Update { head, newest }) => {
                let gradients = question.bytes(head.bytes as usize).await;
                gradients.map(|gradients| Told::Update { head, gradients, newest })
            }
            Ok(News::End) => Ok(Told::End),
            Ok(News::Overflow) => Ok(Told::Overflow),
            Err(error) => Err(error),
        };
        let last = !matches!(told, Ok(Told::Update { .. }));
        if into.send(told).await.is_err() || last {
            return;
        }
    }
}

/// The bytes of the largest network's gradients.
fn gradient_bytes(replica: &Replica) -> u64 {
    let network = |vars: &Vars| {
        let bytes =
            vars.parameters().map(|(_, var)| var.tensor.numel() * var.tensor.kind().elt_size_in_bytes());
        bytes.sum::<usize>() as u64
    };
    replica.vars.iter().map(network).max().unwrap_or(0)
}
