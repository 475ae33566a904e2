//! Where one session shows its state: to ranks of its generation that are behind, and to those that want to join.
//!
//! It costs nothing while nobody asks: the state is copied when a visitor wants it, updates are copied while somebody
//! follows.

use super::message::{Answer, News, Question};
use super::pack::{Copied, Packed, StateId};
use super::update::Entry;
use crate::ledger::Ledger;
use crate::train::error::TrainError;
use crate::train::replica::PhaseUpdate;
use lockstep_common::ids::{Generation, JobId, Rank, WorkerId};
use lockstep_common::wire::{Assignment, FrameError, Position, write_frame};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

/// The most bytes of updates that wait for one follower, unless the state is larger: then four times that.
const LOG_BYTES: usize = 256 << 20;

/// How long a copied state is there for followers after the last question about it.
const IDLE: Duration = Duration::from_secs(30);

/// A session's desk.
pub(crate) struct Desk {
    job: JobId,
    generation: Generation,
    pub(super) rank: Rank,
    /// By rank.
    members: Vec<WorkerId>,
    /// Tells the session that a member asks for the state that it starts from.
    asked: Notify,
    start: watch::Sender<Start>,
    /// Whether a follower waits for a copy of the state.
    wanted: AtomicBool,
    /// Whether a follower takes updates.
    followed: AtomicBool,
    followers: Mutex<Followers>,
    copies: watch::Sender<VecDeque<Arc<Packed>>>,
    /// Counts the questions about copies.
    questions: watch::Sender<u64>,
}

/// The state that the session starts from.
#[derive(Clone)]
enum Start {
    /// It may be asked for.
    Pending,
    Here(Arc<Packed>, Arc<Vec<u8>>),
    /// The session has gone on, or never had it.
    Gone(&'static str),
}

#[derive(Default)]
struct Followers {
    /// Those who wait for a copy.
    waiting: Vec<Arc<Queue>>,
    /// Those who have been given one, and take the updates after it.
    following: Vec<Arc<Queue>>,
    ended: bool,
}

/// What waits for one follower.
struct Queue {
    state: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Default)]
struct Waiting {
    /// The copied state, once it is packed.
    copy: Option<(Arc<Packed>, Arc<Vec<u8>>)>,
    entries: VecDeque<Arc<Entry>>,
    bytes: usize,
    limit: usize,
    end: Option<End>,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Session,
    Overflow,
    /// Nobody reads it any more.
    Left,
}

impl Desk {
    /// The desk of a session that begins.
    pub(crate) fn new(assignment: &Assignment) -> Self {
        Self {
            job: assignment.job,
            generation: assignment.generation,
            rank: assignment.rank,
            members: assignment.peers.iter().map(|p| p.worker).collect(),
            asked: Notify::new(),
            start: watch::Sender::new(Start::Pending),
            wanted: AtomicBool::new(false),
            followed: AtomicBool::new(false),
            followers: Mutex::default(),
            copies: watch::Sender::default(),
            questions: watch::Sender::default(),
        }
    }

    pub(super) fn about(&self) -> (JobId, Generation) {
        (self.job, self.generation)
    }

    /// The worker that has `rank`.
    pub(super) fn member(&self, rank: Rank) -> Option<WorkerId> {
        self.members.get(rank.index()).copied()
    }
}

/// For the session
impl Desk {
    /// Waits until a member asks for the state that the session starts from.
    pub(crate) async fn asked(&self) {
        self.asked.notified().await;
    }

    /// Shows that state.
    pub(crate) fn show(&self, state: Packed, ledger: &Ledger) {
        self.start.send_replace(Start::Here(Arc::new(state), Arc::new(ledger.to_bytes())));
    }

    /// The state that the session starts from is not to be had from here, or not any more: says why.
    pub(crate) fn withdraw(&self, why: &'static str) {
        self.start.send_if_modified(|start| {
            let there = !matches!(start, Start::Gone(_));
            *start = Start::Gone(why);
            there
        });
    }

    /// Whether a follower waits for a copy of the state.
    pub(crate) fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Shows a copy of the state between two steps; from here on those who waited for it take the updates. Hashes on a
    /// thread of its own.
    pub(crate) fn copy(self: &Arc<Self>, copied: Copied, ledger: &Ledger) -> Result<(), TrainError> {
        let mut followers = self.followers.lock();
        let queues = std::mem::take(&mut followers.waiting);
        self.wanted.store(false, Ordering::Relaxed);
        for queue in &queues {
            queue.state.lock().limit = LOG_BYTES.max(copied.len().saturating_mul(4));
        }
        followers.following.extend(queues.iter().cloned());
        self.followed.store(!followers.following.is_empty(), Ordering::Relaxed);
        drop(followers);
        let ledger = Arc::new(ledger.clone().without_records().to_bytes());
        let desk = self.clone();
        let pack = move || match copied.pack(desk.job) {
            Ok(packed) => {
                let packed = Arc::new(packed);
                desk.copies.send_modify(|copies| {
                    copies.push_front(packed.clone());
                    // Those who want to join at the same time share one, those who come a little later have another.
                    copies.truncate(2);
                });
                for queue in queues {
                    queue.state.lock().copy = Some((packed.clone(), ledger.clone()));
                    queue.changed.notify_one();
                }
            }
            Err(error) => {
                tracing::warn!("the state cannot be shown to those who want to join: {error}");
                queues.iter().for_each(|queue| queue.end(End::Overflow));
            }
        };
        let thread = std::thread::Builder::new().name("snapshot".to_owned()).spawn(pack);
        thread.map(drop).map_err(|e| TrainError::Fatal(format!("cannot start a thread: {e}")))
    }

