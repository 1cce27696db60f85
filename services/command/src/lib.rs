//! The command service takes commands, decides them, and writes what happened to the journal in PostgreSQL, from
//! where the relay publishes it to the stream. It is the only service that uses PostgreSQL.
//!
//! One command, `cmd.order.create`, passes through these files:
//!
//! 1. [`runtime::micro`] receives the request, and calls `intake`, which parses it and puts it into the bounded queue,
//!    or refuses it at once.
//! 2. A `lane` takes what is waiting, as one batch, and retries, splits or refuses what fails.
//! 3. `batch` decides the batch's commands one after the other, on aggregates from `state_cache` or from the database,
//!    and writes states, claims, ledger entries and events in one transaction. States that this version of the program
//!    does not read, `refold` folds anew from the events.
//! 4. `journal` has the SQL of that transaction. Its last statement takes the journal's head, and with it the
//!    positions.
//! 5. Once the transaction has committed, the lane passes the events to the `handover`, which keeps them in memory for
//!    the relay of the same replica, or wakes the relay in another; and the lane answers the requesters.
//! 6. The `relay` publishes the events to the stream in the order of their positions. `outbox` turns them into
//!    messages; what did not come through the handover, it reads from the journal. `identity` tells whether the stream
//!    is this journal's.
//!
//! `ledger` deletes old entries of the command ledger, `migrations` keeps the schema up to date, and `postgres` knows
//! whether the server is up. `metrics` counts what the others do, `observer` looks at journal and stream for it, and
//! `operations` has what an operator can ask this service; `branching` is the one that goes on with a journal that was
//! restored.

mod batch;
mod branching;
mod config;
mod handover;
mod identity;
mod intake;
mod journal;
mod lane;
mod ledger;
mod metrics;
mod migrations;
mod observer;
mod operations;
mod outbox;
mod postgres;
mod refold;
mod relay;
mod state_cache;

use std::{collections::HashMap, sync::Arc, time::Duration};

use deadpool_postgres::Object;
use domain::CommandType;
use futures_util::future::BoxFuture;
use runtime::{
    Monitor, Nats, Ready, http,
    micro::{Endpoint, EndpointDescription, Service},
    serve_again,
};
use tokio::{sync::Mutex, task::JoinSet, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::{Config, Task};
use handover::Handover;
use intake::Intake;
use lane::Lane;
use metrics::Metrics;
use postgres::Postgres;
use refold::FoldedStates;
use relay::Relay;
use state_cache::StateCache;

/// How long a migration may take before it is tried again, since a server that hangs sends no error.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(1_800);
/// How long a lane may work on one batch. It gives up on a server that does not answer much sooner.
const BATCH_BOUND: Duration = Duration::from_secs(120);

/// Serves commands until `shutdown`; then accepts no more, finishes those that were accepted, and returns.
///
/// # Errors
/// If the configuration is wrong. Servers that are down are waited for.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxed, the service's future is compiled once, in this crate, and not again in every program that runs it.
    Box::pin(async move {
        serve_again(&config.nats, "command", &shutdown, || Box::pin(serve_until(config.clone(), shutdown.clone())))
            .await
    })
}

