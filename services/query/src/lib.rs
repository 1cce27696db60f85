//! The query service answers queries from the views, and does nothing else. Any number of replicas share the work.
//!
//! One query, `qry.order.get`, passes through these files:
//!
//! 1. [`runtime::micro`] receives the request, and calls the endpoint's `responder` in the order of arrival.
//! 2. The responder refuses the request if too many are in flight or MongoDB is down; otherwise it parses the headers
//!    and the body into a plan: get one document, list a page, or make a report.
//! 3. `positions` says which generation of the view serves and how far it has come. A query with `Min-Position` waits
//!    here until its view has caught up.
//! 4. `lookup` gathers the gets that wait together into one `find`; `page` reads a list, `report` an aggregation. All
//!    three read through `store`, which bounds every read in time.
//! 5. `json` writes the stored BSON as JSON without building a tree, and the reply is sent with the view's position.
//!    `reply` has the failures that this service can answer instead.
//!
//! While replicas of an older program run beside those of a newer one, `standby` decides for which views this replica
//! takes requests. `metrics` counts what the others do.

mod config;
mod json;
mod lookup;
mod metrics;
mod page;
mod positions;
mod reply;
mod report;
mod responder;
mod standby;
mod store;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, anyhow};
use futures_util::future::BoxFuture;
use runtime::{
    Monitor, Nats, Ready, http,
    micro::{Endpoint, EndpointDescription, Service},
    serve_again,
};
use tokio::{task::JoinSet, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use crate::config::Config;
use crate::{
    lookup::Lookup,
    metrics::Metrics,
    positions::Positions,
    responder::{Responder, Shared},
    standby::Standby,
    store::Store,
};

/// How long reading the positions may take. It gives up on a server that does not answer much sooner.
const REFRESH_BOUND: Duration = Duration::from_secs(30);

/// Serves queries until `shutdown`; then accepts no more, answers those that were accepted, and returns.
///
/// # Errors
/// If the configuration cannot be used, or one of the service's tasks ended unexpectedly. Servers that are down are
/// waited for.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxed, the service's future is compiled once, in this crate, and not again in every program that runs it.
    Box::pin(async move {
        serve_again(&config.nats, "query", &shutdown, || Box::pin(serve_until(config.clone(), shutdown.clone()))).await
    })
}

async fn serve_until(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let monitor = Monitor::new("query", &config.replica, &config.nats);
    let _http = http::serve(monitor.clone(), config.replica.metrics_address);
    let nats = Nats::connect(&config.nats, "query").await?;
    let metrics = Metrics::new(&monitor);
    let store = Store::new(&config.mongodb_url()?, &config.database, &monitor, Arc::clone(&metrics)).await?;
    monitor.add_server(nats.status.clone());
    monitor.add_server(store.status.clone());
    let tasks = TaskTracker::new();
    let shared = Arc::new(Shared::new(&config, store.clone(), tasks.clone(), metrics));
    shared.show(&monitor);
    let positions = Positions::new();
    let responders = responders(&config, &shared, &positions);
    positions.show(&monitor);

    let Some(started) = shutdown.run_until_cancelled(start(&nats, &monitor, &store, positions, responders)).await
    else {
        return Ok(());
    };
    let (service, mut background) = started?;
    monitor.set_serving(true);
    let ready = Ready::announce(config.replica.ready_file.as_deref()).context("cannot write the ready file")?;

    let ended = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        closed = nats.closed() => Err(closed.into()),
        _ = background.join_next() => Err(task_ended(&nats).await),
    };
    drop(ready);
    monitor.set_serving(false);
    let stopping = async {
        service.stop().await;
        tasks.close();
        tasks.wait().await;
        service.close().await;
        nats.close().await;
        monitor.tracer().flush().await;
    };
    if timeout(config.replica.shutdown_deadline(), stopping).await.is_err() {
        tracing::warn!("the shutdown deadline has passed: stopped with requests unanswered");
    }
    ended
}

/// Says why a background task ended. The tasks that use the connection to NATS end with it, a little before
/// [`Nats::closed`] reports that.
async fn task_ended(nats: &Nats) -> anyhow::Error {
    match timeout(Duration::from_secs(1), nats.closed()).await {
        Ok(closed) => closed.into(),
        Err(_) => anyhow!("a background task of the service ended unexpectedly"),
    }
}

fn responders(config: &Config, shared: &Arc<Shared>, positions: &Positions) -> Vec<Arc<Responder>> {
    let mut lookups: BTreeMap<&str, Arc<Lookup>> = BTreeMap::new();
    let new_lookup = |view| {
        let (store, tasks, metrics) = (shared.store.clone(), shared.tasks.clone(), Arc::clone(&shared.metrics));
        Arc::new(Lookup::new(view, store, config.max_reply_bytes, tasks, metrics))
    };
    let queries = views::queries().into_iter();
    queries
        .map(|(view, query)| {
            let lookup = Arc::clone(lookups.entry(view).or_insert_with(|| new_lookup(view)));
            Arc::new(Responder { view, query, position: positions.of(view), lookup, shared: Arc::clone(shared) })
        })
        .collect()
}

/// Waits for NATS and MongoDB, then serves.
async fn start(
    nats: &Nats,
    monitor: &Monitor,
    store: &Store,
    positions: Positions,
    responders: Vec<Arc<Responder>>,
) -> anyhow::Result<(Service, JoinSet<()>)> {
    nats.up().await;
    let mut background = JoinSet::new();
    let announcements = nats.client.subscribe(nats.subjects.checkpoints()).await?;
    background.spawn(positions.clone().listen(nats.subjects.clone(), announcements));
    positions.wait_for_first_refresh(store).await;
    let standby = Standby::new(&positions, monitor);
    background.spawn(positions.keep_refreshing(store.clone(), monitor.pulse("reading the positions", REFRESH_BOUND)));

    let endpoints = responders.into_iter().map(|responder| Endpoint {
        description: endpoint(nats, &responder),
        open: Some(standby.is_open(responder.view)),
        handle: Box::new(move |request| responder.take(request)),
    });
    let service = Service::start(nats, monitor, env!("CARGO_PKG_DESCRIPTION"), endpoints.collect()).await;
    background.spawn(standby.run(nats.clone(), monitor.clone()));
    Ok((service, background))
}

fn endpoint(nats: &Nats, responder: &Responder) -> EndpointDescription {
    let query = responder.query;
    EndpointDescription {
        name: format!("{}-{}", query.noun, query.verb),
        subject: nats.subjects.query(query.noun, query.verb),
        description: query.description.to_owned(),
        schema: (query.schema)().as_value().to_string(),
    }
}
