//! Ranks inside one process, for tests of everything above the network.
//!
//! One thread per rank hands over what the others sent, so collectives complete on another thread than the
//! caller's, as they do over a network.

use crate::engine::Engine;
use crate::error::CollectiveError;
use crate::transport::{Farewell, Frame, Lane, Transport};
use crossbeam_channel::{Receiver, Sender, unbounded};
use lockstep_common::ids::Rank;
use parking_lot::Mutex;
use std::sync::Arc;

/// What is in a mailbox, and from whom.
pub(crate) struct Letter {
    from: Rank,
    content: Content,
}

enum Content {
    Frame(Frame),
    Farewell(Farewell),
    Left,
}

/// One rank's way to the others' mailboxes, closed by `abort` and `leave`.
pub(crate) struct Local {
    rank: Rank,
    mailboxes: Mutex<Vec<Sender<Letter>>>,
}

/// The transports and mailboxes of `world` ranks.
pub(crate) fn mesh(world: u32) -> Vec<(Local, Receiver<Letter>)> {
    let (senders, receivers): (Vec<_>, Vec<_>) = (0..world).map(|_| unbounded()).unzip();
    let local = |rank| Local { rank: Rank(rank), mailboxes: Mutex::new(senders.clone()) };
    (0..world).map(local).zip(receivers).collect()
}

/// Starts the thread that empties `mailbox` into `engine`. It ends with the engine or its peers.
pub(crate) fn serve(mailbox: Receiver<Letter>, engine: &Arc<Engine>) -> Result<(), CollectiveError> {
    let rank = engine.rank();
    let engine = Arc::downgrade(engine);
    let deliver = move || {
        for Letter { from, content } in mailbox {
            let Some(engine) = engine.upgrade() else { return };
            match content {
                Content::Frame(Frame { header, payload }) => {
                    let payload = engine.pool().copy(payload.iter().map(|part| &part[..]));
                    engine.handle_frame(from, header, payload);
                }
                Content::Farewell(farewell) => engine.handle_farewell(from, farewell),
                Content::Left => engine.handle_left(from),
            }
        }
    };
    std::thread::Builder::new()
        .name(format!("mailbox-{}", rank.0))
        .spawn(deliver)
        .map(|_| ())
        .map_err(|error| CollectiveError::Config(format!("no thread for {rank}: {error}")))
}

impl Local {
    /// Gives every other rank a last letter and forgets the way to them.
    fn end(&self, content: impl Fn() -> Content) {
        let mailboxes = std::mem::take(&mut *self.mailboxes.lock());
        for (rank, mailbox) in mailboxes.iter().enumerate() {
            if rank != self.rank.index() {
                // A closed mailbox belongs to a rank that has gone already.
                let _ = mailbox.send(Letter { from: self.rank, content: content() });
            }
        }
    }
}

impl Transport for Local {
    fn send(&self, to: Rank, _lane: Lane, frame: Frame) {
        if let Some(mailbox) = self.mailboxes.lock().get(to.index()) {
            // As in `end`: the letter `Left` of that rank says the rest.
            let _ = mailbox.send(Letter { from: self.rank, content: Content::Frame(frame) });
        }
    }

    fn abort(&self, farewell: &Farewell) {
        self.end(|| Content::Farewell(farewell.clone()));
    }

    fn leave(&self) -> Vec<Receiver<()>> {
        self.end(|| Content::Left);
        vec![]
    }
}
