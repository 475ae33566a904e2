//! Reports that come twice.
//!
//! A worker whose session broke sends again what it has not heard to be taken care of. Part of that may have been:
//! only the word that it was is lost. Such reports are the newest of those received, in the same order.

use lockstep_common::wire::{FromWorker, encode};
use std::collections::VecDeque;

/// Reports that a worker is remembered to have sent. Far more than are on the way between two hosts at a time.
const REMEMBERED: usize = 1024;

/// What one worker has reported, over all its sessions.
#[derive(Debug, Default)]
pub(super) struct Reports {
    /// The newest reports' hashes, the oldest first.
    recent: VecDeque<blake3::Hash>,
    position: Position,
}

#[derive(Clone, Copy, Debug, Default)]
enum Position {
    /// A session has begun; its first report may be anywhere in what was received.
    Unknown,
    /// The next report is a repeated one if it is the one at this place.
    Repeating(usize),
    /// What comes is new.
    #[default]
    New,
}

impl Reports {
    /// A session of the worker begins.
    pub(super) fn session_begins(&mut self) {
        self.position = Position::Unknown;
    }

    /// Whether `report`, the next one of the session, was received in an earlier session.
    pub(super) fn is_repeated(&mut self, report: &FromWorker) -> bool {
        let Ok(bytes) = encode(report) else { return false };
        let hash = blake3::hash(&bytes);
        let place = match self.position {
            Position::Unknown => self.recent.iter().position(|known| *known == hash),
            Position::Repeating(place) => (self.recent.get(place) == Some(&hash)).then_some(place),
            Position::New => None,
        };
        if let Some(place) = place {
            self.position = Position::Repeating(place + 1);
            return true;
        }
        self.position = Position::New;
        if self.recent.len() == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(hash);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_common::ids::{Generation, JobId};

    fn line(text: &str) -> FromWorker {
        FromWorker::Log { job: JobId(1), generation: Generation(1), line: text.to_owned() }
    }

    /// Sends the sessions' lines, one letter each, and returns those that count as new.
    fn new_lines(sessions: &[&str]) -> String {
        let mut reports = Reports::default();
        let mut new = String::new();
        for session in sessions {
            reports.session_begins();
            new.extend(session.chars().filter(|c| !reports.is_repeated(&line(&c.to_string()))));
        }
        new
    }

    #[test]
    fn what_a_broken_session_had_delivered_counts_once() {
        assert_eq!(new_lines(&["abc", "cd"]), "abcd");
        assert_eq!(new_lines(&["abc", "abcd", "bcde"]), "abcde");
        assert_eq!(new_lines(&["abc", "d", "de"]), "abcde");
        assert_eq!(new_lines(&["aaa", "a"]), "aaa");
    }

    #[test]
    fn a_worker_may_say_the_same_twice_in_a_session() {
        assert_eq!(new_lines(&["aa", "ba"]), "aaba");
    }

    #[test]
    fn the_memory_is_bounded() {
        let mut reports = Reports::default();
        (0..3 * REMEMBERED).for_each(|i| assert!(!reports.is_repeated(&line(&i.to_string()))));
        assert_eq!(reports.recent.len(), REMEMBERED);
        reports.session_begins();
        assert!(reports.is_repeated(&line(&(3 * REMEMBERED - 1).to_string())));
    }
}
