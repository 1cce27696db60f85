//! The HTTP port of a replica, if it has one: `/metrics` for Prometheus, `/healthz` and `/readyz` for supervisors.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

use crate::Monitor;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// How often to try to open a port that is taken.
const RETRY: Duration = Duration::from_secs(5);

/// Serves until the handle is dropped. A port that cannot be opened is logged once, and tried again and again.
pub fn serve(monitor: Monitor, address: Option<SocketAddr>) -> Option<AbortOnDropHandle<()>> {
    let address = address?;
    Some(AbortOnDropHandle::new(tokio::spawn(async move {
        let listener = open(address).await;
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .with_state(monitor);
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%address, %error, "the port of METRICS_ADDRESS was closed");
        }
    })))
}

async fn open(address: SocketAddr) -> TcpListener {
    let mut was_refused = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => {
                let address = listener.local_addr().unwrap_or(address);
                tracing::info!(%address, "metrics and health are served over HTTP");
                return listener;
            }
            Err(error) if !was_refused => {
                was_refused = true;
                tracing::error!(%address, %error, "cannot open the port for metrics (METRICS_ADDRESS), going on without");
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn metrics(State(monitor): State<Monitor>) -> Response {
    match monitor.metrics() {
        Ok(text) => ([(CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Whether the process works: a supervisor may restart one that does not.
async fn healthz(State(monitor): State<Monitor>) -> (StatusCode, String) {
    let hung = monitor.hung();
    (status(hung.is_empty()), lines(hung))
}

/// Whether the replica can do its work now. Restarting would not help.
async fn readyz(State(monitor): State<Monitor>) -> (StatusCode, String) {
    let problems = monitor.problems().into_iter().map(|problem| problem.text).collect();
    (status(monitor.is_ready()), lines(problems))
}

fn status(is_well: bool) -> StatusCode {
    if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn lines(texts: Vec<String>) -> String {
    if texts.is_empty() { "ok\n".to_owned() } else { texts.into_iter().map(|text| text + "\n").collect() }
}
