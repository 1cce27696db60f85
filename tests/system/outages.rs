//! Servers that are absent at the start, and servers that go away for a while: each service waits, goes on by itself, and
//! says so to those who ask meanwhile. Nothing that was acknowledged is lost.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use serde_json::json;
use tests::{Stack, System, eventually, journal};

use crate::{projection::assert_views_are_journal, relay::assert_stream_is_journal};

#[tokio::test(flavor = "multi_thread")]
async fn services_wait_for_absent_servers_and_outlive_each_server_s_absence() {
    let stack = Stack::private("outages");
    let system = System::on(stack.clone()).await;
    let mut replicas = vec![];
    for server in ["nats", "postgres", "mongodb"] {
        stack.stop(server);
    }
    replicas.push(system.start_command(&[]));
    replicas.push(system.start_projection(&["--lease-ms", "1000"]));
    replicas.push(system.start_query(&[]));
    for server in ["mongodb", "postgres", "nats"] {
        tokio::time::sleep(Duration::from_millis(500)).await;
        stack.resume(server);
    }
    system.answers("command").await;
    replicas.push(system.query().await);

    let counted = Counted::new(&system).await;
    for server in ["nats", "postgres", "mongodb"] {
        let stopped = AtomicBool::new(false);
        let outage = async {
            counted.moves_on().await;
            tokio::task::block_in_place(|| stack.stop(server));
            tokio::time::sleep(Duration::from_secs(2)).await;
            if server == "postgres" {
                counted.is_refused_at_once(&system).await;
            }
            if server == "mongodb" {
                queries_are_refused_at_once(&system).await;
            }
            tokio::task::block_in_place(|| stack.resume(server));
            counted.moves_on().await;
            stopped.store(true, Relaxed);
        };
        tokio::join!(outage, counted.load(&system, &stopped));
        assert!(replicas.iter().all(|replica| !replica.has_ended()), "{server}");
        journal::check(&journal::events(&system).await);
        counted.check(&system).await;
        assert_stream_is_journal(&system).await;
        assert_views_are_journal(&system).await;
        system.read("product.get", json!({"id": counted.product}), system.head().await).await.data();
    }
    for replica in replicas {
        replica.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_break_in_the_middle_of_a_commit_lose_and_double_nothing() {
    let system = System::new().await;
    let _command = system.command_with(&["--lanes", "2"]).await;
    let counted = Counted::new(&system).await;
    let stopped = AtomicBool::new(false);
    let breaking = async {
        let journal = system.journal().await;
        for _ in 0..60 {
            counted.moves_on().await;
            let statement = "select pg_terminate_backend(pid) from pg_stat_activity \
                where datname = current_database() and application_name = 'watershed command'";
            journal.query(statement, &[]).await.unwrap();
            tokio::time::sleep(Duration::from_millis(17)).await;
        }
        stopped.store(true, Relaxed);
    };
    tokio::join!(breaking, counted.load(&system, &stopped));
    counted.check(&system).await;
    assert_stream_is_journal(&system).await;
}

/// A product that clients restock one piece at a time, without idempotency keys: its stock tells how often that happened.
struct Counted {
    product: domain::Id,
    accepted: AtomicU64,
    /// The reply did not come, or said that the outcome is not known.
    unknown: AtomicU64,
}

impl Counted {
    async fn new(system: &System) -> Self {
        Self { product: system.product(0).await.id, accepted: AtomicU64::new(0), unknown: AtomicU64::new(0) }
    }

    /// 16 clients restock until it is enough.
    async fn load(&self, system: &System, enough: &AtomicBool) {
        let one_client = async || {
            while !enough.load(Relaxed) {
                let restock = json!({"id": self.product, "quantity": 1});
                match system.client.command("product.restock", restock, &[]).await {
                    Ok(reply) => match reply.result {
                        Ok(_) => _ = self.accepted.fetch_add(1, Relaxed),
                        Err(failure) => {
                            assert!(["unavailable", "overloaded"].contains(&&*failure.code), "{failure}");
                            let unknown = failure.details.get("outcome").is_some();
                            self.unknown.fetch_add(u64::from(unknown), Relaxed);
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                    },
                    Err(_) => {
                        self.unknown.fetch_add(1, Relaxed);
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        };
        join_all((0..16).map(|_| one_client())).await;
    }

    /// Waits until some more commands are accepted.
    async fn moves_on(&self) {
        let before = self.accepted.load(Relaxed);
        eventually("commands are accepted", async || (self.accepted.load(Relaxed) > before + 20).then_some(())).await;
    }

    /// What was accepted happened once; what was refused did not happen; only of what is unknown either may be.
    async fn check(&self, system: &System) {
        let events = journal::events(system).await;
        let happened = events.iter().filter(|event| event.id == self.product).count() as u64 - 1;
        let (accepted, unknown) = (self.accepted.load(Relaxed), self.unknown.load(Relaxed));
        assert!(happened >= accepted && happened <= accepted + unknown, "{happened}, {accepted} to {unknown} more");
    }

    async fn is_refused_at_once(&self, system: &System) {
        eventually("commands are refused at once", async || {
            let asked = Instant::now();
            let restock = json!({"id": self.product, "quantity": 1});
            let reply = system.client.command("product.restock", restock, &[]).await.ok()?;
            let failure = reply.result.err()?;
            (failure.code == "unavailable" && asked.elapsed() < Duration::from_millis(500)).then_some(())
        })
        .await;
    }
}

async fn queries_are_refused_at_once(system: &System) {
    eventually("queries are refused at once", async || {
        let asked = Instant::now();
        let reply = system.client.query("user.list", json!({}), &[]).await.ok()?;
        let failure = reply.result.err()?;
        (failure.code == "unavailable" && asked.elapsed() < Duration::from_millis(500)).then_some(())
    })
    .await;
}
