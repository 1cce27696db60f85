//! Servers that are absent at the start, and servers that are unavailable for a while: each service waits, recovers by
//! itself, and refuses requests meanwhile with a clear code. Nothing that was acknowledged is lost.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use client::Error;
use futures_util::future::join_all;
use serde_json::json;
use tests::{Expect, Proxy, Stack, System, eventually, journal};

use crate::{projection::assert_views_are_journal, relay::assert_stream_is_journal};

#[tokio::test(flavor = "multi_thread")]
async fn services_wait_for_absent_servers_and_survive_the_outage_of_each() {
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
            counted.makes_progress().await;
            tokio::task::block_in_place(|| stack.stop(server));
            tokio::time::sleep(Duration::from_secs(2)).await;
            if server == "postgres" {
                counted.is_refused_at_once(&system).await;
            }
            if server == "mongodb" {
                queries_are_refused_at_once(&system).await;
            }
            tokio::task::block_in_place(|| stack.resume(server));
            counted.makes_progress().await;
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
async fn connections_that_break_during_a_commit_neither_lose_nor_duplicate_commands() {
    let system = System::new().await;
    let _command = system.command_with(&["--lanes", "2"]).await;
    let counted = Counted::new(&system).await;
    let stopped = AtomicBool::new(false);
    let breaking = async {
        let journal = system.journal().await;
        for _ in 0..60 {
            counted.makes_progress().await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_postgres_that_hangs_counts_as_unavailable_until_it_resumes() {
    let stack = Stack::private("hangs");
    let system = System::on(stack.clone()).await;
    let _command = system.command().await;
    let counted = Counted::new(&system).await;
    let stopped = AtomicBool::new(false);
    let hanging = async {
        counted.makes_progress().await;
        stack.freeze_postgres();
        let frozen = Instant::now();
        counted.is_refused_at_once(&system).await;
        assert!(frozen.elapsed() < Duration::from_secs(6), "the hang was noticed after {:?}", frozen.elapsed());
        // Requests that were being processed when it began to hang do not wait much longer.
        tokio::time::sleep(Duration::from_secs(8).saturating_sub(frozen.elapsed())).await;
        let waiting = counted.asked.load(Relaxed) - counted.answered();
        assert!(waiting <= 16, "{waiting} requests are unanswered");
        for _ in 0..20 {
            let asked = Instant::now();
            let restock = json!({"id": counted.product, "quantity": 1});
            let failure = system.try_command("product.restock", restock).await.failure();
            assert_eq!(failure.code, "unavailable");
            assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
        }
        assert!(counted.longest() < Duration::from_secs(7), "{:?}", counted.longest());
        stack.thaw_postgres();
        counted.makes_progress().await;
        stopped.store(true, Relaxed);
    };
    tokio::join!(hanging, counted.load(&system, &stopped));
    journal::check(&journal::events(&system).await);
    counted.check(&system).await;
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_lock_delays_only_the_commands_that_need_the_locked_row() {
    let system = System::new().await;
    let _command = system.command().await;
    let (locked, free) = (system.product(10).await.id, Counted::new(&system).await);
    // Only the order itself knows which products its cancellation needs.
    let lines = json!([{"product": locked, "quantity": 1}]);
    let order = json!({"user": system.user().await.id, "lines": lines});
    let order = system.accept("order.create", order).await.id;
    let foreign = system.journal().await;
    foreign.batch_execute("begin").await.unwrap();
    foreign.query("select from aggregates where id = $1 for update", &[&locked.0]).await.unwrap();

    let (stopped, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let blocked = async {
        while !stopped.load(Relaxed) {
            let began = Instant::now();
            let (command, body) = match asked.load(Relaxed) % 2 {
                0 => ("product.restock", json!({"id": locked, "quantity": 1})),
                _ => ("order.cancel", json!({"id": order})),
            };
            let failure = system.try_command(command, body).await.failure();
            assert_eq!(failure.code, "overloaded");
            assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
            asked.fetch_add(1, Relaxed);
        }
    };
    let watching = async {
        // The first command waits for the lock until it times out. From then on the others proceed.
        eventually("one command was refused", async || (asked.load(Relaxed) > 0).then_some(())).await;
        // The commands in its batch have waited as long.
        for _ in 0..3 {
            free.makes_progress().await;
        }
        free.reset_longest();
        for _ in 0..5 {
            free.makes_progress().await;
        }
        eventually("several commands were refused", async || (asked.load(Relaxed) > 5).then_some(())).await;
        assert!(free.longest() < Duration::from_millis(800), "{:?}", free.longest());
        stopped.store(true, Relaxed);
    };
    tokio::join!(blocked, watching, free.load(&system, &stopped));
    foreign.batch_execute("rollback").await.unwrap();
    eventually("the locked product can be changed again", async || {
        system.try_command("product.restock", json!({"id": locked, "quantity": 1})).await.ok()
    })
    .await;
    free.check(&system).await;

    // Without the journal's head, or a table, nothing can be written. All commands are refused, and soon.
    for lock in ["select from journal_head for update", "lock table aggregates in access exclusive mode"] {
        foreign.batch_execute(&format!("begin; {lock}")).await.unwrap();
        let commands = (0..50).map(|_| async {
            let began = Instant::now();
            let failure = system.try_command("product.restock", json!({"id": free.product, "quantity": 1})).await;
            (failure.failure().code, began.elapsed())
        });
        for (code, took) in join_all(commands).await {
            assert_eq!(code, "overloaded", "{lock}");
            assert!(took < Duration::from_secs(6), "{lock}: {took:?}");
        }
        foreign.batch_execute("rollback").await.unwrap();
        eventually("commands are accepted", async || {
            system.try_command("product.restock", json!({"id": free.product, "quantity": 1})).await.ok()
        })
        .await;
    }
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn cuts_of_the_connection_to_nats_delay_no_view_for_long() {
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_PROJECTION_URL")).await;
    let _command = system.command().await;
    let _projection = system.start_projection(&["--nats-url", &proxy.url]);
    let (stopped, counted) = (AtomicBool::new(false), Counted::new(&system).await);
    let cutting = async {
        for cut in 0..12_u64 {
            counted.makes_progress().await;
            proxy.cut();
            let (began, head) = (Instant::now(), system.head().await);
            eventually("all views have reached the head of the time of the cut", async || {
                let checkpoints = journal::checkpoints(&system).await;
                (checkpoints.len() == views::names().len() && checkpoints.values().all(|it| *it >= head)).then_some(())
            })
            .await;
            let took = began.elapsed();
            assert!(took < Duration::from_millis(2_500), "a view needed {took:?} after cut {cut}");
            tokio::time::sleep(Duration::from_millis(37 * cut)).await;
        }
        stopped.store(true, Relaxed);
    };
    tokio::join!(cutting, counted.load(&system, &stopped));
    assert_views_are_journal(&system).await;
}

/// A product that clients restock one piece at a time, without idempotency keys, and the replies that they got.
struct Counted {
    product: domain::Id,
    accepted: AtomicU64,
    /// Requests without a reply, or whose reply says that the outcome is unknown.
    unknown: AtomicU64,
    asked: AtomicU64,
    refused: AtomicU64,
    longest_millis: AtomicU64,
}

impl Counted {
    async fn new(system: &System) -> Self {
        let [accepted, unknown, asked, refused, longest_millis] = std::array::from_fn(|_| AtomicU64::new(0));
        Self { product: system.product(0).await.id, accepted, unknown, asked, refused, longest_millis }
    }

    fn answered(&self) -> u64 {
        self.accepted.load(Relaxed) + self.unknown.load(Relaxed) + self.refused.load(Relaxed)
    }

    /// The longest time that a client has waited for a reply.
    fn longest(&self) -> Duration {
        Duration::from_millis(self.longest_millis.load(Relaxed))
    }

    fn reset_longest(&self) {
        self.longest_millis.store(0, Relaxed);
    }

    /// Lets 16 clients restock the product until told to stop.
    async fn load(&self, system: &System, enough: &AtomicBool) {
        let one_client = async || {
            while !enough.load(Relaxed) {
                let restock = json!({"id": self.product, "quantity": 1});
                let began = Instant::now();
                self.asked.fetch_add(1, Relaxed);
                let reply = system.ask("cmd.product.restock", restock, &[]).await;
                self.longest_millis.fetch_max(u64::try_from(began.elapsed().as_millis()).unwrap(), Relaxed);
                let Err(error) = reply else {
                    self.accepted.fetch_add(1, Relaxed);
                    continue;
                };
                let is_refused = match &error {
                    Error::Unavailable(failure) => !failure.details.contains_key("outcome"),
                    Error::Overloaded(_) => true,
                    other => {
                        assert!(other.failure().is_none(), "{other}");
                        false
                    }
                };
                let counter = if is_refused { &self.refused } else { &self.unknown };
                counter.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        join_all((0..16).map(|_| one_client())).await;
    }

    /// Waits until some more commands are accepted.
    async fn makes_progress(&self) {
        let before = self.accepted.load(Relaxed);
        eventually("commands are accepted", async || (self.accepted.load(Relaxed) > before + 20).then_some(())).await;
    }

    /// Checks that accepted commands happened once, refused ones not at all, and those of unknown outcome at most once.
    async fn check(&self, system: &System) {
        let events = journal::events(system).await;
        let happened = events.iter().filter(|event| event.id == self.product).count() as u64 - 1;
        let (accepted, unknown) = (self.accepted.load(Relaxed), self.unknown.load(Relaxed));
        assert!(
            happened >= accepted && happened <= accepted + unknown,
            "{happened} events, {accepted} accepted and {unknown} unknown commands"
        );
    }

    async fn is_refused_at_once(&self, system: &System) {
        eventually("commands are refused at once", async || {
            let asked = Instant::now();
            let restock = json!({"id": self.product, "quantity": 1});
            let error = system.ask("cmd.product.restock", restock, &[]).await.err()?;
            (matches!(error, Error::Unavailable(_)) && asked.elapsed() < Duration::from_millis(500)).then_some(())
        })
        .await;
    }
}

async fn queries_are_refused_at_once(system: &System) {
    eventually("queries are refused at once", async || {
        let asked = Instant::now();
        let error = system.ask("qry.user.list", json!({}), &[]).await.err()?;
        (matches!(error, Error::Unavailable(_)) && asked.elapsed() < Duration::from_millis(500)).then_some(())
    })
    .await;
}
