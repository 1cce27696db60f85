//! Least permissions: a client may only ask, and no service can do another's work.

use std::time::Duration;

use async_nats::jetstream::{self, consumer::pull};
use bson::doc;
use futures_util::StreamExt;
use serde_json::json;
use tests::{Expect, System, stays};

#[tokio::test(flavor = "multi_thread")]
async fn a_client_can_neither_publish_events_nor_answer_for_a_service() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await;
    super::relay::assert_stream_is_journal(&system).await;
    let event = system.subjects.event("product", "restocked");
    // The operator may listen to everything, and yet not publish events.
    let operator = system.operator().await;
    operator.publish(event.clone(), "{}".into()).await.unwrap();
    operator.flush().await.unwrap();
    let roles = ["NATS_URL", "NATS_PROJECTION_URL", "NATS_QUERY_URL"];
    for role in roles {
        let intruder = system.connect_as(role).await.nats().clone();
        intruder.publish(event.clone(), "{}".into()).await.unwrap();
        let mut commands =
            intruder.queue_subscribe(system.subjects.command("product", "restock"), "command".into()).await.unwrap();
        let mut inboxes = intruder.subscribe("_INBOX_command.>").await.unwrap();
        intruder.flush().await.unwrap();
        for _ in 0..10 {
            system.accept("product.restock", json!({"id": product.id, "quantity": 1})).await;
        }
        let heard = async {
            tokio::select! { _ = commands.next() => true, _ = inboxes.next() => true }
        };
        // The server refuses the subscriptions: they end, or stay silent.
        let heard = tokio::time::timeout(Duration::from_millis(300), heard).await;
        assert!(heard.is_err() || intruder.statistics().in_messages.load(std::sync::atomic::Ordering::Relaxed) == 0);
    }
    super::relay::assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscriber_reads_every_event_in_order_and_goes_on_where_it_stopped() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await.id;
    let restock = json!({"id": product, "quantity": 1});
    let connect = async || {
        let (options, servers) = wire::nats_options(system.stack.url("NATS_SUBSCRIBER_URL")).unwrap();
        options.custom_inbox_prefix("_INBOX_subscriber").connect(servers).await.unwrap()
    };
    let durable = pull::Config { durable_name: Some("subscriber".into()), ..Default::default() };
    let mut read = Vec::new();
    for last in [10, 20] {
        while system.head().await < last {
            system.accept("product.restock", restock.clone()).await;
        }
        // A new connection each time: the server remembers what was acknowledged.
        let stream = jetstream::new(connect().await).get_stream(system.stream()).await.unwrap();
        let consumer = stream.get_or_create_consumer("subscriber", durable.clone()).await.unwrap();
        let mut events = consumer.messages().await.unwrap();
        while read.last() != Some(&last) {
            let event = tokio::time::timeout(tests::PATIENCE, events.next()).await.unwrap().unwrap().unwrap();
            read.push(event.info().unwrap().stream_sequence);
            event.double_ack().await.unwrap();
        }
    }
    assert_eq!(read, (1..=20).collect::<Vec<u64>>());

    // It can do nothing else.
    let client = connect().await;
    let streams = jetstream::new(client.clone());
    let stream = streams.get_stream(system.stream()).await.unwrap();
    // What is forbidden is not answered.
    let soon = Duration::from_millis(500);
    let deleted = tokio::time::timeout(soon, stream.delete_consumer("subscriber")).await;
    assert!(!matches!(deleted, Ok(Ok(_))));
    let other = pull::Config { durable_name: Some("other".into()), ..Default::default() };
    let made = tokio::time::timeout(soon, stream.create_consumer(other)).await;
    assert!(!matches!(made, Ok(Ok(_))));
    let command = system.subjects.command("product", "restock");
    for subject in [command, system.subjects.query("product", "get"), system.subjects.event("product", "restocked")] {
        client.publish(subject, restock.to_string().into()).await.unwrap();
    }
    client.flush().await.unwrap();
    stays("nothing happens", 20, async || system.head().await).await;
    super::relay::assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_cannot_be_steered_into_the_stream() {
    let system = System::new().await;
    let _command = system.command().await;
    let product = system.product(1).await.id;
    let restock = json!({"id": product, "quantity": 1}).to_string();
    let (subject, event) = (system.subjects.command("product", "restock"), system.subjects.event("order", "placed"));
    system.client.nats().publish_with_reply(subject, event, restock.into()).await.unwrap();
    system.client.nats().flush().await.unwrap();
    tests::eventually("it was done", async || (system.head().await == 2).then_some(())).await;
    system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
    super::relay::assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_system_s_user_is_told_about_the_server() {
    let system = System::new().await;
    let questions = ["$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.PING.STATSZ", "$SYS.REQ.SERVER.PING.JSZ"];
    let sys = system.connect_as("NATS_SYS_URL").await.nats().clone();
    for question in questions {
        let answer = sys.request(question, "".into()).await.unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer.payload).unwrap();
        assert_eq!(answer["server"]["jetstream"], true, "{answer}");
    }
    // It is in an account of its own: no command and no event passes from one to the other.
    let mut overheard = sys.subscribe("$SYS.REQ.SERVER.>").await.unwrap();
    sys.flush().await.unwrap();

    for role in ["NATS_URL", "NATS_COMMAND_URL", "NATS_PROJECTION_URL", "NATS_QUERY_URL", "NATS_OPERATOR_URL"] {
        let other = system.connect_as(role).await.nats().clone();
        for question in questions {
            let answer = tokio::time::timeout(Duration::from_millis(300), other.request(question, "".into())).await;
            assert!(!matches!(answer, Ok(Ok(_))), "{role} {question}");
        }
    }
    assert!(tokio::time::timeout(Duration::from_millis(300), overheard.next()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_query_service_s_user_cannot_write() {
    let (system, _replicas) = System::complete().await;
    let user = system.user().await;
    system.read("user.get", json!({"id": user.id}), user.position).await.data();
    let client = mongodb::Client::with_uri_str(system.stack.url("MONGODB_QUERY_URL")).await.unwrap();
    let users = client.database(&system.prefix).collection::<bson::Document>("users@1");
    assert!(users.find_one(doc! {}).await.unwrap().is_some());
    assert!(users.delete_one(doc! {}).await.is_err());
    assert!(users.insert_one(doc! {"_id": "x"}).await.is_err());
    stays("the document is there", 1, async || users.count_documents(doc! {}).await.unwrap()).await;
}
