//! Endpoints of a service that it opens and closes while it runs: what the server has sent is answered, whatever
//! happens meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use clap::Parser;
use futures_util::future::join_all;
use runtime::{
    Monitor, Nats, NatsConfig, ReplicaConfig,
    micro::{Endpoint, EndpointDescription, Reply, Request, Service},
};
use tests::{Proxy, System, eventually, stays};
use tokio::sync::watch;

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_closed_and_opened_again_and_no_request_is_lost() {
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_QUERY_URL")).await;
    let (first, second) = tokio::join!(Shop::start(&system, &proxy.url), async {
        Shop::start(&system, system.stack.url("NATS_QUERY_URL")).await
    });
    // Far away, so that requests are on their way when the endpoint is closed.
    proxy.delay(Duration::from_millis(15));
    let (is_over, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let subject = system.subjects.query("shop", "enter");
    let customers = join_all((0..8).map(|_| async {
        while !is_over.load(Relaxed) {
            let reply = system.client.nats().request(subject.clone(), "".into()).await;
            assert!(reply.is_ok(), "a request was lost: {reply:?}");
            answered.fetch_add(1, Relaxed);
        }
    }));
    let opening = async {
        for turn in 0..60 {
            first.is_open.send_replace(turn % 2 == 0);
            tokio::time::sleep(Duration::from_millis(turn)).await;
        }
        first.is_open.send_replace(false);
        assert!(first.count() > 0 && second.count() > 0);
        is_quiet(&first).await;

        // It stays so on a new connection.
        let before = answered.load(Relaxed);
        proxy.cut();
        first.listens(&system).await;
        is_quiet(&first).await;
        assert!(answered.load(Relaxed) > before, "the other one goes on");
        let before = first.count();
        first.is_open.send_replace(true);
        eventually("it is open again", async || (first.count() > before).then_some(())).await;

        // Nothing opens what is being stopped.
        let stopping = async {
            first.service.stop().await;
            first.is_open.send_replace(false);
        };
        let changing = async {
            for turn in 0..20 {
                first.is_open.send_replace(turn % 2 == 0);
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(stopping, changing);
        first.is_open.send_replace(true);
        is_quiet(&first).await;
        is_over.store(true, Relaxed);
    };
    tokio::join!(customers, opening);
    assert_eq!(answered.load(Relaxed), first.count() + second.count(), "each is answered once");
    first.service.close().await;
    second.service.stop().await;
}

/// Waits until the requests on the way have been taken, and checks that no more come.
async fn is_quiet(shop: &Shop) {
    tokio::time::sleep(Duration::from_millis(200)).await;
    stays("no request comes", shop.count(), async || shop.count()).await;
}

/// A service with an endpoint that is open or closed.
struct Shop {
    service: Service,
    is_open: watch::Sender<bool>,
    taken: Arc<AtomicU64>,
    replica: String,
}

impl Shop {
    async fn start(system: &System, url: &str) -> Self {
        #[derive(Parser)]
        struct Settings {
            #[command(flatten)]
            nats: NatsConfig,
            #[command(flatten)]
            replica: ReplicaConfig,
        }

        let settings = Settings::parse_from(["shop", "--nats-url", url, "--subject-prefix", &system.prefix]);
        let monitor = Monitor::new("query", &settings.replica, &settings.nats);
        let nats = Nats::connect(&settings.nats, "query").await.unwrap();
        nats.up().await;
        let (is_open, open) = watch::channel(false);
        let taken = Arc::new(AtomicU64::new(0));
        let description = EndpointDescription {
            name: "shop-enter".to_owned(),
            subject: system.subjects.query("shop", "enter"),
            description: "Lets a customer in".to_owned(),
            schema: "{}".to_owned(),
        };
        let count = Arc::clone(&taken);
        let handle = Box::new(move |request: Request| {
            count.fetch_add(1, Relaxed);
            tokio::spawn(request.respond(Ok(Reply { position: None, body: "{}".into() })));
        });
        let endpoint = Endpoint { description, open: Some(open), handle };
        let service = Service::start(&nats, &monitor, "A shop", vec![endpoint]).await;
        is_open.send_replace(true);
        Self { service, is_open, taken, replica: monitor.replica().to_owned() }
    }

    fn count(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    async fn listens(&self, system: &System) {
        system.listens("query", &self.replica).await;
    }
}
