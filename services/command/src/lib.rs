//! The command service: it takes commands, decides them, and writes what happened to the journal in PostgreSQL, from
//! where the relay publishes it to the stream. It alone touches PostgreSQL.

mod batch;
mod config;
mod handover;
mod intake;
mod journal;
mod lane;
mod ledger;
mod migrations;
mod outbox;
mod postgres;
mod relay;
mod state_cache;

use std::{collections::HashMap, sync::Arc, time::Duration};

use deadpool_postgres::Object;
use domain::CommandType;
use futures_util::future::BoxFuture;
use runtime::{
    Nats, Ready,
    micro::{Description, Endpoint, EndpointDescription, Service},
    serve_again,
};
use tokio::{sync::Mutex, task::JoinSet, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::{Config, Task};
use handover::Handover;
use intake::Intake;
use lane::Lane;
use postgres::Postgres;
use relay::Relay;
use state_cache::StateCache;

/// How long a migration may take, before it is tried again: a server that hangs says nothing.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(1_800);

/// Serves commands until `shutdown`; then takes no more, finishes what was taken, and returns.
///
/// # Errors
/// If the configuration is wrong. A server that is away is waited for.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxed, the service is compiled here, once, and not again in every program that runs it.
    Box::pin(async move {
        serve_again(&config.nats, "command", &shutdown, || Box::pin(serve_until(config.clone(), shutdown.clone())))
            .await
    })
}

async fn serve_until(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    // A lane has one connection; another asks for a transaction's fate, a third sweeps the ledger.
    let postgres = Postgres::new(&config.postgres_url()?, usize::from(config.lanes) + 2)?;
    let nats = Nats::connect(&config.nats, "command").await?;
    let starting = async {
        prepare(&postgres).await?;
        nats.up().await;
        anyhow::Ok(())
    };
    match shutdown.run_until_cancelled(starting).await {
        Some(started) => started?,
        None => return Ok(()),
    }

    // What has not ended by the deadline ends with these: it must not go on beside a service that begins anew.
    let (mut background, mut lanes) = (JoinSet::new(), JoinSet::new());
    let stop_background = CancellationToken::new();
    let handover = Handover::default();
    background.spawn(
        Relay::new(config.clone(), nats.clone(), handover.clone(), postgres.clone()).run(stop_background.clone()),
    );
    let retention = Duration::from_secs(config.ledger_seconds.into());
    background.spawn(ledger::run(postgres.clone(), retention, stop_background.clone()));

    let replies = TaskTracker::new();
    let (intake, queue) = Intake::new(&config, postgres.clone(), replies.clone());
    let queue = Arc::new(Mutex::new(queue));
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
            pessimistic_batches: 0,
            contended: HashMap::new(),
        };
        lanes.spawn(lane.run());
    }
    let service = tokio::select! {
        service = serve(&nats, &config, &intake) => service?,
        () = shutdown.cancelled() => return Ok(()),
        closed = nats.closed() => return Err(closed.into()),
    };
    drop(intake);
    let ready = Ready::announce(config.replica.ready_file.as_deref())?;

    let ended = tokio::select! {
        () = shutdown.cancelled() => Ok(()),
        closed = nats.closed() => Err(closed.into()),
    };
    drop(ready);
    let stopping = async {
        service.stop().await;
        // The endpoints held the queue's senders: the lanes end when they have taken the last command.
        while lanes.join_next().await.is_some() {}
        replies.close();
        replies.wait().await;
        // The relay publishes what the lanes have committed last.
        stop_background.cancel();
        while background.join_next().await.is_some() {}
        service.close().await;
        nats.close().await;
    };
    if timeout(config.replica.shutdown_deadline(), stopping).await.is_err() {
        tracing::warn!("stopped before everything was finished: the deadline has passed");
    }
    ended
}

/// Brings the database's schema up to date.
///
/// # Errors
/// If a migration fails. A server that is away is waited for.
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
            // Its connection is of no more use: the server may still be at it.
            Err(_) => drop(Object::take(client)),
        }
    }
}

async fn serve(nats: &Nats, config: &Config, intake: &Intake) -> anyhow::Result<Service> {
    let description = Description {
        name: "command",
        description: "Changes data and says whether that succeeded",
        version: env!("CARGO_PKG_VERSION"),
        id: config.replica.name(),
    };
    let mut endpoints = Vec::new();
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
        endpoints.push(Endpoint { description, handle });
    }
    Ok(Service::start(nats, description, endpoints).await)
}
