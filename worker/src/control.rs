//! The worker's line to its coordinator, as the training threads see it.
//!
//! Reports go into an outbox that outlives the connection, because a running job goes on while the coordinator
//! is away. They stay there until the coordinator says that it has taken care of them: what was written to a
//! connection whose other end had died is sent again over the next one. Requests block the calling thread until there is a
//! connection and an answer.

use lockstep_common::ids::{Generation, JobId};
use lockstep_common::net::{Exchange, NetError};
use lockstep_common::wire::{CheckpointPart, FileHead, FromWorker, Request, Response};
use parking_lot::{Condvar, Mutex};
use quinn::Connection;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

/// Reports kept while the coordinator is away; beyond that the oldest go. There are at most five reports of steps a second,
/// so this is more than five hours. Each has all steps of its time with a hash for each logical shard.
const OUTBOX_REPORTS: usize = 100_000;

/// The largest file that is taken from a coordinator: far above any checkpoint of the shipped systems.
const MAX_FILE_BYTES: u64 = 16 << 30;

#[derive(Clone)]
pub(crate) struct Control {
    outbox: Arc<Outbox>,
    connection: watch::Receiver<Option<Connection>>,
    runtime: Handle,
}

#[derive(Default)]
struct Outbox {
    queue: Mutex<Queue>,
    added: Notify,
    /// Reports have been heard of, or dropped.
    heard: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Reports that the coordinator has not been heard to have, the oldest first.
    reports: VecDeque<FromWorker>,
    /// How many of them have been sent in this session.
    sent: usize,
    /// What is worth telling only while it is new, one of a kind.
    news: Vec<FromWorker>,
    /// The generation whose steps were heard last, and the last of those.
    heard: Option<(JobId, Generation, u64)>,
}

/// A message to the coordinator.
pub(crate) enum Outgoing {
    /// One that the coordinator says it has heard.
    Report(FromWorker),
    /// One that it does not.
    News(FromWorker),
}

impl Outgoing {
    /// The message itself.
    pub(crate) fn message(&self) -> &FromWorker {
        match self {
            Self::Report(message) | Self::News(message) => message,
        }
    }
}

/// The agent's end: what it publishes and what it sends.
pub(crate) struct ControlFeed {
    outbox: Arc<Outbox>,
    pub(crate) connection: watch::Sender<Option<Connection>>,
}

pub(crate) fn channel(runtime: Handle) -> (Control, ControlFeed) {
    let outbox = Arc::new(Outbox::default());
    let (sender, receiver) = watch::channel(None);
    (
        Control { outbox: outbox.clone(), connection: receiver, runtime },
        ControlFeed { outbox, connection: sender },
    )
}

/// What is to be said to the coordinator, for whoever writes it.
pub(crate) struct Outgoings(Arc<Outbox>);

impl Outgoings {
    /// The news, or else the oldest report that is not sent yet. It counts as sent from now on, before anything can be
    /// heard of it; if it does not arrive, the session ends, and the next one sends it again.
    pub(crate) async fn next(&self) -> Outgoing {
        loop {
            let added = self.0.added.notified();
            let next = {
                let mut queue = self.0.queue.lock();
                let news = queue.news.pop().map(Outgoing::News);
                let report = || queue.reports.get(queue.sent).cloned();
                match news {
                    Some(news) => Some(news),
                    None => report().inspect(|_| queue.sent += 1).map(Outgoing::Report),
                }
            };
            if let Some(outgoing) = next {
                return outgoing;
            }
            added.await;
        }
    }
}

impl ControlFeed {
    /// What is to be said.
    pub(crate) fn outgoing(&self) -> Outgoings {
        Outgoings(self.outbox.clone())
    }

    /// The coordinator has taken care of the `reports` oldest of those sent.
    pub(crate) fn heard(&self, reports: u64) {
        let mut queue = self.outbox.queue.lock();
        let heard = queue.sent.min(usize::try_from(reports).unwrap_or(usize::MAX));
        let steps = queue.reports.drain(..heard).rev().find_map(|report| match report {
            FromWorker::Steps { job, generation, records } => Some((job, generation, records.last()?.step)),
            _ => None,
        });
        queue.heard = steps.or(queue.heard);
        queue.sent -= heard;
        drop(queue);
        self.outbox.heard.notify_all();
    }

    /// A new session begins: what was not heard in the old one is sent again. News from before it is none.
    pub(crate) fn restart(&self) {
        let mut queue = self.outbox.queue.lock();
        queue.sent = 0;
        queue.news.clear();
    }

