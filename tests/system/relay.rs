//! The relay: the stream holds the journal's events at the journal's positions, whatever is stopped, killed or deleted.

use std::time::Duration;

use async_nats::jetstream::{self, consumer::pull::OrderedConfig, stream::Stream};
use domain::Recorded;
use futures_util::{StreamExt, future::join_all};
use serde_json::json;
use tests::{System, eventually, journal, stays};
use wire::decode_event;

use crate::{load::mixed_load, projection::assert_views_are_journal};

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_killed_and_its_successor_neither_lose_nor_duplicate_events() {
    let system = System::new().await;
    let first = system.process("command", &[]);
    system.answers("command").await;
    let product = system.product(0).await.id;
    let _second = system.command().await;
    let load = async {
        for _ in 0..60 {
            join_all((0..32).map(|_| system.ask("cmd.product.restock", json!({"id": product, "quantity": 1}), &[])))
                .await;
        }
    };
    let kill = async {
        eventually("some events are in the journal", async || (system.head().await > 300).then_some(())).await;
        first.kill();
    };
    // Requests that the killed replica had taken are never answered, so the load may not come to an end.
    let _ = tokio::time::timeout(Duration::from_secs(20), async { tokio::join!(load, kill) }).await;
    assert!(system.head().await > 300);
    journal::check(&journal::events(&system).await);
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_deleted_while_running_fills_up_again_identically() {
    let system = System::new().await;
    let _command = system.command().await;
    let operator = jetstream::new(system.operator().await);
    let (load, ()) = tokio::join!(mixed_load(&system, 8, 40), async {
        for position in [50, 150] {
            eventually("some events are in the journal", async || (system.head().await > position).then_some(())).await;
            // The stream may not have been created again yet.
            let _ = operator.delete_stream(system.stream()).await;
        }
    });
    assert!(!load.is_empty());
    assert_stream_is_journal(&system).await;

    operator.delete_stream(system.stream()).await.unwrap();
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_lost_its_tail_is_completed() {
    let system = System::new().await;
    let command = system.command().await;
    let operator = jetstream::new(system.operator().await);
    system.product(5).await;
    assert_stream_is_journal(&system).await;
    // A power cut can set the stream back to an earlier state.
    let events = messages(&system).await;
    for _ in 0..20 {
        system.user().await;
    }
    assert_stream_is_journal(&system).await;
    command.stop().await;
    operator.delete_stream(system.stream()).await.unwrap();
    let config = jetstream::stream::Config {
        name: system.stream(),
        subjects: vec![system.subjects.events()],
        allow_atomic_publish: true,
        ..Default::default()
    };
    operator.create_stream(config).await.unwrap();
    let relay = jetstream::new(system.relay_user().await);
    for message in events {
        let (async_nats::Message { subject, headers, payload, .. }, _) = message.split();
        relay.publish_with_headers(subject, headers.unwrap(), payload).await.unwrap().await.unwrap();
    }

    let _command = system.command().await;
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_published_behind_a_foreign_message() {
    let system = System::new().await;
    let command = system.command().await;
    let operator = jetstream::new(system.operator().await);
    system.product(5).await;
    assert_stream_is_journal(&system).await;
    let foreign = system.subjects.event("product", "restocked");
    let relay = jetstream::new(system.relay_user().await);
    relay.publish(foreign.clone(), "{}".into()).await.unwrap().await.unwrap();

    // The journal grows, but the stream does not.
    for _ in 0..5 {
        system.user().await;
    }
    stays("nothing is published", 2, || last_sequence(&system)).await;
    command.stop().await;
    let _command = system.command().await;
    system.user().await;
    stays("nothing is published", 2, || last_sequence(&system)).await;

    // The error tells the operator to delete the stream.
    operator.delete_stream(system.stream()).await.unwrap();
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_message_before_or_between_bursts_is_found_and_repaired_by_deleting_the_stream() {
    let system = System::new().await;
    let logs =
        ["command", "projection"].map(|role| system.stack.directory().join(format!("{}-{role}.log", system.prefix)));
    // The relay does not poll within the test, so that only the next burst can reveal the foreign message.
    let _command = system.logged_process("command", &["--relay-poll-ms", "600000"], &logs[0]);
    let _projection = system.logged_process("projection", &[], &logs[1]);
    system.answers("command").await;
    let user = system.user().await.id;
    let mut products = vec![];
    for _ in 0..499 {
        products.push(system.product(1_000).await.id);
    }
    let lines = |count: usize| {
        let lines: Vec<_> = products[..count].iter().map(|id| json!({"product": id, "quantity": 1})).collect();
        json!({"user": user, "lines": lines})
    };
    let operator = jetstream::new(system.operator().await);
    let relay = jetstream::new(system.relay_user().await);
    for burst in [1, 2, 3, 500] {
        assert_stream_is_journal(&system).await;
        journal::caught_up(&system).await;
        let intact = system.head().await;
        forge(&relay, &system, intact, burst == 3).await;
        match burst {
            1 => drop(system.user().await),
            _ => drop(system.accept("order.create", lines(burst - 1)).await),
        }
        // This makes another burst behind it.
        system.user().await;
        let found = format!("the stream's message {} is not the journal's event {}", intact + 1, intact + 1);
        for log in &logs {
            eventually("the foreign message is found and named in the log", async || {
                std::fs::read_to_string(log).unwrap().contains(&found).then_some(())
            })
            .await;
        }
        let checkpoints = journal::checkpoints(&system).await;
        assert!(checkpoints.values().all(|position| *position == intact), "{checkpoints:?}");
        operator.delete_stream(system.stream()).await.unwrap();
        assert_stream_is_journal(&system).await;
        assert_views_are_journal(&system).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_message_at_a_takeover_is_found_and_repaired_by_deleting_the_stream() {
    let system = System::new().await;
    let relay = jetstream::new(system.relay_user().await);
    let operator = jetstream::new(system.operator().await);
    let _projection = system.projection().await;
    for before in [true, false] {
        let first = system.process("command", &[]);
        system.answers("command").await;
        system.user().await;
        assert_stream_is_journal(&system).await;
        journal::caught_up(&system).await;
        let intact = system.head().await;
        let name = uuid::Uuid::now_v7().to_string();
        let second = system.start_command(&["--replica", &name]);
        system.listens("command", &name).await;
        first.kill();
        if before {
            forge(&relay, &system, intact, true).await;
        }
        // Requests that had been sent to the killed replica are not answered.
        let load = async {
            for _ in 0..10 {
                let email = format!("{}@example.com", uuid::Uuid::now_v7().simple());
                let register = system.ask("cmd.user.register", json!({"email": email, "name": "Ada"}), &[]);
                let _ = tokio::time::timeout(Duration::from_secs(1), register).await;
            }
        };
        let forging = async {
            if !before {
                forge(&relay, &system, intact, false).await;
            }
        };
        let _ = tokio::join!(load, forging);
        eventually("the stream is deleted", async || operator.delete_stream(system.stream()).await.ok()).await;
        assert_stream_is_journal(&system).await;
        assert_views_are_journal(&system).await;
        second.stop().await;
        let _ = operator.delete_stream(system.stream()).await;
    }
}

/// Publishes a message that does not come from the relay. If it is plausible, it claims the position behind the given
/// one.
async fn forge(relay: &jetstream::Context, system: &System, behind: u64, is_plausible: bool) {
    let mut headers = async_nats::HeaderMap::new();
    if is_plausible {
        let position = (behind + 1).to_string();
        for (name, value) in [
            ("Position", &*position),
            ("Journal", "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001"),
            ("Aggregate-Id", "0192d3a0-7c1e-7b5a-9f00-3c2b1a000002"),
            ("Aggregate-Version", "1"),
            ("Event-Schema", "1"),
            ("Recorded-At", "2026-01-31T09:30:00.000Z"),
        ] {
            headers.insert(name, value);
        }
    }
    let payload = r#"{"email":"mallory@example.com","name":"Mallory","country":null}"#;
    let subject = system.subjects.event("user", "registered");
    relay.publish_with_headers(subject, headers, payload.into()).await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_ahead_of_the_journal_is_refused_until_it_is_deleted() {
    let system = System::new().await;
    let command = system.command().await;
    for _ in 0..5 {
        system.user().await;
    }
    assert_stream_is_journal(&system).await;
    command.stop().await;
    // The journal is as if restored from an old backup.
    let statements = "delete from events where position > 3; update journal_head set position = 3; \
        delete from aggregates where id not in (select id from events)";
    system.journal().await.batch_execute(statements).await.unwrap();

    let _command = system.command().await;
    system.product(1).await;
    stays("nothing is published", 5, || last_sequence(&system)).await;

    jetstream::new(system.operator().await).delete_stream(system.stream()).await.unwrap();
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_in_one_replica_wakes_the_relay_in_another() {
    let system = System::new().await;
    // Neither relay polls within the test.
    let slow = ["--relay-poll-ms", "600000"];
    let _leader = system.command_with(&slow).await;
    system.product(5).await;
    assert_stream_is_journal(&system).await;
    let _other = system.command_with(&slow).await;
    // The requests are spread over both replicas.
    for _ in 0..20 {
        system.user().await;
        assert_stream_is_journal(&system).await;
    }
}

/// Waits until the stream has reached the journal's head, and compares every message.
pub async fn assert_stream_is_journal(system: &System) {
    let events = journal::events(system).await;
    let head = events.len() as u64;
    eventually("the stream has reached the journal's head", async || {
        (last_sequence(system).await == head).then_some(())
    })
    .await;
    let decode = |message: &jetstream::Message| {
        let sequence = message.info().unwrap().stream_sequence;
        decode_event(&system.subjects, sequence, &message.subject, message.headers.as_ref(), &message.payload).unwrap()
    };
    let published: Vec<Recorded> = messages(system).await.iter().map(decode).collect();
    assert_eq!(published.len(), events.len());
    for (published, recorded) in published.iter().zip(&events) {
        assert_eq!(published, recorded);
    }
}

pub async fn messages(system: &System) -> Vec<jetstream::Message> {
    let last = last_sequence(system).await;
    let consumer = stream(system).await.unwrap().create_consumer(OrderedConfig::default()).await.unwrap();
    let messages = consumer.messages().await.unwrap();
    messages.take(usize::try_from(last).unwrap()).map(Result::unwrap).collect().await
}

async fn last_sequence(system: &System) -> u64 {
    match stream(system).await {
        Some(stream) => stream.get_info().await.map_or(0, |info| info.state.last_sequence),
        None => 0,
    }
}

async fn stream(system: &System) -> Option<Stream> {
    jetstream::new(system.operator().await).get_stream(system.stream()).await.ok()
}
