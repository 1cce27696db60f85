//! A journal, a stream or views of another history are never taken for ours: PostgreSQL, NATS or MongoDB set back to an
//! older copy, each alone and together, and installations that are mixed up by mistake.

use std::process::Command;

use async_nats::{
    HeaderMap,
    jetstream::{self, stream::Config},
};
use bson::{Document, doc};
use client::Error;
use futures_util::TryStreamExt;
use serde_json::{Value, json};
use tests::{Expect, System, eventually, journal, stays};
use uuid::Uuid;
use views::layout;

use crate::{
    projection::assert_views_are_journal,
    relay::{assert_stream_is_journal, messages},
};

/// The tables of the journal's database, so that each stands behind those that it refers to.
const TABLES: [&str; 6] = ["journal_branches", "journal_head", "events", "aggregates", "claims", "commands"];

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_journal_whose_stream_was_deleted_by_hand_is_refused_by_the_views_until_it_is_branched() {
    let (system, services) = System::complete().await;
    let [command, projection, query] = services;
    system.product(1).await;
    copy(&system).await;
    let lost = [system.product(2).await.id, system.product(3).await.id];
    journal::caught_up(&system).await;
    command.stop().await;
    restore(&system).await;
    let _command = system.command().await;
    let mut made = vec![];
    for stock in [20, 30, 40] {
        made.push(system.product(stock).await.id);
    }
    relay_says(&system, "the stream EVENTS_").await;
    delete_stream(&system).await;
    assert_stream_is_journal(&system).await;

    // The views stand on the second of the lost products, where the stream has the second of the others.
    let said = is_unavailable(&system).await;
    assert!(said.contains(&lost[1].to_string()) && said.contains(&made[1].to_string()), "{said}");
    stays("nothing is written", true, async || journal::checkpoints(&system).await.values().all(|it| *it == 3)).await;
    // A restart changes nothing.
    projection.stop().await;
    query.stop().await;
    let _services = [system.projection().await, system.start_query(&[])];
    system.answers("query").await;
    assert!(is_unavailable(&system).await.contains("does not fit the stream"));

    let shown = eventually("the views are seen to be refused", async || {
        let shown = branch(&system, json!({})).await.unwrap();
        (shown["views"].as_array().unwrap().len() == views::names().len()).then_some(shown)
    })
    .await;
    assert_eq!((&shown["position"], &shown["head"], &shown["foreign_events"]), (&json!(0), &json!(4), &json!(0)));
    // The operator knows that the copy was of position 1.
    let done = confirm(&system, &shown, 1).await.unwrap();
    assert_eq!((&done["done"], &done["parent"]), (&json!(true), &shown["parent"]));
    assert_stream_is_journal(&system).await;
    assert_views_are_journal(&system).await;
    is_served(&system).await;
    let listed = system.read("product.search", json!({"text": "lantern"}), 4).await.data();
    assert_eq!(listed["items"].as_array().unwrap().len(), 4);
    assert!(lost.iter().all(|id| !listed.to_string().contains(&id.to_string())));
}

