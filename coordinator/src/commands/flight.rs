//! What a job's ranks wait for, as `status` shows it.

use lockstep_common::wire::{FlightSummary, RankFlight};
use serde_json::{Value, json};

/// The lines of `status` about it.
pub(super) fn rows(flight: &FlightSummary) -> Vec<(&'static str, String)> {
    let name = if flight.failure.is_some() { "waited" } else { "waiting" };
    let waiting = flight.waiting.iter().map(|line| (name, line.clone()));
    let failure = flight.failure.iter().map(|cause| ("failed", format!("{}: {cause}", flight.generation)));
    waiting.chain(failure).collect()
}

/// Where each rank is.
pub(super) fn table(flight: &FlightSummary) -> Vec<Vec<String>> {
    let head = ["RANK", "WORKER", "HOST", "LAST COMPLETED", "AGO", "IN FLIGHT", "FOR", "WAITS FOR", "TOLD"];
    let seconds = |s: Option<f64>| s.map(|s| format!("{s:.1}s")).unwrap_or_default();
    let row = |r: &RankFlight| {
        let missing: Vec<_> = r.waits_for.iter().map(|rank| rank.0.to_string()).collect();
        vec![
            r.rank.0.to_string(),
            r.worker.to_string(),
            r.host.clone(),
            r.completed.clone().unwrap_or_default(),
            seconds(r.completed_s),
            r.in_flight.clone().unwrap_or_default(),
            seconds(r.waits_s),
            missing.join(" "),
            r.told_s.map_or_else(|| "never".to_owned(), |s| format!("{s:.1}s ago")),
        ]
    };
    std::iter::once(head.map(str::to_owned).to_vec()).chain(flight.ranks.iter().map(row)).collect()
}

/// The object of `status --json`.
pub(super) fn json(flight: &FlightSummary) -> Value {
    let rank = |r: &RankFlight| {
        json!({
            "rank": r.rank,
            "worker": r.worker.to_string(),
            "host": r.host,
            "completed": r.completed,
            "completed_s": r.completed_s,
            "in_flight": r.in_flight,
            "waits_s": r.waits_s,
            "waits_for": r.waits_for,
            "told_s": r.told_s,
        })
    };
    json!({
        "generation": flight.generation,
        "waiting": flight.waiting,
        "failure": flight.failure,
        "ranks": flight.ranks.iter().map(rank).collect::<Vec<_>>(),
    })
}
