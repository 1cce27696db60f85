//! Events and states that other versions of the program wrote: older schemas are read, states of another form are
//! folded anew from their events and stored, and what only a newer program can read is refused without harm.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    time::Instant,
};

use domain::{Id, State};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tests::{Expect, System, http, journal};
use tokio_postgres::error::SqlState;

/// What the program before wrote, on the tables of its migrations.
const TABLES: [&str; 2] = [
    include_str!("../../services/command/migrations/0001_journal.sql"),
    include_str!("../../services/command/migrations/0002_identity.sql"),
];
const ROWS: &str = include_str!("form_1.sql");

/// As if a program of another version had stored all states, as they are now, in its own form.
const REWRITE: &str = "update aggregates set form = 99, state = '{\"of\":\"another program\"}'";

/// Identifiers in `ROWS`.
fn id(n: u32) -> Id {
    format!("01800000-0000-7000-8000-{n:012}").parse().unwrap()
}

/// The states that the events lead to, with their versions.
async fn folded(system: &System) -> BTreeMap<Id, (u64, State)> {
    let mut states: BTreeMap<Id, (u64, State)> = BTreeMap::new();
    for recorded in journal::events(system).await {
        let before = states.remove(&recorded.id).map(|(_, state)| state);
        let after = State::evolve(before, &recorded.event).unwrap();
        states.insert(recorded.id, (recorded.version, after));
    }
    states
}

/// The stored states that this program reads, and the identifiers of the others.
async fn stored(system: &System) -> (BTreeMap<Id, (u64, State)>, Vec<Id>) {
    let statement = "select id, version, kind, form, state::text from aggregates order by id";
    let rows = system.journal().await.query(statement, &[]).await.unwrap();
    let (mut current, mut others) = (BTreeMap::new(), Vec::new());
    for row in rows {
        let (id, version) = (Id(row.get(0)), u64::try_from(row.get::<_, i64>(1)).unwrap());
        match State::decode(row.get(2), row.get(3), row.get::<_, &str>(4).as_bytes()) {
            Ok(state) => drop(current.insert(id, (version, state))),
            Err(_) => others.push(id),
        }
    }
    (current, others)
}