async fn serve_until(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let monitor = Monitor::new("command", &config.replica, &config.nats);
    let _http = http::serve(monitor.clone(), config.replica.metrics_address);
    // Each lane has one connection. Others are for resolving transactions in doubt, for sweeping the ledger, for
    // observing the journal, and for operations.
    let postgres = Postgres::new(&config.postgres_url()?, usize::from(config.lanes) + 4)?;
    let nats = Nats::connect(&config.nats, "command").await?;
    monitor.add_server(nats.status.clone());
    monitor.add_server(postgres.status.clone());
    postgres.show_pool(&monitor);
    let metrics = Metrics::new(&monitor);
    let starting = async {
        prepare(&postgres).await?;
        nats.up().await;
        anyhow::Ok(())
    };
    match shutdown.run_until_cancelled(starting).await {
        Some(started) => started?,
        None => return Ok(()),
    }

    // Dropping the sets aborts the tasks that have not ended by the deadline: they must not run beside a restarted
    // service.
    let (mut background, mut lanes) = (JoinSet::new(), JoinSet::new());
    let stop_background = CancellationToken::new();
    let handover = Handover::default();
    background.spawn(
        Relay::new(config.clone(), nats.clone(), handover.clone(), postgres.clone(), &monitor, Arc::clone(&metrics))
            .run(stop_background.clone()),
    );
    let (stream, observed) = (config.nats.stream.clone(), Arc::clone(&metrics));
    background.spawn(observer::run(postgres.clone(), nats.clone(), stream, observed, stop_background.clone()));
    let retention = Duration::from_secs(config.ledger_seconds.into());
    background.spawn(ledger::run(postgres.clone(), retention, stop_background.clone()));

    let replies = TaskTracker::new();
    let (intake, queue) = Intake::new(&config, postgres.clone(), replies.clone());
    intake.show(&config, &monitor);
    let (queue, folded) = (Arc::new(Mutex::new(queue)), FoldedStates::default());
    for _ in 0..config.lanes {
        let lane = Lane {
            queue: Arc::clone(&queue),
            batch_commands: config.batch_commands,
            postgres: postgres.clone(),
            nats: nats.clone(),
            handover: handover.clone(),
            replies: replies.clone(),
            session: None,
            cache: StateCache::default(),
            folded: folded.clone(),
            pessimistic_batches: 0,
            contended: HashMap::new(),
            metrics: Arc::clone(&metrics),
            pulse: monitor.pulse("a lane", BATCH_BOUND),
            tracer: monitor.tracer().clone(),
            commit: None,
        };
        lanes.spawn(lane.run());
    }
    let service = tokio::select! {
        service = serve(&nats, &postgres, &config, &monitor, &intake, &replies) => service?,
        () = shutdown.cancelled() => return Ok(()),
        closed = nats.closed() => return Err(closed.into()),
    };
    drop(intake);
    monitor.set_serving(true);
    let ready = Ready::announce(config.replica.ready_file.as_deref())?;

    let ended = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        closed = nats.closed() => Err(closed.into()),
    };
    drop(ready);
    monitor.set_serving(false);
    let stopping = async {
        service.stop().await;
        // The endpoints held the queue's senders, so the lanes end once they have taken the last command.
        while lanes.join_next().await.is_some() {}
        replies.close();
        replies.wait().await;
        // The relay still publishes what the lanes have committed last.
        stop_background.cancel();
        while background.join_next().await.is_some() {}
        service.close().await;
        nats.close().await;
        monitor.tracer().flush().await;
    };
    if timeout(config.replica.shutdown_deadline(), stopping).await.is_err() {
        tracing::warn!("the shutdown deadline has passed: stopped before everything was finished");
    }
    ended
}

/// Brings the database's schema up to date.
///
/// # Errors
/// If a migration fails. A server that is down is waited for.
pub async fn migrate(config: &Config) -> anyhow::Result<()> {
    prepare(&Postgres::new(&config.postgres_url()?, 1)?).await
}

async fn prepare(postgres: &Postgres) -> anyhow::Result<()> {
    loop {
        postgres.wait_until_up().await;
        let Ok(mut client) = postgres.get().await else { continue };
        match timeout(MIGRATION_TIMEOUT, migrations::migrate(&mut client)).await {
            Ok(Err(error)) if postgres::is_lost(&error) => {}
            Ok(migrated) => return Ok(migrated?),
            // The connection cannot be reused: the server may still be busy with the migration.
            Err(_) => drop(Object::take(client)),
        }
    }
}

async fn serve(
    nats: &Nats,
    postgres: &Postgres,
    config: &Config,
    monitor: &Monitor,
    intake: &Intake,
    tasks: &TaskTracker,
) -> anyhow::Result<Service> {
    let context = operations::Context {
        postgres: postgres.clone(),
        nats: nats.clone(),
        config: config.clone(),
        monitor: monitor.clone(),
    };
    let mut endpoints = operations::endpoints(&Arc::new(context), tasks);
    for command_type in domain::commands() {
        let CommandType { aggregate, verb, description, schema, parse: _ } = *command_type;
        let description = EndpointDescription {
            name: format!("{aggregate}-{verb}"),
            subject: nats.subjects.command(aggregate, verb),
            description: description.to_owned(),
            schema: serde_json::to_string(&schema())?,
        };
        let intake = intake.clone();
        let handle = Box::new(move |request| intake.take(*command_type, request));
        endpoints.push(Endpoint { description, open: None, handle });
    }
    Ok(Service::start(nats, monitor, "Changes data and says whether that succeeded", endpoints).await)
}
