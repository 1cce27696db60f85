//! The projection service: reads the stream of events, and writes the views to MongoDB. The effect of each event is
//! stored exactly once, and nobody else writes there.
//!
//! One event on its way from the stream to the announced checkpoint:
//!
//! 1. `lease` and `election` decide which replica leads each generation of a view, once `ownership` has found that the
//!    views are the stream's. `leader` keeps a generation up to date, or builds it until it takes the place of the one
//!    before (`generations`); for either, `projector` runs.
//! 2. `reader` pulls the message from JetStream, in the order of the positions, as an `event::StreamMessage`.
//!    `history` tells whether the stream is the one that was read before.
//! 3. `shared_reader` keeps the message in a window, from which the subscription of each view takes it.
//! 4. `projector` decodes the event (which happens once for all views), and asks the view which documents the event
//!    changes. `store` loads those that are not in memory.
//! 5. `fold` applies the event to the documents in memory, through the view's `evolve`.
//! 6. When the batch is full or due, `writer` grants a permit to write it, and `fold` seals it: `document_write` derives
//!    the writes from the difference between each document and its stored form, and the digest of the generation changes
//!    by what the documents change.
//! 7. `store` commits the writes together with the new checkpoint and digest, in one transaction.
//! 8. `projector` announces the new checkpoint over NATS to the query service, whose queries may be waiting for it.
//!
//! After any error the projector starts again from the stored checkpoint. `retry_state` paces the retries, and logs
//! each failure once. `comparison` compares two generations of a view. `metrics` keeps what is shown of all this, `observer` looks at the servers for it every second,
//! and `operations` has what an operator can ask this service.

pub mod comparison;
mod config;
mod document_write;
mod election;
mod event;
mod fold;
mod generations;
mod history;
mod leader;
mod lease;
mod metrics;
mod observer;
mod operations;
mod ownership;
mod projector;
mod reader;
mod retry_state;
mod shared_reader;
mod store;
mod writer;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use mongodb::Database;
use runtime::{Histogram, Monitor, Nats, Ready, Server, ServerStatus, http, micro::Service, serve_again};
use tokio::time::{sleep, timeout};
use tokio_util::{
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};
use views::{View, Visitor};

pub use config::Config;
use election::{Candidate, Election};
use event::Size;
use generations::Catalog;
use leader::lead;
use lease::Leases;
use metrics::Metrics;
use projector::{Lines, Resources};
use retry_state::RetryState;
use shared_reader::SharedReader;
use writer::Writers;

/// How long the election may take beyond some durations of a lease before it counts as hung.
const ELECTION_BOUND: Duration = Duration::from_secs(30);
/// How long the connection to NATS may take to be closed, even if the views have used up the time.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Keeps this replica's share of the views up to date until `shutdown`. Then writes the batches that have been begun,
/// releases the leases, and returns.
///
/// # Errors
/// If the configuration is wrong, or if a connection to NATS that has ended for good cannot be replaced. The service
/// waits for a server that is unavailable.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxing the future compiles the service once, in this crate, and not again in every program that runs it.
    Box::pin(async move {
        serve_again(&config.nats, "projection", &shutdown, || Box::pin(serve_until(config.clone(), shutdown.clone())))
            .await
    })
}

