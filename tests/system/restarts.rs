//! Rolling restarts: every request is answered, whichever replica stops meanwhile, and however slow the connection to
//! NATS is.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use serde_json::{Value, json};
use tests::{Proxy, Replica, System, eventually};
use tokio::time::sleep;
use uuid::Uuid;

/// Restarts of each service with each delay.
const RESTARTS: usize = 25;

#[tokio::test(flavor = "multi_thread")]
async fn restarts_lose_no_request_however_slow_the_connection_to_nats_is() {
    let system = System::new().await;
    let proxies = Proxies {
        command: Proxy::start(system.stack.url("NATS_COMMAND_URL")).await,
        query: Proxy::start(system.stack.url("NATS_QUERY_URL")).await,
        projection: Proxy::start(system.stack.url("NATS_PROJECTION_URL")).await,
    };
    let mut replicas = proxies.start(&system).await;
    let user = system.user().await;
    let product = system.product(0).await;
    eventually("the views can be queried", async || {
        system.read("product.get", json!({"id": product.id}), product.position).await.ok()?;
        system.read("order.list", json!({}), product.position).await.ok()
    })
    .await;

    let (enough, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let send = async |name: &str, body: Value, pause: Duration| {
        while !enough.load(Relaxed) {
            let reply = system.ask(name, body.clone(), &[]).await;
            assert!(reply.is_ok(), "a request for {name} was lost: {reply:?}");
            answered.fetch_add(1, Relaxed);
            sleep(pause).await;
        }
    };
    let (busy, quiet) = (Duration::from_millis(2), Duration::from_millis(150));
    let load = async {
        tokio::join!(
            send("cmd.product.restock", json!({"id": product.id, "quantity": 1}), busy),
            send("cmd.product.restock", json!({"id": product.id, "quantity": 2}), busy),
            send("cmd.user.update", json!({"id": user.id}), quiet),
            send("qry.product.get", json!({"id": product.id}), busy),
            send("qry.product.get", json!({"id": product.id}), busy),
            send("qry.order.list", json!({}), quiet),
        )
    };
    let restarts = async {
        for delay in [0, 2, 10, 50] {
            proxies.delay(Duration::from_millis(delay));
            for _ in 0..RESTARTS {
                let next = proxies.start(&system).await;
                let [command, query, projection] = std::mem::replace(&mut replicas, next);
                tokio::join!(command.stop(), query.stop(), projection.stop());
            }
        }
        enough.store(true, Relaxed);
    };
    tokio::join!(load, restarts);
    assert!(answered.load(Relaxed) > 2_000, "{answered:?}");
}

struct Proxies {
    command: Proxy,
    query: Proxy,
    projection: Proxy,
}

impl Proxies {
    fn delay(&self, delay: Duration) {
        for proxy in [&self.command, &self.query, &self.projection] {
            proxy.delay(delay);
        }
    }

    /// Starts a replica of each service, and waits until all of them listen.
    async fn start(&self, system: &System) -> [Replica; 3] {
        let name = Uuid::now_v7().to_string();
        let command = system.start_command(&["--replica", &name, "--nats-url", &self.command.url]);
        let query = system.start_query(&["--replica", &name, "--nats-url", &self.query.url]);
        let projection = system.start_projection(&["--replica", &name, "--nats-url", &self.projection.url]);
        for service in ["command", "query", "projection"] {
            system.listens(service, &name).await;
        }
        [command, query, projection]
    }
}
