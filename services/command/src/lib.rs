//! The command service: it takes commands, decides them, and writes what happened to the journal in PostgreSQL, from
//! where the relay publishes it to the stream. It alone touches PostgreSQL.

mod batch;
mod config;
mod handover;
mod intake;
mod journal;
mod known;
mod lane;
mod ledger;
mod migrations;
mod outbox;
mod postgres;
mod relay;

use std::{sync::Arc, time::Duration};

use domain::CommandType;
use futures_util::future::BoxFuture;
use runtime::{
    Nats, Ready,
    micro::{Description, EndpointDescription, Service},
};
use tokio::sync::Mutex;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use config::{Config, Task};
use handover::Handover;
use intake::Intake;
use known::Known;
use lane::Lane;
use postgres::Postgres;
use relay::Relay;

/// Serves commands until `shutdown`; then takes no more, finishes what was taken, and returns.
///
/// # Errors
/// If the configuration is wrong. A server that is away is waited for.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxed, the service is compiled here, once, and not again in every program that runs it.
    Box::pin(serve_until(config, shutdown))
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

    let background = TaskTracker::new();
    let stop_background = CancellationToken::new();
    let handover = Handover::default();
    background.spawn(Relay::new(config.clone(), nats.clone(), handover.clone()).run(stop_background.clone()));
    let retention = Duration::from_secs(config.ledger_seconds.into());
    background.spawn(ledger::run(postgres.clone(), retention, stop_background.clone()));

    let (lanes, replies) = (TaskTracker::new(), TaskTracker::new());
    let (intake, waiting) = Intake::new(&config, postgres.clone(), replies.clone());
    let waiting = Arc::new(Mutex::new(waiting));
    for _ in 0..config.lanes {
        let lane = Lane {
            waiting: Arc::clone(&waiting),
            batch_commands: config.batch_commands,
            postgres: postgres.clone(),
            nats: nats.clone(),
            handover: handover.clone(),
            replies: replies.clone(),
            session: None,
            known: Known::default(),
            caution: 0,
        };
        lanes.spawn(lane.run());
    }
    let service = serve(&nats, &config, &intake).await?;
    drop(intake);
    nats.client.flush().await?;
    let ready = Ready::announce(config.replica.ready_file.as_deref())?;

    shutdown.cancelled().await;
    let stopping = async {
        service.stop().await;
        // The endpoints held the queue's senders: the lanes end when they have taken the last command.
        for tasks in [&lanes, &replies] {
            tasks.close();
            tasks.wait().await;
        }
        stop_background.cancel();
        background.close();
        background.wait().await;
        nats.close().await;
    };
    if tokio::time::timeout(config.replica.shutdown_deadline(), stopping).await.is_err() {
        tracing::warn!("stopped before everything was finished: the deadline has passed");
    }
    drop(ready);
    Ok(())
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
        postgres.answers().await;
        let Ok(mut client) = postgres.get().await else { continue };
        match migrations::migrate(&mut client).await {
            Err(error) if postgres::is_lost(&error) => {}
            migrated => return Ok(migrated?),
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
    let service = Service::start(nats, description).await?;
    for command_type in domain::commands() {
        let CommandType { aggregate, verb, description, schema, parse: _ } = *command_type;
        let endpoint = EndpointDescription {
            name: format!("{aggregate}-{verb}"),
            subject: nats.subjects.command(aggregate, verb),
            description: description.to_owned(),
            schema: serde_json::to_string(&schema())?,
        };
        let intake = intake.clone();
        service.serve(endpoint, move |request| intake.take(*command_type, request)).await?;
    }
    Ok(service)
}