async fn serve_until(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let monitor = Monitor::new("projection", &config.replica, &config.nats);
    let _http = http::serve(monitor.clone(), config.replica.metrics_address);
    let (database, address) = store::connect(&config.mongodb_url()?, &config.database, &monitor).await?;
    let nats = Nats::connect(&config.nats, "projection").await?;
    let mongodb = ServerStatus::new(Server::Mongodb);
    monitor.add_server(nats.status.clone());
    monitor.add_server(mongodb.clone());
    let metrics = Metrics::new(&monitor);
    let (stream, observed) = (config.nats.stream.clone(), Arc::clone(&metrics));
    let observing = observer::run(nats.clone(), stream, database.clone(), mongodb, observed);
    let _observer = AbortOnDropHandle::new(tokio::spawn(observing));
    let durations = &metrics.transaction_duration;
    let starting = async { tokio::join!(nats.up(), prepare(&database, &address, durations)) };
    let Some(((), (live, building))) = shutdown.run_until_cancelled(starting).await else {
        return Ok(());
    };
    let leases = Leases::new(&database, monitor.replica(), config.lease());
    let context = operations::Context {
        database: database.clone(),
        nats: nats.clone(),
        stream: config.nats.stream.clone(),
        leases: leases.clone(),
        catalog: Catalog::new(&database),
        metrics: Arc::clone(&metrics),
    };
    let tasks = TaskTracker::new();
    let operations = operations::endpoints(&Arc::new(context), &tasks);
    let service = tokio::select! {
        service = Service::start(&nats, &monitor, "Builds the views from the stream", operations) => service,
        () = shutdown.cancelled() => return Ok(()),
        gone = nats.closed() => return Err(gone.into()),
    };
    monitor.set_serving(true);
    let ready = Ready::announce(config.replica.ready_file.as_deref())?;

    let catalog = Catalog::new(&database);
    let lines = |writers| Lines { reader: Arc::new(SharedReader::new(&nats, &config.nats.stream)), writers };
    let resources = Arc::new(Resources {
        nats: nats.clone(),
        stream: config.nats.stream.clone(),
        database,
        leases: leases.clone(),
        catalog: catalog.clone(),
        live: lines(live),
        building: lines(building),
        build_share: config.build_share(),
        metrics,
        tracer: monitor.tracer().clone(),
        batch_limit: Size { events: config.batch_events, bytes: config.batch_bytes },
    });
    // Each turn takes a lease's duration at most.
    let pulse = monitor.pulse("the election", 4 * config.lease() + ELECTION_BOUND);
    let generations = (catalog, config.grace());
    let election = Election::new(&nats, &config.nats.stream, leases, generations, candidates(&resources), pulse);
    let (stop, stopped_at) = (CancellationToken::new(), OnceLock::new());
    let stopping = async {
        let ended = tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            gone = nats.closed() => Err(gone.into()),
        };
        let _ = stopped_at.set(Instant::now());
        drop(ready);
        monitor.set_serving(false);
        stop.cancel();
        ended
    };
    let leading = async {
        let owned = ownership::wait(&nats, &config.nats.stream, &resources.database, &resources.leases, &monitor);
        if stop.run_until_cancelled(owned).await.is_some() {
            election.run(&stop).await;
        }
    };
    let (ended, in_time) = tokio::join!(stopping, ends_within(config.replica.shutdown_deadline(), &stop, leading));
    if !in_time {
        tracing::warn!("stopped at the deadline, with batches unwritten or leases unreleased");
    }
    let stopping = async {
        service.stop().await;
        tasks.close();
        tasks.wait().await;
        service.close().await;
        nats.close().await;
        monitor.tracer().flush().await;
    };
    let left =
        config.replica.shutdown_deadline().saturating_sub(stopped_at.get().map_or(Duration::ZERO, Instant::elapsed));
    if timeout(left.max(LAST_WORDS), stopping).await.is_err() {
        tracing::warn!("the shutdown deadline has passed: stopped before everything was finished");
    }
    ended
}

/// Whether the work ends before the deadline after `stop`.
async fn ends_within(deadline: Duration, stop: &CancellationToken, work: impl Future<Output = ()>) -> bool {
    let too_late = async {
        stop.cancelled().await;
        sleep(deadline).await;
    };
    tokio::select! {
        () = work => true,
        () = too_late => false,
    }
}

/// Starts the writers: those of the generations that serve, and those of the others.
async fn prepare(database: &Database, server: &str, durations: &Histogram) -> (Writers, Writers) {
    let mut retry = RetryState::default();
    loop {
        let writers = async {
            // A server that cannot be used is to be told of at once, and a session alone does not ask it for anything.
            Catalog::new(database).all().await?;
            Ok((Writers::start(database, durations).await?, Writers::start(database, durations).await?))
        };
        match writers.await {
            Ok(writers) => return writers,
            Err(error) => {
                let error: mongodb::error::Error = error;
                if let Some(reason) = retry.log_once(&error.into()) {
                    tracing::error!(server, reason, "cannot prepare the views in MongoDB (MONGODB_URL), trying again");
                }
                retry.wait().await;
            }
        }
    }
}

fn candidates(resources: &Arc<Resources>) -> Vec<Candidate> {
    struct Candidates<'a>(&'a Arc<Resources>, Vec<Candidate>);

    impl Visitor for Candidates<'_> {
        fn visit<V: View>(&mut self) {
            let resources = Arc::clone(self.0);
            let lead: election::Lead = Box::new(move |lease, number, stop| {
                let resources = Arc::clone(&resources);
                Box::pin(async move { lead::<V>(&resources, &lease, number, &stop).await })
            });
            let (view, version, metrics) = (V::NAME, V::VERSION, self.0.metrics.of::<V>());
            self.1.push(Candidate { view, version, lead, metrics });
        }
    }

    let mut candidates = Candidates(resources, Vec::new());
    views::visit(&mut candidates);
    candidates.1
}
