//! A peer whose process has ended, found out long before the idle time-out.

use super::lifeline::Lifeline;
use super::window::ReceiveWindow;
use crate::engine::Engine;
use lockstep_common::ids::Rank;
use lockstep_common::net::process_ended;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often each side of an idle connection sends something.
pub(super) const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// The silence after which a peer is probed: three keep-alives.
const SILENCE: Duration = Duration::from_millis(750);

/// The silence that proves a broken lifeline right: two keep-alives, and something for a late one.
const LAST_SILENCE: Duration = Duration::from_millis(600);

/// A peer that still sends so long after its lifeline broke lost only that.
const RECOVERY: Duration = Duration::from_secs(2);

/// Between two looks at a peer whose lifeline has broken.
const LOOK: Duration = Duration::from_millis(50);

/// Between two looks at whether the window still fits the round trip.
const REFIT: Duration = Duration::from_millis(250);

/// Watches the connection to `rank` until it ends or the group does, and keeps its `window` fitting.
pub(super) async fn watch(
    connection: quinn::Connection,
    rank: Rank,
    window: Arc<ReceiveWindow>,
    engine: Weak<Engine>,
    lifeline: Lifeline,
) {
    let fit = async {
        loop {
            window.fit();
            sleep(REFIT).await;
        }
    };
    let found = tokio::select! {
        never = fit => never,
        silence = process_ended(&connection, SILENCE, || engine.strong_count() > 0) => {
            silence.map(|s| (s, format!("nobody holds {} any more", connection.remote_address())))
        }
        silence = severed(&connection, lifeline) => {
            Some((silence, "its host has closed its lifeline".to_owned()))
        }
    };
    if let Some(((silence, sign), engine)) = found.zip(engine.upgrade()) {
        let silence = silence.as_secs_f64();
        engine.handle_lost(rank, format!("its process is gone: {sign}, silent for {silence:.1} s"));
    }
}

/// Waits until the lifeline is broken and nothing comes any more, and returns for how long nothing has; never returns
/// where that does not happen. Whatever lies between the hosts may break a lifeline of two processes that live.
async fn severed(connection: &quinn::Connection, lifeline: Lifeline) -> Duration {
    lifeline.broken().await;
    let received = || connection.stats().udp_rx.datagrams;
    let (broken, mut heard, mut heard_at) = (Instant::now(), received(), Instant::now());
    while broken.elapsed() < RECOVERY && connection.close_reason().is_none() {
        sleep(LOOK).await;
        if heard != received() {
            (heard, heard_at) = (received(), Instant::now());
        } else if heard_at.elapsed() >= LAST_SILENCE && connection.close_reason().is_none() {
            return heard_at.elapsed();
        }
    }
    std::future::pending().await
}
