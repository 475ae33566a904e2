//! A worker's session: its reports in, its orders out.

use super::absent;
use super::refuse;
use super::requests::{Call, Stop};
use lockstep_common::ids::WorkerId;
use lockstep_common::net::{CONTROL_KEEP_ALIVE, process_ended};
use lockstep_common::wire::{
    FromWorker, MAX_ADDRESSES, Register, Response, ToWorker, read_frame, write_frame,
};
use quinn::Connection;
use std::time::Duration;
use tokio::sync::mpsc;

/// The longest name of a host, a device or an interface.
const MAX_NAME_BYTES: usize = 255;

/// The silence after which a worker's host is asked whether the worker still runs: three keep-alives.
const SILENCE: Duration = CONTROL_KEEP_ALIVE.saturating_mul(3);

/// Runs a session until the worker or its connection ends.
pub(super) async fn run(
    call: &mut Call,
    worker: WorkerId,
    register: Register,
    connection: Connection,
) -> Result<(), Stop> {
    if !is_bounded(&register) {
        return Err(refuse("malformed", "the worker's introduction is too long").into());
    }
    let hub = call.shared.hub.clone();
    tracing::info!("{worker} on {} ({}, {}) is here", register.host, register.device, call.peer);
    let own = absent::is_own(&register, connection.remote_address());
    let opened = hub.settle(move |hub| hub.open_session(worker, register)).await?;
    let (number, mut orders) = opened.map_err(|e| refuse("unknown_worker", e))?;
    let mut process_is_gone = false;
    tokio::spawn({
        let (hub, peer) = (hub.clone(), (connection.remote_address(), connection.rtt()));
        async move { absent::note_port(&hub, worker, number, peer, own).await }
    });
    let result = async {
        call.answer(&Response::Welcome).await?;
        let send = &mut call.send;
        let (heard, mut acknowledgements) = mpsc::unbounded_channel();
        let orders_out = async {
            loop {
                let order = tokio::select! {
                    order = orders.recv() => order,
                    Some(reports) = acknowledgements.recv() => Some(ToWorker::Heard { reports }),
                };
                // Without one, a newer session of this worker has taken over.
                let Some(order) = order else { return Ok::<_, Stop>(()) };
                write_frame(send, &order).await?;
            }
        };
        let recv = &mut call.recv;
        let reports_in = async {
            loop {
                let report: FromWorker = read_frame(recv).await?;
                if matches!(report, FromWorker::Flight { .. } | FromWorker::Pace { .. }) {
                    // Only the newest counts, and it is of use while the store cannot be written too: a refusal for
                    // that reason changes nothing.
                    let _ = hub.call(move |hub| hub.hear_news(worker, report)).await;
                    continue;
                }
                // As long as the store cannot be written, the worker neither hears of this report nor gets rid of more.
                hub.settle(move |hub| hub.hear(worker, report)).await?;
                // As long as an audit cannot be, it gets rid of more and does not hear of it.
                let heard = heard.clone();
                hub.post(move |hub| hub.acknowledge(heard));
            }
        };
        tokio::select! {
            result = orders_out => result,
            result = reports_in => result,
            Some(_) = process_ended(&connection, SILENCE, || true) => {
                process_is_gone = true;
                Ok(())
            }
        }
    }
    .await;
    hub.post(move |hub| hub.close_session(worker, number, process_is_gone));
    tracing::info!("{worker}'s session has ended");
    // Whatever else it has under way is void without its session.
    match &result {
        Ok(()) if !process_is_gone => {}
        Ok(()) | Err(Stop::Broken(_)) => connection.close(0u32.into(), b"session ended"),
        // The worker reads orders here, and would not understand an answer.
        Err(Stop::Refused(refusal)) => {
            connection.close(0u32.into(), refusal.message.as_bytes());
            return Ok(());
        }
    }
    result
}

/// Extends the lease of a worker whose session is open.
pub(super) async fn ping(call: &mut Call, worker: WorkerId) -> Result<(), Stop> {
    if !call.shared.hub.look(move |hub| hub.core.is_connected(worker)).await? {
        return Err(refuse("no_session", format_args!("no session of {worker} is open")).into());
    }
    Ok(call.answer(&Response::Done).await?)
}

fn is_bounded(register: &Register) -> bool {
    let interfaces = register.addresses.iter().map(|a| a.interface.as_str());
    let key = register.host_key.as_ref().map(|key| key.0.as_str());
    let mut names = interfaces.chain(key).chain([register.host.as_str(), register.device.as_str()]);
    register.addresses.len().max(register.advertised.len()) <= MAX_ADDRESSES
        && names.all(|name| name.len() <= MAX_NAME_BYTES)
}
