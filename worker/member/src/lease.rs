//! How long a session goes on without a word from its coordinator.
//!
//! A word counts from the moment at which this worker sent the question that it answers, not from its arrival: it may
//! have waited in a socket of a process that was stopped. So the coordinator, which counts from the moment at which it
//! noticed that the worker is away, never counts from an earlier one than the worker does.

use crate::action::Action;
use crate::member::Member;
use lockstep_common::wire::{LEASE_GRACE_MS, StopMode};

/// The coordinator is asked anew when this part of the lease has passed.
const RENEWALS: u64 = 20;

/// A session's lease.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    begun_ms: u64,
    timeout_ms: u64,
    /// When the newest question of this session that has been answered was sent.
    word_ms: Option<u64>,
    /// When the newest was; `None` if it may have been lost with its connection.
    asked_ms: Option<u64>,
}

impl Lease {
    pub(crate) fn new(begun_ms: u64, timeout_ms: u64) -> Self {
        Self { begun_ms, timeout_ms, word_ms: None, asked_ms: None }
    }

    /// What was sent at `sent_ms` has been answered. A lease that had run out by then stays so: others may have the job.
    fn answered(&mut self, sent_ms: u64) {
        let lapsed = self.until_ms().is_some_and(|until| until < sent_ms);
        if sent_ms >= self.begun_ms && !lapsed {
            self.word_ms = self.word_ms.max(Some(sent_ms));
        }
    }

    /// When the coordinator is to be asked, if it has answered so far.
    fn ask_due_ms(&self) -> Option<u64> {
        match (self.asked_ms, self.word_ms) {
            (Some(asked_ms), word_ms) if word_ms < Some(asked_ms) => None,
            (_, Some(word_ms)) => Some(word_ms + self.timeout_ms / RENEWALS),
            (_, None) => Some(self.begun_ms),
        }
    }

    /// Until when steps may be committed.
    fn until_ms(&self) -> Option<u64> {
        Some(self.word_ms?.saturating_add(self.timeout_ms).saturating_add(LEASE_GRACE_MS))
    }

    /// When the session ends in good order if nothing is heard until then.
    fn pause_due_ms(&self) -> u64 {
        self.word_ms.unwrap_or(self.begun_ms).saturating_add(self.timeout_ms)
    }
}

impl Member {
    /// Until when the session may commit steps; `None` if there is none, or it has not had a word from the coordinator yet.
    pub fn lease_until_ms(&self) -> Option<u64> {
        self.session.as_ref()?.lease.until_ms()
    }

    /// When something is due for the lease's sake.
    pub(crate) fn lease_due_ms(&self) -> Option<u64> {
        let session = self.session.as_ref()?;
        let pause = (!session.ending).then(|| session.lease.pause_due_ms());
        let ask = self.away_since_ms.is_none().then(|| session.lease.ask_due_ms()).flatten();
        pause.into_iter().chain(ask).min()
    }

    /// Asks the coordinator for a word, or ends the session in good order, if it is time.
    pub(crate) fn tick_lease(&mut self, now_ms: u64) {
        let away = self.away_since_ms.is_some();
        let Some(session) = &mut self.session else { return };
        if !away && session.lease.ask_due_ms().is_some_and(|due| due <= now_ms) {
            session.lease.asked_ms = Some(now_ms);
            self.actions.push_back(Action::Ping { sent_ms: now_ms });
        }
        if !session.ending && session.lease.pause_due_ms() <= now_ms {
            self.end_session(StopMode::Boundary);
        }
    }

    /// The coordinator has answered what was sent at `sent_ms`.
    pub(crate) fn extend_lease(&mut self, sent_ms: u64) {
        if let Some(session) = &mut self.session {
            session.lease.answered(sent_ms);
        }
    }

    /// Questions that have not been answered on this connection will not be.
    pub(crate) fn forget_question(&mut self) {
        if let Some(session) = &mut self.session {
            session.lease.asked_ms = None;
        }
    }
}