    /// Whether updates are to be [noted](Self::note).
    pub(crate) fn is_followed(&self) -> bool {
        self.followed.load(Ordering::Relaxed)
    }

    /// Copies `update`, which takes the replica from `before` on, for those who follow.
    pub(crate) fn note(&self, update: &PhaseUpdate, before: Position) -> Result<(), TrainError> {
        let entry = Arc::new(Entry::of(update, before)?);
        let mut followers = self.followers.lock();
        followers.following.retain(|queue| queue.push(&entry));
        self.followed.store(!followers.following.is_empty(), Ordering::Relaxed);
        Ok(())
    }

    /// The session has ended: there are no more updates. What has been noted is still handed out.
    pub(crate) fn close(&self) {
        self.withdraw("the generation has ended here");
        let mut followers = self.followers.lock();
        followers.ended = true;
        for queue in
            std::mem::take(&mut followers.waiting).iter().chain(&std::mem::take(&mut followers.following))
        {
            queue.end(End::Session);
        }
        self.wanted.store(false, Ordering::Relaxed);
        self.followed.store(false, Ordering::Relaxed);
    }
}

/// For visitors
impl Desk {
    /// Answers a member that asks for the state that this session starts from.
    pub(super) async fn answer_state(&self, mut question: Question) -> Result<(), FrameError> {
        self.asked.notify_one();
        let mut start = self.start.subscribe();
        let found = start.wait_for(|start| !matches!(start, Start::Pending)).await;
        let found = found.map_or(Start::Gone("this worker leaves"), |start| start.clone());
        match found {
            Start::Here(packed, ledger) => give(&mut question, &packed, &ledger).await,
            Start::Pending => refuse(&mut question, "there is none").await,
            Start::Gone(why) => refuse(&mut question, why).await,
        }?;
        let _ = question.send.finish();
        Ok(())
    }

    /// Answers one that asks for a chunk. A copy that another rank has announced may not be packed here yet.
    pub(super) async fn answer_chunk(
        &self,
        mut question: Question,
        of: StateId,
        chunk: u32,
    ) -> Result<(), FrameError> {
        /// Longer than hashing takes.
        const PACKING: Duration = Duration::from_secs(10);
        self.questions.send_modify(|questions| *questions += 1);
        let starts_from = match &*self.start.borrow() {
            Start::Here(packed, _) if packed.id == of => Some(packed.clone()),
            _ => None,
        };
        let find = |copies: &VecDeque<Arc<Packed>>| copies.iter().find(|copy| copy.id == of).cloned();
        let packed = match starts_from {
            Some(packed) => Some(packed),
            None => {
                let mut copies = self.copies.subscribe();
                let found = timeout(PACKING, copies.wait_for(|copies| find(copies).is_some())).await;
                found.ok().and_then(Result::ok).and_then(|copies| find(&copies))
            }
        };
        match packed {
            Some(packed) => {
                write_frame(&mut question.send, &Answer::Chunk).await?;
                let bytes = packed.chunk(chunk as usize);
                question.send.write_all(bytes).await.map_err(|e| FrameError::Io(e.into()))?;
            }
            None => refuse(&mut question, "another state was asked for than this rank has").await?,
        }
        let _ = question.send.finish();
        Ok(())
    }

    /// Gives one that wants to join a state, and then the updates that follow it, until it leaves or the session ends.
    pub(super) async fn answer_follow(&self, mut question: Question) -> Result<(), FrameError> {
        let queue = Arc::new(Queue { state: Mutex::default(), changed: Notify::new() });
        {
            let mut followers = self.followers.lock();
            if !followers.ended {
                followers.waiting.push(queue.clone());
                self.wanted.store(true, Ordering::Relaxed);
            } else {
                queue.end(End::Session);
            }
        }
        let gone = question.send.stopped();
        let result = tokio::select! {
            result = queue.hand_out(&mut question) => result,
            _ = gone => Err(FrameError::Closed),
        };
        queue.end(End::Left);
        let _ = question.send.finish();
        result
    }

