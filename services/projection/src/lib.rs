//! The projection service: it reads the stream and writes the views to MongoDB, each event's effect exactly once. It
//! alone writes there.

mod config;
mod election;
mod event;
mod feed;
mod fold;
mod lease;
mod projector;
mod reader;
mod store;
mod trouble;
mod write;
mod writer;

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use mongodb::Database;
use runtime::{
    Nats, Ready,
    micro::{Description, Service},
};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use views::{View, Visitor};

pub use config::Config;
use election::{Candidate, Election};
use feed::Feed;
use lease::Leases;
use projector::{Resources, Size, lead};
use store::Store;
use trouble::Trouble;
use writer::Writers;

/// How long NATS may be silent at the start before that is said.
const PATIENCE: Duration = Duration::from_secs(2);

/// Carries this replica's share of the views forward until `shutdown`; then finishes what was begun, hands the views
/// over, and returns.
///
/// # Errors
/// If the configuration is wrong. A server that is away is waited for.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxed, the service is compiled here, once, and not again in every program that runs it.
    Box::pin(serve_until(config, shutdown))
}

async fn serve_until(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let replica = config.replica.name();
    let database = store::connect(&config.mongodb_url()?, &config.database).await?;
    let nats = Nats::connect(&config.nats, "projection").await?;
    let starting = async { tokio::join!(connected(&nats), prepared(&database)) };
    let Some(((), writers)) = shutdown.run_until_cancelled(starting).await else {
        return Ok(());
    };
    let service = serve(&nats, &replica).await?;
    let ready = Ready::announce(config.replica.ready_file.as_deref())?;

    let leases = Leases::new(&database, &replica, config.lease());
    let resources = Arc::new(Resources {
        nats: nats.clone(),
        database,
        leases: leases.clone(),
        feed: Arc::new(Feed::new(&nats, &config.nats.stream)),
        writers,
        bounds: Size { events: config.batch_events, bytes: config.batch_bytes },
    });
    let election = Election::new(leases, candidates(&resources));
    let stopping = async {
        shutdown.cancelled().await;
        tokio::time::sleep(config.replica.shutdown_deadline()).await;
    };
    tokio::select! {
        () = election.run(&shutdown) => {}
        () = stopping => tracing::warn!("stopped before everything was finished: the deadline has passed"),
    }
    service.stop().await;
    nats.close().await;
    drop(ready);
    Ok(())
}

async fn connected(nats: &Nats) {
    if timeout(PATIENCE, nats.up()).await.is_err() {
        tracing::warn!("NATS does not answer, trying again");
        nats.up().await;
    }
}

/// Makes sure that each view has its collection, indexes and checkpoint, and starts what writes them.
async fn prepared(database: &Database) -> Writers {
    struct Opening<'a>(&'a Database, Vec<BoxFuture<'a, Result<Store, mongodb::error::Error>>>);

    impl Visitor for Opening<'_> {
        fn visit<V: View>(&mut self) {
            self.1.push(Box::pin(Store::open::<V>(self.0)));
        }
    }

    let mut trouble = Trouble::default();
    loop {
        let mut opening = Opening(database, Vec::new());
        views::visit(&mut opening);
        let prepared = async {
            futures_util::future::try_join_all(opening.1).await?;
            Writers::start(database).await
        };
        match prepared.await {
            Ok(writers) => return writers,
            Err(error) => {
                if let Some(reason) = trouble.news(&error.into()) {
                    tracing::error!(reason, "cannot prepare the views, trying again");
                }
                trouble.wait().await;
            }
        }
    }
}

async fn serve(nats: &Nats, replica: &str) -> anyhow::Result<Service> {
    let description = Description {
        name: "projection",
        description: "Builds the views from the stream",
        version: env!("CARGO_PKG_VERSION"),
        id: replica.to_owned(),
    };
    Service::start(nats, description).await
}

fn candidates(resources: &Arc<Resources>) -> Vec<Candidate> {
    struct Candidates<'a>(&'a Arc<Resources>, Vec<Candidate>);

    impl Visitor for Candidates<'_> {
        fn visit<V: View>(&mut self) {
            let resources = Arc::clone(self.0);
            let lead: election::Lead = Box::new(move |lease, stop| {
                let resources = Arc::clone(&resources);
                Box::pin(async move { lead::<V>(&resources, &lease, &stop).await })
            });
            self.1.push(Candidate { view: V::NAME, lead });
        }
    }

    let mut candidates = Candidates(resources, Vec::new());
    views::visit(&mut candidates);
    candidates.1
}