    /// Whether the coordinator has taken care of everything.
    pub(crate) fn is_drained(&self) -> bool {
        self.outbox.queue.lock().reports.is_empty()
    }
}

impl Control {
    /// Reports to the coordinator, now or once it is back.
    pub(crate) fn tell(&self, report: FromWorker) {
        let mut queue = self.outbox.queue.lock();
        if queue.reports.len() >= OUTBOX_REPORTS {
            queue.reports.pop_front();
            queue.sent = queue.sent.saturating_sub(1);
            self.outbox.heard.notify_all();
        }
        queue.reports.push_back(report);
        drop(queue);
        self.outbox.added.notify_one();
    }

    /// Tells the coordinator what counts only while it is new: it is not kept while the coordinator is away, and takes
    /// the place of older news of its kind that is still on the way.
    pub(crate) fn tell_news(&self, news: FromWorker) {
        if self.is_connected() {
            let kind = std::mem::discriminant(&news);
            let mut queue = self.outbox.queue.lock();
            queue.news.retain(|old| std::mem::discriminant(old) != kind);
            queue.news.push(news);
            drop(queue);
            self.outbox.added.notify_one();
        }
    }

    /// Whether the coordinator is there, as far as this worker knows.
    pub(crate) fn is_connected(&self) -> bool {
        self.connection.borrow().is_some()
    }

    /// The last step that the coordinator has been heard to know from this generation; 0 if none.
    pub(crate) fn heard_step(&self, job: JobId, generation: Generation) -> u64 {
        let heard = self.outbox.queue.lock().heard;
        heard.filter(|(j, g, _)| (*j, *g) == (job, generation)).map_or(0, |(.., step)| step)
    }

    async fn connected(&self) -> Result<Connection, NetError> {
        let mut watch = self.connection.clone();
        let connection = watch.wait_for(Option::is_some).await.ok().and_then(|c| c.clone());
        connection.ok_or_else(leaving)
    }

    /// Runs `exchange` against the coordinator, again on a new connection each time the old one breaks.
    fn with_connection<T, F>(&self, exchange: impl Fn(Connection) -> F) -> Result<T, NetError>
    where
        F: Future<Output = Result<T, NetError>>,
    {
        self.runtime.block_on(async {
            loop {
                let connection = self.connected().await?;
                match exchange(connection.clone()).await {
                    Err(NetError::Connect { .. } | NetError::Frame(_))
                        if connection.close_reason().is_some() =>
                    {
                        // Wait until the agent has published the next connection.
                        let mut watch = self.connection.clone();
                        let old = connection.stable_id();
                        let changed =
                            watch.wait_for(|c| c.as_ref().is_none_or(|c| c.stable_id() != old)).await;
                        changed.map_err(|_| leaving())?;
                    }
                    result => return result,
                }
            }
        })
    }

    /// A dataset's manifest, as JSON.
    pub(crate) fn manifest(&self, dataset: &str) -> Result<String, NetError> {
        let request = Request::Manifest { dataset: dataset.to_owned() };
        self.with_connection(|connection| {
            let request = request.clone();
            async move {
                match Exchange::ask(&connection, &request).await? {
                    Response::Manifest { json } => Ok(json),
                    _ => Err(NetError::UnexpectedAnswer),
                }
            }
        })
    }

    /// One dataset shard.
    pub(crate) fn shard(&self, dataset: &str, hash: &str) -> Result<Vec<u8>, NetError> {
        let request = Request::Shard { dataset: dataset.to_owned(), hash: hash.to_owned() };
        let files = self.with_connection(|connection| fetch(connection, request.clone()))?;
        files.into_iter().next().map(|(_, bytes)| bytes).ok_or(NetError::UnexpectedAnswer)
    }

    /// The files of a checkpoint.
    pub(crate) fn checkpoint(
        &self,
        job: JobId,
        generation: Generation,
        step: u64,
    ) -> Result<Vec<(String, Vec<u8>)>, NetError> {
        let request = Request::GetCheckpoint { job, generation, step };
        self.with_connection(|connection| fetch(connection, request.clone()))
    }

