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
    serve_again,
};
use tokio::time::sleep;
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

/// Carries this replica's share of the views forward until `shutdown`; then finishes what was begun, hands the views
/// over, and returns.
///
/// # Errors
/// If the configuration is wrong. A server that is away is waited for.
pub fn run(config: Config, shutdown: CancellationToken) -> BoxFuture<'static, anyhow::Result<()>> {
    // Boxed, the service is compiled here, once, and not again in every program that runs it.
    Box::pin(async move {
        serve_again(&config.nats, "projection", &shutdown, || Box::pin(serve_until(config.clone(), shutdown.clone())))
            .await
    })
}

async fn serve_until(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    let replica = config.replica.name();
    let (database, address) = store::connect(&config.mongodb_url()?, &config.database).await?;
    let nats = Nats::connect(&config.nats, "projection").await?;
    let starting = async { tokio::join!(nats.up(), prepared(&database, &address)) };
    let Some(((), writers)) = shutdown.run_until_cancelled(starting).await else {
        return Ok(());
    };
    let service = tokio::select! {
        service = serve(&nats, &replica) => service,
        () = shutdown.cancelled() => return Ok(()),
        gone = nats.closed() => return Err(gone.into()),
    };
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
    let election = Election::new(&nats, &config.nats.stream, leases, candidates(&resources));
    let stop = CancellationToken::new();
    let stopping = async {
        let ended = tokio::select! {
            () = shutdown.cancelled() => Ok(()),
            gone = nats.closed() => Err(gone.into()),
        };
        drop(ready);
        stop.cancel();
        ended
    };
    let (ended, in_time) =
        tokio::join!(stopping, within(config.replica.shutdown_deadline(), &stop, election.run(&stop)));
    if !in_time {
        tracing::warn!("stopped before everything was finished: the deadline has passed");
    }
    service.stop().await;
    service.close().await;
    nats.close().await;
    ended
}

/// Whether the work ended in time after it was told to stop.
async fn within(deadline: Duration, stop: &CancellationToken, work: impl Future<Output = ()>) -> bool {
    let too_late = async {
        stop.cancelled().await;
        sleep(deadline).await;
    };
    tokio::select! {
        () = work => true,
        () = too_late => false,
    }
}

/// Makes sure that each view has its collection, indexes and checkpoint, and starts what writes them.
async fn prepared(database: &Database, server: &str) -> Writers {
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
                    tracing::error!(server, reason, "cannot prepare the views in MongoDB (MONGODB_URL), trying again");
                }
                trouble.wait().await;
            }
        }
    }
}

async fn serve(nats: &Nats, replica: &str) -> Service {
    let description = Description {
        name: "projection",
        description: "Builds the views from the stream",
        version: env!("CARGO_PKG_VERSION"),
        id: replica.to_owned(),
    };
    Service::start(nats, description, vec![]).await
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
