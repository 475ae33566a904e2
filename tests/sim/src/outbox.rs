//! A worker's reports, kept until the coordinator says that it has heard them: `worker/src/control.rs` without its threads.

use lockstep_common::wire::FromWorker;
use std::collections::VecDeque;

/// Reports in their order.
#[derive(Default)]
pub(crate) struct Outbox {
    reports: VecDeque<FromWorker>,
    sent: usize,
}

impl Outbox {
    /// Adds a report.
    pub(crate) fn tell(&mut self, report: FromWorker) {
        self.reports.push_back(report);
    }

    /// The next report that has not been sent in this session.
    pub(crate) fn next(&mut self) -> Option<FromWorker> {
        let next = self.reports.get(self.sent).cloned();
        self.sent += usize::from(next.is_some());
        next
    }

    /// The coordinator has taken care of so many more.
    pub(crate) fn heard(&mut self, reports: u64) {
        let heard = self.sent.min(reports as usize);
        self.reports.drain(..heard);
        self.sent -= heard;
    }

    /// A new session begins: what was not heard in the old one is sent again.
    pub(crate) fn restart(&mut self) {
        self.sent = 0;
    }

    /// Whether everything has been heard.
    pub(crate) fn is_drained(&self) -> bool {
        self.reports.is_empty()
    }
}