    /// Waits until the coordinator has been heard to know all steps of `job` up to `step` that it has been told of; not for
    /// ever while it is there and says nothing: what keeps it from writing them down is then the answer to what comes next.
    pub(crate) fn wait_until_heard(&self, job: JobId, step: u64) {
        /// Far longer than a disk that can be written takes.
        const PATIENCE: Duration = Duration::from_secs(10);
        /// How often the coordinator's presence is looked at.
        const LOOK: Duration = Duration::from_secs(1);
        let is_waiting = |report: &FromWorker| match report {
            FromWorker::Steps { job: of, records, .. } => {
                *of == job && records.first().is_some_and(|first| first.step <= step)
            }
            _ => false,
        };
        let mut queue = self.outbox.queue.lock();
        let mut since = Instant::now();
        while queue.reports.iter().any(is_waiting) && since.elapsed() < PATIENCE {
            let unheard = self.outbox.heard.wait_for(&mut queue, LOOK).timed_out();
            if !unheard || !self.is_connected() {
                since = Instant::now();
            }
        }
    }

    /// Stores this rank's part of a checkpoint with the coordinator; returns once the whole of it is durable there.
    pub(crate) fn store_checkpoint(
        &self,
        part: CheckpointPart,
        files: &[(&str, Vec<u8>)],
    ) -> Result<(), NetError> {
        let request = Request::PutCheckpoint(part);
        self.with_connection(|connection| store(connection, request.clone(), files))
    }

    /// Stores a file for people to look at.
    pub(crate) fn store_artifact(
        &self,
        job: JobId,
        generation: Generation,
        name: &str,
        bytes: Vec<u8>,
    ) -> Result<(), NetError> {
        let file = FileHead { name: name.to_owned(), bytes: bytes.len() as u64 };
        let request = Request::PutArtifact { job, generation, file };
        let files = [(name, bytes)];
        self.with_connection(|connection| store(connection, request.clone(), &files))
    }
}

fn leaving() -> NetError {
    NetError::Refused { reason: "leaving".to_owned(), message: "this worker is leaving".to_owned() }
}

async fn fetch(connection: Connection, request: Request) -> Result<Vec<(String, Vec<u8>)>, NetError> {
    let mut exchange = Exchange::open(&connection, &request).await?;
    let _ = exchange.send.finish();
    let Response::Files(heads) = exchange.answer().await? else { return Err(NetError::UnexpectedAnswer) };
    let mut files = Vec::with_capacity(heads.len());
    for head in heads {
        if head.bytes > MAX_FILE_BYTES {
            return Err(NetError::UnexpectedAnswer);
        }
        let mut bytes = Vec::new();
        let mut part = tokio::io::AsyncReadExt::take(&mut exchange.recv, head.bytes);
        tokio::io::AsyncReadExt::read_to_end(&mut part, &mut bytes)
            .await
            .map_err(lockstep_common::wire::FrameError::Io)?;
        if bytes.len() as u64 != head.bytes {
            return Err(
                lockstep_common::wire::FrameError::Io(std::io::ErrorKind::UnexpectedEof.into()).into()
            );
        }
        files.push((head.name, bytes));
    }
    Ok(files)
}

async fn store(connection: Connection, request: Request, files: &[(&str, Vec<u8>)]) -> Result<(), NetError> {
    let mut exchange = Exchange::open(&connection, &request).await?;
    let mut sent = Ok(());
    for (_, bytes) in files {
        sent = exchange.send.write_all(bytes).await;
        if sent.is_err() {
            break;
        }
    }
    let _ = exchange.send.finish();
    // A refusal (a full disk, say) stops the sending early and is the better explanation.
    match exchange.answer().await {
        Ok(Response::Done) => Ok(()),
        Ok(_) => Err(NetError::UnexpectedAnswer),
        Err(refused @ NetError::Refused { .. }) => Err(refused),
        Err(other) => match sent {
            Ok(()) => Err(other),
            Err(e) => Err(lockstep_common::wire::FrameError::Io(e.into()).into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block<T>(future: impl Future<Output = T>) -> T {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.build().expect("a runtime").block_on(future)
    }

    #[test]
    fn what_is_heard_before_its_writer_goes_on_is_done_with() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (control, feed) = channel(runtime.handle().clone());
        control.tell(FromWorker::Leaving);
        let outgoing = feed.outgoing();
        let report = block(outgoing.next());
        assert!(matches!(report, Outgoing::Report(FromWorker::Leaving)), "{:?}", report.message());
        feed.heard(1);
        assert!(feed.is_drained(), "heard, and still to be sent");
    }

    #[test]
    fn what_was_not_heard_in_one_session_is_sent_again_in_the_next() {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let (control, feed) = channel(runtime.handle().clone());
        control.tell(FromWorker::Leaving);
        block(feed.outgoing().next());
        feed.heard(0);
        feed.restart();
        assert!(matches!(block(feed.outgoing().next()).message(), FromWorker::Leaving));
        feed.heard(1);
        assert!(feed.is_drained());
    }
}