    /// Drops copies that nobody asks about any more. Runs as long as the desk does.
    pub(super) async fn tidy(desk: std::sync::Weak<Self>) {
        let Some(mut questions) = desk.upgrade().map(|desk| desk.questions.subscribe()) else { return };
        let Some(mut copies) = desk.upgrade().map(|desk| desk.copies.subscribe()) else { return };
        loop {
            if copies.wait_for(|copies| !copies.is_empty()).await.is_err() {
                return;
            }
            while matches!(timeout(IDLE, questions.changed()).await, Ok(Ok(()))) {}
            let Some(desk) = desk.upgrade() else { return };
            desk.copies.send_replace(VecDeque::new());
        }
    }
}

impl Queue {
    /// Adds an update; false if nobody takes it any more.
    fn push(&self, entry: &Arc<Entry>) -> bool {
        let mut state = self.state.lock();
        if state.end.is_some() {
            return false;
        }
        state.bytes += entry.gradients.len();
        state.entries.push_back(entry.clone());
        let fits = state.bytes <= state.limit;
        drop(state);
        if !fits {
            self.end(End::Overflow);
        }
        self.changed.notify_one();
        fits
    }

    fn end(&self, end: End) {
        let mut state = self.state.lock();
        state.end.get_or_insert(end);
        if end != End::Session {
            state.entries.clear();
            state.copy = None;
        }
        drop(state);
        self.changed.notify_one();
    }

    async fn hand_out(&self, question: &mut Question) -> Result<(), FrameError> {
        let Some((packed, ledger)) = self.next(|waiting| waiting.copy.take()).await else {
            return refuse(question, "the generation has ended here").await;
        };
        give(question, &packed, &ledger).await?;
        drop(packed);
        while let Some((entry, newest)) = self.next(Waiting::pop).await {
            let head = Box::new(entry.head.clone());
            write_frame(&mut question.send, &News::Update { head, newest }).await?;
            question.send.write_all(&entry.gradients).await.map_err(|e| FrameError::Io(e.into()))?;
        }
        let overflow = self.state.lock().end == Some(End::Overflow);
        write_frame(&mut question.send, if overflow { &News::Overflow } else { &News::End }).await
    }

    /// What `take` finds, once it finds something; `None` if it will not.
    async fn next<R>(&self, take: impl Fn(&mut Waiting) -> Option<R>) -> Option<R> {
        loop {
            {
                let mut state = self.state.lock();
                if let Some(found) = take(&mut state) {
                    return Some(found);
                }
                if state.end.is_some() {
                    return None;
                }
            }
            // A notice that came meanwhile is kept for this one waiter.
            self.changed.notified().await;
        }
    }
}

impl Waiting {
    /// The oldest update, and where the newest leads.
    fn pop(&mut self) -> Option<(Arc<Entry>, Position)> {
        let newest = self.entries.back()?.head.after;
        let entry = self.entries.pop_front()?;
        self.bytes -= entry.gradients.len();
        Some((entry, newest))
    }
}

async fn give(question: &mut Question, packed: &Packed, ledger: &[u8]) -> Result<(), FrameError> {
    let (manifest, ledger_bytes) = (packed.manifest.clone(), ledger.len() as u32);
    write_frame(&mut question.send, &Answer::State { manifest, ledger_bytes }).await?;
    question.send.write_all(ledger).await.map_err(|e| FrameError::Io(e.into()))
}

async fn refuse(question: &mut Question, why: &str) -> Result<(), FrameError> {
    write_frame(&mut question.send, &Answer::NotHere { reason: why.to_owned() }).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use tch::Tensor;

    /// An update with 100 bytes of gradients.
    fn entry() -> Arc<Entry> {
        let update = PhaseUpdate {
            phase: 0,
            commits: true,
            network: 0,
            lr: 0.1,
            gradients: vec![("weight".to_owned(), Tensor::from_slice(&[0.5f32; 25]))],
            statistics: Vec::new(),
            figures: BTreeMap::new(),
        };
        Arc::new(Entry::of(&update, Position::at(7)).unwrap())
    }

    fn queue(limit: usize) -> Queue {
        Queue { state: Mutex::new(Waiting { limit, ..Waiting::default() }), changed: Notify::new() }
    }

    #[test]
    fn a_follower_that_is_too_slow_gets_no_more_and_holds_no_memory() {
        let queue = queue(250);
        assert!(queue.push(&entry()) && queue.push(&entry()));
        let (first, newest) = queue.state.lock().pop().unwrap();
        assert_eq!((first.head.after, newest), (Position::at(8), Position::at(8)));
        // What has been handed out makes room.
        assert!(queue.push(&entry()));
        assert!(!queue.push(&entry()));
        assert!(queue.state.lock().end == Some(End::Overflow) && queue.state.lock().entries.is_empty());
        assert!(!queue.push(&entry()));
    }

    #[test]
    fn what_was_noted_before_the_session_ended_is_still_handed_out() {
        let queue = queue(250);
        assert!(queue.push(&entry()));
        queue.end(End::Session);
        assert!(!queue.push(&entry()), "nothing comes after the end");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            assert!(queue.next(Waiting::pop).await.is_some());
            assert!(queue.next(Waiting::pop).await.is_none());
        });
    }
}
