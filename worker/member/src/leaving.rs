//! Leaving in good order: with the coordinator where it is there, without it where it is not.

use crate::action::Leave;
use crate::member::Member;

/// How long a leaving worker waits for the coordinator to end its session at a boundary. It decides at once, so what is
/// later than this does not come.
pub const BOUNDARY_PATIENCE_MS: u64 = 10_000;

/// How long a leaving worker waits for a coordinator that is away, to take its last checkpoint.
pub const AWAY_PATIENCE_MS: u64 = 10_000;

/// A departure under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaving {
    since_ms: u64,
}

impl Leaving {
    pub(crate) fn since(now_ms: u64) -> Self {
        Self { since_ms: now_ms }
    }
}

impl Member {
    /// When something is due on the way out.
    pub(crate) fn leaving_due_ms(&self) -> Option<u64> {
        let leaving = self.leaving?;
        let session = self.session.as_ref()?;
        let boundary = (!session.ending).then(|| match self.away_since_ms {
            // Nobody is there to ask.
            Some(since_ms) => since_ms.max(leaving.since_ms),
            None => leaving.since_ms + BOUNDARY_PATIENCE_MS,
        });
        let patience = self.away_since_ms.map(|since_ms| since_ms.max(leaving.since_ms) + AWAY_PATIENCE_MS);
        boundary.into_iter().chain(patience).min()
    }

    /// Takes the next step on the way out, if it is time.
    pub(crate) fn tick_leaving(&mut self, now_ms: u64) {
        let Some(leaving) = self.leaving else { return };
        let Some(session) = &self.session else { return self.leave(Leave::Done) };
        let away = self.away_since_ms.map(|since_ms| since_ms.max(leaving.since_ms));
        let asked_in_vain = now_ms >= leaving.since_ms + BOUNDARY_PATIENCE_MS;
        if !session.ending && (away.is_some() || asked_in_vain) {
            let mode = session.local_stop();
            self.end_session(mode);
        } else if away.is_some_and(|since_ms| now_ms >= since_ms + AWAY_PATIENCE_MS) {
            self.abort("this worker leaves");
            self.leave(Leave::CoordinatorAway);
        }
    }
}