#[tokio::test(flavor = "multi_thread")]
async fn views_at_the_fork_are_kept_and_those_beyond_are_built_anew() {
    for are_beyond in [false, true] {
        let (system, services) = System::complete().await;
        let [command, projection, _query] = services;
        system.product(1).await;
        journal::caught_up(&system).await;
        copy(&system).await;
        let projection = match are_beyond {
            true => Some(projection),
            false => {
                projection.stop().await;
                None
            }
        };
        for stock in [2, 3] {
            system.product(stock).await;
        }
        assert_stream_is_journal(&system).await;
        if are_beyond {
            journal::caught_up(&system).await;
        }
        leave_witness(&system).await;
        command.stop().await;
        restore(&system).await;
        let _command = system.command().await;
        relay_says(&system, "restored to an older copy").await;
        for stock in [20, 30, 40] {
            system.product(stock).await;
        }

        let shown = branch(&system, json!({})).await.unwrap();
        assert_eq!((&shown["position"], &shown["foreign_events"]), (&json!(1), &json!(2)), "{shown}");
        assert_eq!(shown["events"][0]["event"], "product.created");
        let views = if are_beyond { views::names().len() } else { 0 };
        assert_eq!(shown["views"].as_array().unwrap().len(), views, "{shown}");
        confirm(&system, &shown, 1).await.unwrap();
        assert_stream_is_journal(&system).await;
        let _projection = match projection {
            Some(projection) => projection,
            None => system.projection().await,
        };
        journal::caught_up(&system).await;
        is_served(&system).await;
        assert_eq!(witnesses(&system).await, if are_beyond { 0 } else { views::names().len() });
        if are_beyond {
            assert_views_are_journal(&system).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operation_does_what_was_shown_once_and_can_be_repeated_when_it_was_interrupted() {
    let (system, [command, _projection, _query]) = System::complete().await;
    system.product(1).await;
    copy(&system).await;
    system.product(2).await;
    journal::caught_up(&system).await;
    let nothing = branch(&system, json!({})).await.unwrap();
    assert_eq!((&nothing["position"], &nothing["views"]), (&Value::Null, &json!([])));
    command.stop().await;
    restore(&system).await;
    let command = system.command().await;
    system.product(20).await;
    let shown = branch(&system, json!({})).await.unwrap();
    assert_eq!(shown["position"], 1);

    let parent = &shown["parent"];
    let other = Uuid::now_v7();
    for (request, code) in [
        (json!({"confirm": true}), "malformed"),
        (json!({"confirm": true, "parent": parent, "position": 1}), "malformed"),
        (json!({"confirm": true, "parent": parent, "position": 1, "reason": " "}), "malformed"),
        (json!({"confirm": true, "parent": parent, "position": 2, "reason": "test"}), "malformed"),
        (json!({"confirm": true, "parent": other, "position": 1, "reason": "test"}), "plan_outdated"),
        (json!({"confirm": true, "parent": parent, "position": 1, "reason": "test", "more": 1}), "malformed"),
    ] {
        assert_eq!(branch(&system, request.clone()).await.unwrap_err(), code, "{request}");
    }
    assert_eq!(branches(&system).await.len(), 1);

    // As if the replica had been killed between the two halves.
    let begun = format!(
        "insert into journal_branches (branch, parent, position, reason) values ('{other}', {parent}, 1, 'test');
        update journal_head set branch = '{other}'"
    );
    system.journal().await.batch_execute(&begun.replace('"', "'")).await.unwrap();
    command.stop().await;
    let _command = system.command().await;
    relay_says(&system, "has not come to its end").await;
    let resumed = branch(&system, json!({})).await.unwrap();
    assert_eq!((&resumed["begun"], &resumed["parent"], &resumed["position"]), (&json!(true), parent, &json!(1)));
    for _ in 0..2 {
        let done = confirm(&system, &resumed, 1).await.unwrap();
        assert_eq!(done["branch"], json!(other));
        assert_stream_is_journal(&system).await;
    }
    assert_eq!(branches(&system).await.len(), 2);
    system.product(30).await;
    assert_views_are_journal(&system).await;
    is_served(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_shows_what_it_would_do_and_does_it_if_told_so() {
    let (system, [command, _projection, _query]) = System::complete().await;
    system.product(1).await;
    copy(&system).await;
    system.product(2).await;
    journal::caught_up(&system).await;
    command.stop().await;
    restore(&system).await;
    let _command = system.command().await;
    let operator = system.stack.url("NATS_OPERATOR_URL").to_owned();
    let run = |arguments: &[&str]| {
        let mut command: Command = system.watershed(&[&["journal", "branch"], arguments].concat());
        let output = command.env("NATS_OPERATOR_URL", &operator).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, shown) = run(&[]);
    assert_eq!(code, 1, "{shown}");
    for said in
        ["The journal ends at position 1; the stream ends at 2.", "product.created", "The journal leaves the branch"]
    {
        assert!(shown.contains(said), "{shown}");
    }
    assert_eq!(branches(&system).await.len(), 1);
    let (code, shown) = run(&["--yes", "--reason", "a test", "--actor", "Zoë"]);
    assert_eq!(code, 0, "{shown}");
    assert!(shown.contains("The journal goes on in the branch"), "{shown}");
    assert_eq!(branches(&system).await[1], (1, Some("Zoë".to_owned()), "a test".to_owned()));
    assert_views_are_journal(&system).await;
    let (code, shown) = run(&[]);
    assert!(code == 0 && shown.contains("nothing to do"), "{shown}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_was_set_back_fills_up_again_and_the_views_go_on_by_themselves() {
    let (system, services) = System::complete().await;
    let [command, projection, _query] = services;
    for stock in 1..=3 {
        system.product(stock).await;
    }
    journal::caught_up(&system).await;
    leave_witness(&system).await;
    delete_stream(&system).await;
    system.product(4).await;
    journal::caught_up(&system).await;

    // It has lost its tail while nobody published: the views wait until it has come to where they stand.
    command.stop().await;
    let config = stream(&system).await.cached_info().config.clone();
    let published = messages(&system).await;
    delete_stream(&system).await;
    jetstream::new(system.operator().await).create_stream(config).await.unwrap();
    publish(&system, published.into_iter().take(2), true).await;
    stays("the views are served", true, async || {
        system.ask("qry.product.search", json!({"text": "lantern"}), &[]).await.is_ok()
    })
    .await;
    projection.stop().await;
    let _projection = system.projection().await;
    stays("the views are served", true, async || {
        system.ask("qry.product.search", json!({"text": "lantern"}), &[]).await.is_ok()
    })
    .await;
    let _command = system.command().await;
    let position = system.product(5).await.position;
    system.read("product.search", json!({"text": "lantern"}), position).await.data();
    journal::caught_up(&system).await;
    assert_eq!(witnesses(&system).await, views::names().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_has_less_than_the_views_is_refused_by_them_at_once() {
    let (system, [command, _projection, _query]) = System::complete().await;
    system.product(1).await;
    copy(&system).await;
    system.product(2).await;
    journal::caught_up(&system).await;
    command.stop().await;
    restore(&system).await;
    delete_stream(&system).await;
    // The stream is made anew, shorter than the views, and nothing is recorded that would show the difference.
    let _command = system.command().await;
    assert_stream_is_journal(&system).await;
    let said = is_unavailable(&system).await;
    assert!(said.contains("the journal had only 1 events when the stream"), "{said}");
    let shown = eventually("the views are seen to be refused", async || {
        let shown = branch(&system, json!({})).await.unwrap();
        (shown["views"].as_array().unwrap().len() == views::names().len()).then_some(shown)
    })
    .await;
    confirm(&system, &shown, shown["position"].as_u64().unwrap()).await.unwrap();
    assert_views_are_journal(&system).await;
    is_served(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_another_journal_is_refused_by_relay_and_views_until_it_is_gone() {
    let (system, _services) = System::complete().await;
    system.product(1).await;
    journal::caught_up(&system).await;
    leave_witness(&system).await;
    let config = stream(&system).await.cached_info().config.clone();
    let ours = config.metadata["journal"].clone();
    let theirs = Uuid::now_v7().to_string();
    let text = |text: String| text.replace(&ours, &theirs);
    let metadata = config.metadata.clone().into_iter().map(|(name, value)| (name, text(value))).collect();
    let operator = jetstream::new(system.operator().await);
    // The relay may be first to make the stream again.
    eventually("the stream is another's", async || {
        let _ = operator.delete_stream(system.stream()).await;
        operator.create_stream(Config { metadata: Clone::clone(&metadata), ..config.clone() }).await.ok()
    })
    .await;
    relay_says(&system, &theirs).await;
    let said = is_unavailable(&system).await;
    assert!(said.contains(&ours) && said.contains(&theirs), "{said}");
    assert_eq!(branch(&system, json!({})).await.unwrap_err(), "another_journal");

    delete_stream(&system).await;
    assert_stream_is_journal(&system).await;
    is_served(&system).await;
    assert_eq!(witnesses(&system).await, views::names().len());
}

#[tokio::test(flavor = "multi_thread")]
async fn views_that_were_set_back_catch_up() {
    let (system, [_command, projection, _query]) = System::complete().await;
    system.product(1).await;
    journal::caught_up(&system).await;
    projection.stop().await;
    let views = system.views().await;
    let names: Vec<String> = views.list_collection_names().await.unwrap();
    let copied = |name: &str| format!("copy of {name}");
    let copy = async |from: &str, to: &str| {
        let copied = views.collection::<Document>(from).aggregate([doc! { "$out": to }]).await.unwrap();
        copied.try_collect::<Vec<_>>().await.unwrap();
    };
    for name in &names {
        copy(name, &copied(name)).await;
    }
    let projection = system.projection().await;
    system.product(2).await;
    journal::caught_up(&system).await;
    projection.stop().await;
    for name in &names {
        copy(&copied(name), name).await;
    }
    let _projection = system.projection().await;
    assert_views_are_journal(&system).await;
    is_served(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_is_pointed_at_another_s_stream_leaves_it_alone() {
    let (first, _services) = System::complete().await;
    first.product(1).await;
    journal::caught_up(&first).await;
    let second = System::new().await;
    let _command = second.command_with(&["--stream", &first.stream()]).await;
    second.product(2).await;
    second.product(3).await;
    let said = eventually("the relay refuses the stream", async || relay_reason(&second).await).await;
    assert!(said.contains("names another installation's"), "{said}");
    assert_eq!(branch(&second, json!({})).await.unwrap_err(), "another_journal");
    assert_stream_is_journal(&first).await;
    is_served(&first).await;

    // Its views are of its own journal.
    let _own = second.command().await;
    let projection = second.projection().await;
    journal::caught_up(&second).await;
    projection.stop().await;
    let _query = second.query().await;
    let _projection = second.start_projection(&["--stream", &first.stream()]);
    let said = is_unavailable(&second).await;
    assert!(said.contains("may name another installation's"), "{said}");
    assert_eq!(journal::checkpoints(&second).await.values().max(), Some(&2));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_installation_that_is_pointed_at_another_s_views_leaves_them_alone() {
    let (first, _services) = System::complete().await;
    first.product(1).await;
    journal::caught_up(&first).await;
    let second = System::new().await;
    let log = first.stack.directory().join(format!("{}-mistaken.log", second.prefix));
    // It is there before its stream is.
    let mistaken = second.logged_process("projection", &["--database", &first.prefix], &log);
    let _command = second.command().await;
    second.product(2).await;
    eventually("the mistake is logged", async || {
        let text = std::fs::read_to_string(&log).unwrap();
        text.contains("the views are of another journal than the stream, this replica leads none").then_some(())
    })
    .await;
    first.product(3).await;
    assert_views_are_journal(&first).await;
    stays("the views are served", true, async || {
        first.ask("qry.product.search", json!({"text": "lantern"}), &[]).await.is_ok()
    })
    .await;
    drop(mistaken);
}

#[tokio::test(flavor = "multi_thread")]
async fn data_from_before_there_were_branches_are_taken_over() {
    let (system, [command, projection, _query]) = System::complete().await;
    for stock in 1..=3 {
        system.product(stock).await;
    }
    journal::caught_up(&system).await;
    projection.stop().await;
    command.stop().await;
    leave_witness(&system).await;
    let checkpoints = system.views().await.collection::<Document>(layout::CHECKPOINTS);
    checkpoints.update_many(doc! {}, doc! { "$unset": { "event": "", "branch": "" } }).await.unwrap();
    let config = stream(&system).await.cached_info().config.clone();
    let published = messages(&system).await;
    delete_stream(&system).await;
    let former = Config { metadata: Default::default(), ..config };
    jetstream::new(system.operator().await).create_stream(former).await.unwrap();
    publish(&system, published.into_iter(), false).await;

    let command = system.command().await;
    let _projection = system.projection().await;
    let position = system.product(4).await.position;
    system.read("product.search", json!({"text": "lantern"}), position).await.data();
    journal::caught_up(&system).await;
    assert_eq!(witnesses(&system).await, views::names().len());
    // The new events have a branch, and so have the checkpoints now.
    let stored = checkpoints.find_one(doc! { "event": { "$exists": false } }).await.unwrap();
    assert_eq!(stored, None);

    // Such a stream can be left, too.
    let copied = copy(&system);
    copied.await;
    system.product(5).await;
    journal::caught_up(&system).await;
    command.stop().await;
    restore(&system).await;
    let _command = system.command().await;
    system.product(50).await;
    let shown = branch(&system, json!({})).await.unwrap();
    assert_eq!(shown["position"], 4, "{shown}");
    confirm(&system, &shown, 4).await.unwrap();
    system.product(60).await;
    assert_views_are_journal(&system).await;
    is_served(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_under_load_can_be_branched() {
    let (system, _services) = System::complete().await;
    let product = system.product(0).await.id;
    let load = async {
        for _ in 0..400 {
            system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
        }
    };
    let branching = async {
        eventually("the load has begun", async || (system.head().await > 50).then_some(())).await;
        let shown = branch(&system, json!({})).await.unwrap();
        confirm(&system, &shown, 50).await.unwrap();
    };
    tokio::join!(load, branching);
    assert_stream_is_journal(&system).await;
    assert_views_are_journal(&system).await;
    is_served(&system).await;
    let branches: Vec<_> = messages(&system).await.iter().map(|it| it.headers.clone().unwrap()).collect();
    let branch_at = |position: usize| branches[position - 1].get(wire::BRANCH).unwrap().clone();
    assert_eq!(branch_at(1), branch_at(50));
    assert_ne!(branch_at(50), branch_at(51));
    assert_eq!(branch_at(51), branch_at(401));
}

/// Copies the journal's database, as `pg_dump` would.
async fn copy(system: &System) {
    let copy = TABLES.map(|table| format!("create table copy_{table} as table {table};")).concat();
    system.journal().await.batch_execute(&copy).await.unwrap();
}

/// Sets the journal's database back to the copy.
async fn restore(system: &System) {
    let clear: String = TABLES.iter().rev().map(|table| format!("delete from {table};")).collect();
    let fill = TABLES.map(|table| format!("insert into {table} overriding system value table copy_{table};")).concat();
    system.journal().await.batch_execute(&format!("begin;{clear}{fill}commit")).await.unwrap();
}

/// The branches of the journal: position, actor, reason.
async fn branches(system: &System) -> Vec<(i64, Option<String>, String)> {
    let statement = "select position, actor, reason from journal_branches order by number";
    let rows = system.journal().await.query(statement, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect()
}

async fn stream(system: &System) -> jetstream::stream::Stream {
    jetstream::new(system.operator().await).get_stream(system.stream()).await.unwrap()
}

async fn delete_stream(system: &System) {
    jetstream::new(system.operator().await).delete_stream(system.stream()).await.unwrap();
}

/// Publishes messages again, with or without the header of branches.
async fn publish(system: &System, messages: impl Iterator<Item = jetstream::Message>, with_branch: bool) {
    let relay = jetstream::new(system.relay_user().await);
    for message in messages {
        let (async_nats::Message { subject, headers, payload, .. }, _) = message.split();
        let mut kept = HeaderMap::new();
        for (name, values) in headers.unwrap().iter() {
            let name: &str = name.as_ref();
            if with_branch || name != wire::BRANCH {
                values.iter().for_each(|value| kept.append(name, value.clone()));
            }
        }
        relay.publish_with_headers(subject, kept, payload).await.unwrap().await.unwrap();
    }
}

/// Sends the operation, and returns its reply or the code of its failure.
async fn branch(system: &System, request: Value) -> Result<Value, String> {
    let subject = system.subjects.operation("journal", "branch");
    let reply = system.operator().await.request(subject, request.to_string().into()).await.unwrap();
    let reply: Value = serde_json::from_slice(&reply.payload).unwrap();
    match &reply["error"]["code"] {
        Value::String(code) => Err(code.clone()),
        _ => Ok(reply),
    }
}

/// Confirms what was shown.
async fn confirm(system: &System, shown: &Value, position: u64) -> Result<Value, String> {
    let request = json!({"confirm": true, "parent": shown["parent"], "position": position, "reason": "test"});
    branch(system, request).await
}

/// Waits until a query is refused because of the view, and returns what it is told.
async fn is_unavailable(system: &System) -> String {
    eventually("the view is not served", async || {
        match system.ask("qry.product.search", json!({"text": "lantern"}), &[]).await {
            Err(Error::Unavailable(failure)) if !failure.message.contains("views' database") => Some(failure.message),
            _ => None,
        }
    })
    .await
}

/// Waits until all views can be queried.
async fn is_served(system: &System) {
    for (_, query) in views::queries() {
        let example: Value = serde_json::from_str(query.examples[0]).unwrap();
        eventually("the view is served", async || {
            let answer = system.ask(&format!("qry.{}", query.name()), example.clone(), &[]).await;
            matches!(answer, Ok(_) | Err(Error::NotFound(_))).then_some(())
        })
        .await;
    }
}

/// Leaves a document in each view, by which it can be told from one that was built anew.
async fn leave_witness(system: &System) {
    for view in views::names() {
        let documents = system.views().await.collection(&layout::collection(view, 1));
        documents.insert_one(doc! { "_id": "witness" }).await.unwrap();
    }
}

/// How many views still have it.
async fn witnesses(system: &System) -> usize {
    let (views, mut count) = (system.views().await, 0);
    for collection in journal::serving(system).await.values() {
        let documents = views.collection::<Document>(collection);
        count += usize::from(documents.find_one(doc! { "_id": "witness" }).await.unwrap().is_some());
    }
    count
}

/// Why the relay publishes nothing.
async fn relay_reason(system: &System) -> Option<String> {
    let stats = system.all_stats().await;
    let problems =
        stats.iter().filter(|stats| stats["name"] == "command").map(|stats| stats["data"]["problems"].to_string());
    problems.into_iter().find(|problems| problems.contains("relay"))
}

async fn relay_says(system: &System, text: &str) {
    eventually(text, async || relay_reason(system).await?.contains(text).then_some(())).await;
}
