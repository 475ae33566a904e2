//! Lets visitors in: only workers of this cluster, and to a rank's starting state only ranks of its generation.

use super::desk::Desk;
use super::message::{Ask, Question};
use lockstep_collectives::quic::Accepted;
use lockstep_common::ids::{Generation, JobId, Rank};
use lockstep_common::net::{Role, peer_role};
use lockstep_common::wire::Assignment;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

/// The rank of a visitor that has none.
pub(super) const NO_RANK: Rank = Rank(u32::MAX);

/// How many visitors may be here at a time: the ranks of a large generation, all behind.
const VISITORS: usize = 256;

/// How long a visitor waits for a generation that this worker has not been told of yet.
const PATIENCE: Duration = Duration::from_secs(30);

/// A worker's desks.
pub(crate) struct Station {
    runtime: Handle,
    /// The newest generation of each job that has begun here, and its desk until it has ended.
    desks: watch::Sender<HashMap<JobId, (Generation, Option<Arc<Desk>>)>>,
    seats: Arc<Semaphore>,
}

/// An open desk. Dropping it closes it; those who are served finish.
pub(crate) struct OpenDesk {
    station: Arc<Station>,
    pub(crate) desk: Arc<Desk>,
}

impl Station {
    /// A station that serves `visitors`, in the background of the current runtime.
    pub(crate) fn start(mut visitors: UnboundedReceiver<Accepted>) -> Arc<Self> {
        let station = Arc::new(Self {
            runtime: Handle::current(),
            desks: watch::Sender::default(),
            seats: Arc::new(Semaphore::new(VISITORS)),
        });
        let serving = station.clone();
        tokio::spawn(async move {
            while let Some(accepted) = visitors.recv().await {
                let Ok(seat) = serving.seats.clone().try_acquire_owned() else {
                    accepted.refuse("too many visitors at a time");
                    continue;
                };
                let serving = serving.clone();
                tokio::spawn(async move {
                    serving.receive(accepted).await;
                    drop(seat);
                });
            }
        });
        station
    }

    /// Opens the desk of a session that begins.
    pub(crate) fn open(self: &Arc<Self>, assignment: &Assignment) -> OpenDesk {
        let desk = Arc::new(Desk::new(assignment));
        self.desks.send_modify(|desks| {
            desks.insert(assignment.job, (assignment.generation, Some(desk.clone())));
        });
        self.runtime.spawn(Desk::tidy(Arc::downgrade(&desk)));
        OpenDesk { station: self.clone(), desk }
    }

    async fn receive(&self, accepted: Accepted) {
        let (job, generation) = accepted.about();
        let desk = match self.desk(job, generation).await {
            Ok(desk) => desk,
            Err(reason) => return accepted.refuse(&reason),
        };
        let (role, rank) = (peer_role(accepted.connection()), accepted.rank());
        let member = desk.member(rank).map(Role::Worker).is_some_and(|member| role == Some(member));
        let stranger = rank == NO_RANK && matches!(role, Some(Role::Worker(_)));
        if !member && !stranger {
            tracing::warn!("refused a visitor that calls itself {rank} of {job} and has another certificate");
            return accepted.refuse("not the worker that has this rank");
        }
        let connection = match accepted.let_in(desk.rank).await {
            Ok(connection) => connection,
            Err(error) => return tracing::debug!("a visitor went away: {error}"),
        };
        while let Ok((question, ask)) = Question::hear(&connection).await {
            let desk = desk.clone();
            tokio::spawn(async move {
                let answered = match ask {
                    Ask::State if member => desk.answer_state(question).await,
                    // One that is no member of the generation does not start with it.
                    Ask::State => return,
                    Ask::Chunk { of, chunk } => desk.answer_chunk(question, of, chunk).await,
                    Ask::Follow => desk.answer_follow(question).await,
                };
                if let Err(error) = answered {
                    tracing::debug!("a visitor's question was left: {error}");
                }
            });
        }
    }

    /// The desk of that generation, once it is open.
    async fn desk(&self, job: JobId, generation: Generation) -> Result<Arc<Desk>, String> {
        let mut desks = self.desks.subscribe();
        let reached = desks.wait_for(|desks| desks.get(&job).is_some_and(|(at, _)| *at >= generation));
        let Ok(Ok(desks)) = timeout(PATIENCE, reached).await else {
            return Err(format!("{generation} of {job} has not begun here"));
        };
        match desks.get(&job) {
            Some((at, Some(desk))) if *at == generation => Ok(desk.clone()),
            _ => Err(format!("{generation} of {job} is over here")),
        }
    }
}

impl Drop for OpenDesk {
    fn drop(&mut self) {
        self.desk.close();
        let (job, generation) = self.desk.about();
        self.station.desks.send_modify(|desks| {
            if let Some((at, desk)) = desks.get_mut(&job)
                && *at == generation
            {
                *desk = None;
            }
        });
    }
}
