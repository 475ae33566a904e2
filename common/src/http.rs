//! The small HTTP server of both programs: Prometheus text, liveness, readiness.

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus::{Encoder, Registry, TextEncoder};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use thiserror::Error;

/// Why the HTTP server did not start.
#[derive(Debug, Error)]
#[error("cannot serve HTTP on {address}: {source}; choose another address or stop the process that has it")]
pub struct HttpError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Whether the process is ready for work; shared with whoever knows.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// Says whether the process is ready.
    pub fn set(&self, ready: bool) {
        self.0.store(ready, Ordering::Relaxed);
    }

    fn is_ready(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// `/metrics`, `/healthz` and `/readyz`.
pub fn routes(registry: Registry, readiness: Readiness) -> Router {
    let metrics = move || async move {
        let mut text = Vec::new();
        match TextEncoder::new().encode(&registry.gather(), &mut text) {
            Ok(()) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
            Err(e) => (StatusCode::INTERNAL_SERVER_ERROR, e.to_string()).into_response(),
        }
    };
    let ready = move || async move {
        if readiness.is_ready() {
            (StatusCode::OK, "ready\n")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
        }
    };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
}

/// Serves `routes` on `address` in the background of the current tokio runtime; returns where.
pub async fn serve(address: SocketAddr, routes: Router) -> Result<SocketAddr, HttpError> {
    let failed = |source| HttpError { address, source };
    let listener = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    tokio::spawn(async move {
        if let Err(e) = axum::serve(listener, routes).await {
            tracing::warn!("the HTTP server on {bound} ended: {e}");
        }
    });
    Ok(bound)
}

/// A registry with the process metrics in it.
pub fn process_registry() -> Registry {
    let registry = Registry::new();
    // Registering the first collector of an empty registry cannot collide.
    let _ = registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()));
    registry
}
