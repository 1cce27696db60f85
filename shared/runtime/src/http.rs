//! The HTTP port of a replica, if it has one: `/metrics` for Prometheus, `/healthz` and `/readyz` for supervisors.

use std::{net::SocketAddr, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{
        HeaderValue, StatusCode,
        header::{CONNECTION, CONTENT_TYPE},
    },
    middleware::map_response,
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
            .layer(map_response(close))
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

/// Ends the connection with the reply: one that stayed open would show the past of a service that has restarted.
async fn close(mut response: Response) -> Response {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{NatsConfig, Problem, ReplicaConfig};

    #[derive(Parser)]
    struct Settings {
        #[command(flatten)]
        nats: NatsConfig,
        #[command(flatten)]
        replica: ReplicaConfig,
    }

    fn monitor() -> Monitor {
        let Settings { nats, replica } = Settings::parse_from(["service"]);
        Monitor::new("query", &replica, &nats)
    }

    #[tokio::test]
    async fn a_loop_that_hangs_makes_the_process_unhealthy_until_it_turns_again() {
        let monitor = monitor();
        let pulse = monitor.pulse("the loop", Duration::ZERO);
        let health = async || healthz(State(monitor.clone())).await;
        assert_eq!(health().await, (StatusCode::OK, "ok\n".to_owned()), "it has nothing to do");
        let work = pulse.work();
        tokio::time::sleep(Duration::from_millis(2)).await;
        let (status, text) = health().await;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(text.starts_with("the loop has hung for "), "{text}");
        assert!(!monitor.is_ready());
        drop(work);
        assert_eq!(health().await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn a_replica_is_ready_unless_a_problem_keeps_it_from_its_work() {
        let monitor = monitor();
        let readiness = async || readyz(State(monitor.clone())).await;
        assert_eq!(readiness().await.0, StatusCode::SERVICE_UNAVAILABLE, "it does not serve yet");
        monitor.set_serving(true);
        assert_eq!(readiness().await, (StatusCode::OK, "ok\n".to_owned()));
        monitor.add_check(|| vec![Problem::other("one view stands still")]);
        assert_eq!(readiness().await, (StatusCode::OK, "one view stands still\n".to_owned()));
        monitor.add_check(|| vec![Problem::blocking("there is no server")]);
        let (status, text) = readiness().await;
        assert_eq!((status, &*text), (StatusCode::SERVICE_UNAVAILABLE, "one view stands still\nthere is no server\n"));
    }
}