async fn refused(system: &System, name: &str, body: Value) -> Value {
    let failure = system.try_command(name, body).await.failure();
    json!([failure.code, failure.details])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_program_before_wrote_is_read_and_goes_on() {
    let system = System::new().await;
    let database = system.journal().await;
    for statements in TABLES.into_iter().chain([ROWS]) {
        database.batch_execute(statements).await.unwrap();
    }
    let metrics = http::free_address();
    let command = system.command_with(&["--metrics-address", &metrics.to_string()]).await;
    let _replicas = [command, system.projection().await, system.query().await];

    // What form 1 of a cancelled order did not say, its events do.
    for (order, refund_due) in [(24, false), (25, true)] {
        let details =
            json!({"order": id(order), "status": "cancelled", "allowed": ["placed"], "refund_due": refund_due});
        assert_eq!(refused(&system, "order.pay", json!({"id": id(order)})).await, json!(["wrong_status", details]));
    }
    // The products of an order of form 1 are known, too.
    let cancelled = system.accept("order.cancel", json!({"id": id(21), "reason": "Ordered twice."})).await;
    assert_eq!(cancelled.version, 2);
    system.accept("order.ship", json!({"id": id(22)})).await;
    system.accept("order.delete", json!({"id": id(23)})).await;
    assert_eq!(refused(&system, "order.pay", json!({"id": id(26)})).await[0], "order_not_found");
    // The form of users and products is still the first.
    system.accept("product.restock", json!({"id": id(11), "quantity": 4})).await;
    let hopper = json!({"email": "HOPPER@example.com", "name": "Grace"});
    assert_eq!(refused(&system, "user.register", hopper).await[0], "email_taken");
    system.accept("user.register", json!({"email": "bob@example.com", "name": "Bob"})).await;

    let shown = http::get(metrics, "/metrics").await.unwrap().1;
    assert!(shown.contains("\nwatershed_states_folded_total 6\n"), "each of the orders once\n{shown}");
    let (current, others) = stored(&system).await;
    assert_eq!(others, [id(27)], "only the order that no command named is stored as it was");
    let mut expected = folded(&system).await;
    expected.remove(&id(27));
    assert_eq!(current, expected);
    let schemas = "select position, schema, payload->>'reason' from events where type = 'cancelled' order by position";
    let schemas: Vec<(i64, i16, Option<String>)> =
        database.query(schemas, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    let reason = Some("Ordered twice.".to_owned());
    assert_eq!(schemas, [(29, 1, None), (31, 1, None), (33, 1, None), (36, 2, reason)]);

    let events = journal::events(&system).await;
    journal::check(&events);
    journal::caught_up(&system).await;
    assert_eq!(journal::stored(&system).await, journal::fold(&events));
    let position = system.head().await;
    for (order, status, refund_due) in [(21, "cancelled", false), (24, "cancelled", false), (25, "cancelled", true)] {
        let order = system.read("order.get", json!({"id": id(order)}), position).await.data();
        assert_eq!((&order["status"], &order["refund_due"]), (&json!(status), &json!(refund_due)), "{order}");
    }
    let product = system.read("product.get", json!({"id": id(11)}), position).await.data();
    assert_eq!(product["stock"], 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_of_another_form_or_that_cannot_be_read_is_folded_anew_and_stored_whatever_becomes_of_the_command() {
    let system = System::new().await;
    let command = system.command().await;
    system.send_samples().await;
    command.stop().await;
    let database = system.journal().await;
    let expected = folded(&system).await;
    let claims = "select string_agg(scope || value || id, ' ' order by scope, value) from claims";
    let claimed: Option<String> = database.query_one(claims, &[]).await.unwrap().get(0);
    for rewrite in [
        REWRITE,
        "update aggregates set form = 0, state = '{}'",
        "update aggregates set form = form - 1",
        "update aggregates set state = '{\"status\":\"lost\"}'",
        "update aggregates set state = '[]'",
    ] {
        database.batch_execute(rewrite).await.unwrap();
        assert!(stored(&system).await.0.is_empty(), "{rewrite}");
        let _command = system.command().await;
        // Each is refused: the identifiers are in use, or the orders have had it.
        let reuse = |id: &Id| {
            let price = json!({"amount": 1, "currency": "EUR"});
            system.try_command("product.create", json!({"id": id, "sku": "NEW", "name": "New", "price": price}))
        };
        for reply in join_all(expected.keys().map(reuse)).await {
            assert_eq!(reply.code(), "id_taken");
        }
        assert_eq!(stored(&system).await, (expected.clone(), vec![]), "{rewrite}");
    }
    assert_eq!(database.query_one(claims, &[]).await.unwrap().get::<_, Option<String>>(0), claimed);
    assert_eq!(journal::events(&system).await.len() as u64, system.head().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aggregate_with_100_000_events_is_folded_anew_while_others_are_served() {
    let system = System::new().await;
    let command = system.command().await;
    let (product, other) = (system.product(1).await.id, system.product(1_000).await.id);
    command.stop().await;
    let many = format!(
        "insert into events (position, aggregate, id, version, type, schema, payload, at)
            select n + 1, 'product', '{product}', n, 'restocked', 1,
                json_build_object('quantity', 1, 'stock', n), now()
            from generate_series(2, 100000) n;
        update aggregates set version = 100000, form = 99 where id = '{product}';
        update journal_head set position = 100001"
    );
    system.journal().await.batch_execute(&many).await.unwrap();
    let _command = system.command_with(&["--lanes", "2"]).await;
    let done = AtomicBool::new(false);
    let restock = || system.accept("product.restock", json!({"id": product, "quantity": 1}));
    let first = async {
        let sent = Instant::now();
        assert_eq!(restock().await.version, 100_001);
        done.store(true, Relaxed);
        sent.elapsed()
    };
    let meanwhile = async {
        let mut served = 0;
        while !done.load(Relaxed) {
            system.accept("product.restock", json!({"id": other, "quantity": 1})).await;
            served += 1;
        }
        served
    };
    let (first, served) = tokio::join!(first, meanwhile);
    assert!(served > 5, "another lane goes on: {served}");
    // From now on, only events that are new are read.
    let sent = Instant::now();
    for version in 100_002..=100_005 {
        system.journal().await.batch_execute(REWRITE).await.unwrap();
        assert_eq!(restock().await.version, version);
    }
    assert!(sent.elapsed() < first, "{:?} for all, {first:?} for the first", sent.elapsed());
    let state = "select state->>'stock' from aggregates where id = $1";
    let stock: String = system.journal().await.query_one(state, &[&product.0]).await.unwrap().get(0);
    assert_eq!(stock, "100005");
}

/// A newer program stores states of its own form all the time, and so does this one.
#[tokio::test(flavor = "multi_thread")]
async fn two_versions_that_write_the_same_aggregates_at_once_do_not_disturb_each_other() {
    let system = System::new().await;
    let _replicas = [system.command().await, system.command().await];
    let user = system.user().await.id;
    let products = join_all((0..5).map(|_| system.product(10_000))).await;
    let (done, times) = (AtomicBool::new(false), AtomicUsize::new(0));
    let newer = async {
        let database = system.journal().await;
        while !done.load(Relaxed) {
            // In the order in which all lanes lock.
            let rewrite = format!("begin; select from aggregates order by id for update; {REWRITE}; commit");
            match database.batch_execute(&rewrite).await {
                Ok(()) => times.fetch_add(1, Relaxed),
                // A batch that knows its states already locks them in another order. Whoever loses tries again.
                Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => {
                    database.batch_execute("rollback").await.unwrap();
                    continue;
                }
                Err(error) => panic!("{error}"),
            };
        }
    };
    let older = async {
        let mut rounds = 0;
        while rounds < 20 || times.load(Relaxed) < 20 {
            rounds += 1;
            let orders = (0..20).map(|n| {
                let lines: Vec<_> =
                    products.iter().skip(n % 4).map(|it| json!({"product": it.id, "quantity": 1})).collect();
                system.accept("order.create", json!({"user": user, "lines": lines}))
            });
            let orders = join_all(orders).await;
            join_all(orders.iter().step_by(2).map(|order| system.accept("order.cancel", json!({"id": order.id}))))
                .await;
        }
        done.store(true, Relaxed);
    };
    tokio::join!(newer, older);
    let events = journal::events(&system).await;
    journal::check(&events);
    // Every state is touched once more, so that this program stores it.
    for id in folded(&system).await.into_keys() {
        let price = json!({"amount": 1, "currency": "EUR"});
        let taken =
            system.try_command("product.create", json!({"id": id, "sku": "N", "name": "N", "price": price})).await;
        assert_eq!(taken.code(), "id_taken");
    }
    assert_eq!(stored(&system).await, (folded(&system).await, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_only_a_newer_program_can_read_is_refused_and_nothing_else_is() {
    let system = System::new().await;
    let _command = system.command_with(&["--lanes", "1"]).await;
    let user = system.user().await.id;
    let [product, other] = [system.product(10).await.id, system.product(10).await.id];
    let database = system.journal().await;
    let append = async |schema: i16, version: i64, payload: &str| {
        let position = i64::try_from(system.head().await).unwrap() + 1;
        let statements = format!(
            "begin;
            insert into events (position, aggregate, id, version, type, schema, payload, at)
                values ({position}, 'product', '{product}', {version}, 'restocked', {schema}, '{payload}', now());
            update aggregates set version = {version}, form = 99, state = '{{}}' where id = '{product}';
            update journal_head set position = {position};
            commit"
        );
        database.batch_execute(&statements).await.unwrap();
    };
    // A newer form of which this program can read all events.
    append(1, 2, r#"{"quantity":5,"stock":15}"#).await;
    assert_eq!(system.accept("product.restock", json!({"id": product, "quantity": 1})).await.version, 3);
    // And one with an event that it cannot read.
    append(2, 4, r#"{"quantity":4,"stock":20,"shelf":"B7"}"#).await;
    let before = stored(&system).await;
    let lines =
        |products: &[Id]| -> Vec<Value> { products.iter().map(|it| json!({"product": it, "quantity": 1})).collect() };
    let order = |products: &[Id]| system.try_command("order.create", json!({"user": user, "lines": lines(products)}));
    let key = [("Nats-Msg-Id", "sent-while-two-versions-run")];
    let restock = json!({"id": product, "quantity": 1});
    let (ordered, both, restocked, deleted) = tokio::join!(
        join_all((0..5).map(|_| order(&[other]))),
        order(&[other, product]),
        system.ask("cmd.product.restock", restock.clone(), &key),
        system.try_command("product.delete", json!({"id": product})),
    );
    ordered.into_iter().for_each(|reply| assert_eq!(reply.accepted().version, 1));
    for reply in [both, restocked, deleted] {
        let failure = reply.failure();
        assert_eq!(
            (&*failure.code, &failure.details["kind"], &failure.details["id"]),
            ("unavailable", &json!("product"), &json!(product))
        );
        assert!(failure.message.contains("nothing was changed"), "{}", failure.message);
    }
    let after = stored(&system).await;
    assert_eq!((&before.1, &after.1), (&vec![product], &vec![product]), "it is as the newer program left it");

    // A replica of the newer program could read it; here, it is as if the event were of the first schema.
    let learnt = r#"
        update events
        set schema = 1, payload = '{"quantity":4,"stock":20}'
        where schema = 2 and type = 'restocked'"#;
    database.execute(learnt, &[]).await.unwrap();
    for _ in 0..2 {
        assert_eq!(system.ask("cmd.product.restock", restock.clone(), &key).await.accepted().version, 5);
    }
    assert_eq!(stored(&system).await, (folded(&system).await, vec![]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_aggregate_whose_events_are_broken_or_missing_fails_alone() {
    let system = System::new().await;
    let command = system.command().await;
    let [broken, missing, intact] =
        [system.product(10).await.id, system.product(10).await.id, system.product(10).await.id];
    command.stop().await;
    let statements = format!(
        "update events set payload = '{{}}' where id = '{broken}';
        update aggregates set version = 2 where id = '{missing}';
        {REWRITE}"
    );
    system.journal().await.batch_execute(&statements).await.unwrap();
    let _command = system.command_with(&["--lanes", "1"]).await;
    let restock = |id: Id| system.try_command("product.restock", json!({"id": id, "quantity": 1}));
    let replies = join_all([broken, intact, missing].map(restock)).await;
    let [broken, intact, missing] = replies.try_into().ok().unwrap();
    assert_eq!(intact.accepted().version, 2);
    assert_eq!([broken.code(), missing.code()], ["internal", "internal"]);
}
