//! The coordinator's HTTP server: metrics, health, and jobs and workers as JSON.

use super::Shared;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use lockstep_common::http::{HttpError, Readiness, routes};
use prometheus::Registry;
use std::net::SocketAddr;
use std::sync::Arc;

/// Serves on `address`; returns where.
pub(super) async fn serve(
    address: SocketAddr,
    shared: Arc<Shared>,
    registry: Registry,
    readiness: Readiness,
) -> Result<SocketAddr, HttpError> {
    let api =
        Router::new().route("/api/jobs", get(jobs)).route("/api/workers", get(workers)).with_state(shared);
    lockstep_common::http::serve(address, routes(registry, readiness).merge(api)).await
}

async fn jobs(State(shared): State<Arc<Shared>>) -> Response {
    let dir = shared.dir.clone();
    match shared.hub.look(move |hub| hub.job_summaries(&dir)).await {
        Ok(jobs) => Json(jobs).into_response(),
        Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, refusal.message).into_response(),
    }
}

async fn workers(State(shared): State<Arc<Shared>>) -> Response {
    match shared.hub.look(|hub| hub.worker_summaries()).await {
        Ok(workers) => Json(workers).into_response(),
        Err(refusal) => (StatusCode::SERVICE_UNAVAILABLE, refusal.message).into_response(),
    }
}
