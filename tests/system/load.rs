//! Many clients at once: no stock is sold twice, replicas keep the journal consistent, and nobody waits for ever.

use std::{
    future::IntoFuture,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use client::Error;
use domain::{
    Id,
    order::{self, RequestedLine},
};
use futures_util::future::join_all;
use serde_json::json;
use tests::{Expect, System, eventually, journal};
use wire::Accepted;

#[tokio::test(flavor = "multi_thread")]
async fn of_64_clients_that_order_the_last_10_pieces_10_get_one() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let (user, product) = (system.user().await.id, system.product(10).await.id);
    let clients = join_all((0..64).map(|_| system.connect_as("NATS_URL"))).await;

    let lines = vec![RequestedLine { product, quantity: 1, unit_price: None }];
    let order = order::Create { id: Id::default(), user, lines, placed_at: None };
    let replies = join_all(clients.iter().map(|client| client.command(&order).into_future())).await;

    let (sold, refused): (Vec<_>, Vec<_>) = replies.into_iter().partition(|reply| reply.is_ok());
    assert_eq!(sold.len(), 10);
    for refusal in refused {
        let Err(Error::Rejected(failure)) = refusal else { panic!("{refusal:?}") };
        assert_eq!((failure.status, &*failure.code), (422, "out_of_stock"));
        assert_eq!(failure.details["available"], 0, "all pieces are sold");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_under_mixed_load_keep_the_journal_and_the_stream_consistent() {
    let system = System::new().await;
    let replicas = [system.command().await, system.command_with(&["--lanes", "2"]).await];
    mixed_load(&system, 32, 40).await;

    let events = journal::events(&system).await;
    journal::check(&events);
    super::relay::assert_stream_is_journal(&system).await;
    for replica in replicas {
        replica.stop().await;
    }
}

/// Each replica decides on cached states, which are stale as soon as the other has written. No reply may show that.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_cache_leads_to_no_wrong_reply() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let (user, product) = (system.user().await.id, system.product(0).await.id);
    let order = json!({"user": user, "lines": [{"product": product, "quantity": 1}]});
    for round in 0..150 {
        // The replica that gets this has cached the product as sold out, or as it was some rounds ago.
        system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
        system.accept("order.create", order.clone()).await;
        let refused = system.try_command("order.create", order.clone()).await.failure().clone();
        assert_eq!((&*refused.code, &refused.details["available"]), ("out_of_stock", &json!(0)), "round {round}");
    }
    system.accept("product.restock", json!({"id": product, "quantity": 9})).await;
    system.accept("user.delete", json!({"id": user})).await;
    for _ in 0..9 {
        assert_eq!(system.try_command("order.create", order.clone()).await.code(), "user_not_found");
    }
    let events = journal::events(&system).await;
    journal::check(&events);
    assert_eq!(events.len(), 2 + 3 * 150 + 2);
}

/// PostgreSQL plans statements while the tables are small, and keeps the plans while they grow.
#[tokio::test(flavor = "multi_thread")]
async fn no_command_reads_a_whole_table() {
    let system = System::new().await;
    let _command = system.command().await;
    mixed_load(&system, 1, 40).await;
    let journal = system.journal().await;
    // The server does this by itself now and then, and plans again afterwards.
    journal.batch_execute("analyze aggregates, claims, commands, events").await.unwrap();
    mixed_load(&system, 16, 20).await;
    let statement = "select relname::text, seq_tup_read, idx_tup_fetch from pg_stat_user_tables \
        where relname in ('aggregates', 'claims', 'commands', 'events')";
    let read = eventually("the server has published its statistics", async || {
        // The server publishes them once a second, when a transaction ends.
        system.product(1).await;
        let rows = journal.query(statement, &[]).await.unwrap();
        let read: Vec<(String, i64, Option<i64>)> =
            rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
        read.iter().any(|(table, _, by_key)| table == "aggregates" && *by_key > Some(200)).then_some(read)
    })
    .await;
    for (table, read, by_key) in read {
        assert_eq!(read, 0, "{table} was scanned; {by_key:?} rows were read by key");
    }
}

/// Lets this many clients send this many commands of all kinds each, which touch the same few products and users.
/// Checks that every reply accepts the command or refuses it for a business reason, and that every accepted command is
/// in the journal.
pub async fn mixed_load(system: &System, clients: usize, commands: usize) -> Vec<Accepted> {
    let mut products = Vec::new();
    let mut users = Vec::new();
    for _ in 0..6 {
        products.push(system.product(200).await.id);
        users.push(system.user().await.id);
    }
    let (products, users) = (&products, &users);
    let one_client = async |client: usize| {
        let mut accepted = Vec::new();
        let mut mine = Vec::new();
        for n in 0..commands {
            let (a, b) = (products[(client + n) % 6], products[(client * 5 + n * 3 + 1) % 6]);
            let user = users[(client + n / 2) % 6];
            let (name, body) = match (n % 8, mine.pop()) {
                (3, Some(order)) => ("order.cancel", json!({"id": order})),
                (5, Some(order)) => {
                    mine.push(order);
                    ("order.pay", json!({"id": order}))
                }
                (6, _) => {
                    ("product.restock", json!({"id": a, "quantity": if client.is_multiple_of(2) { 7 } else { -7 }}))
                }
                (7, _) => ("user.update", json!({"id": user, "name": format!("Ada {client} {n}")})),
                (_, order) => {
                    mine.extend(order);
                    let lines = json!([{"product": a, "quantity": 1 + n % 4}, {"product": b, "quantity": 2}]);
                    ("order.create", json!({"user": user, "lines": lines}))
                }
            };
            let reply = system.try_command(name, body).await;
            match &reply {
                Ok(_) => {
                    let reply = reply.accepted();
                    if name == "order.create" {
                        mine.push(reply.id);
                    }
                    accepted.push(reply);
                }
                Err(error) => assert!(matches!(error, Error::Rejected(_)), "{name}: {error}"),
            }
        }
        accepted
    };
    let accepted: Vec<Accepted> = join_all((0..clients).map(one_client)).await.into_iter().flatten().collect();
    let events = journal::events(system).await;
    for accepted in &accepted {
        let in_time = &events[..usize::try_from(accepted.position).unwrap()];
        let there = in_time.iter().any(|event| (event.id, event.version) == (accepted.id, accepted.version));
        assert!(there, "{accepted:?} is not in the journal at its position or before");
    }
    accepted
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_exceed_the_queue_are_refused_at_once() {
    let system = System::new().await;
    let _command = system.command_with(&["--queue-commands", "8", "--batch-commands", "4"]).await;
    let product = system.product(0).await.id;
    let (accepted, overloaded) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    eventually("the queue is full", async || {
        join_all((0..500).map(|_| async {
            let reply = system.try_command("product.restock", json!({"id": product, "quantity": 1})).await;
            match reply {
                Ok(_) => accepted.fetch_add(1, Relaxed),
                Err(error) => {
                    assert!(matches!(error, Error::Overloaded(_)), "{error}");
                    overloaded.fetch_add(1, Relaxed)
                }
            }
        }))
        .await;
        (overloaded.load(Relaxed) > 0).then_some(())
    })
    .await;
    let accepted = accepted.load(Relaxed);
    assert!(accepted > 0);
    assert_eq!(journal::events(&system).await.len(), 1 + accepted, "refused commands changed nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_is_stopped_under_load_answers_all_requests_it_has_taken() {
    let system = System::new().await;
    let mut stopping = system.process("command", &[]);
    system.answers("command").await;
    let product = system.product(0).await.id;
    let (accepted, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let clients = join_all((0..64).map(|_| async {
        loop {
            let restock = json!({"id": product, "quantity": 1});
            match system.ask("cmd.product.restock", restock, &[]).await {
                Ok(_) => {
                    accepted.fetch_add(1, Relaxed);
                }
                // If the last replica is gone, the server says so at once. A timeout would mean a lost request.
                Err(Error::Unavailable(_) | Error::NoResponders(_)) => break,
                Err(error) => panic!("{error}"),
            }
        }
        done.fetch_add(1, Relaxed);
    }));
    let stop = async {
        eventually("the load runs", async || (accepted.load(Relaxed) > 500).then_some(())).await;
        stopping.signal("TERM");
        eventually("the service has ended", async || stopping.has_ended().then_some(())).await;
    };
    tokio::join!(clients, stop);
    assert_eq!(done.load(Relaxed), 64);
    assert_eq!(
        journal::events(&system).await.len(),
        1 + accepted.load(Relaxed),
        "exactly the accepted commands are in the journal"
    );
}
