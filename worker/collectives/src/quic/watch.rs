//! A peer whose process has ended, found out long before the idle time-out.

use crate::engine::Engine;
use lockstep_common::ids::Rank;
use lockstep_common::net::process_ended;
use std::sync::Weak;
use std::time::Duration;

/// How often each side of an idle connection sends something.
pub(super) const KEEP_ALIVE: Duration = Duration::from_millis(250);

/// The silence after which a peer is probed: three keep-alives.
const SILENCE: Duration = Duration::from_millis(750);

/// Watches the connection to `rank` until it ends or the group does.
pub(super) async fn watch(connection: quinn::Connection, rank: Rank, engine: Weak<Engine>) {
    let silence = process_ended(&connection, SILENCE, || engine.strong_count() > 0).await;
    if let Some((silence, engine)) = silence.zip(engine.upgrade()) {
        let (silence, address) = (silence.as_secs_f64(), connection.remote_address());
        let error =
            format!("its process is gone: nobody holds {address} any more, silent for {silence:.1} s");
        engine.handle_lost(rank, error);
    }
}
