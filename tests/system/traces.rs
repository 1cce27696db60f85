//! Traces: an order's way through all three services, and what the logs and spans must not hold.

use std::{collections::BTreeSet, time::Duration};

use serde_json::{Value, json};
use tests::{Collected, Collector, System, eventually, journal, stays};
use uuid::Uuid;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// The header `traceparent` of the reply to a request.
async fn traceparent(system: &System, subject: String, body: Value, headers: &[(&str, &str)]) -> Option<String> {
    let mut map = async_nats::HeaderMap::new();
    for (name, value) in headers {
        map.insert(*name, *value);
    }
    let reply = system.client.nats().request_with_headers(subject, map, body.to_string().into()).await.unwrap();
    reply.headers.unwrap().get(wire::TRACEPARENT).map(|value| value.as_str().to_owned())
}

fn of_trace(collector: &Collector, trace: &str) -> Vec<Collected> {
    collector.spans().into_iter().filter(|span| span.trace() == trace).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn one_order_is_traced_through_all_three_services() {
    let (system, collector) = (System::new().await, Collector::start().await);
    let to_collector = ["--otel-exporter-otlp-endpoint", &collector.url];
    let command = system.command_with(&to_collector).await;
    let projection = system.start_projection(&to_collector);
    let query = system.query_with(&to_collector).await;
    let (user, product) = (system.user().await, system.product(10).await);

    let (id, lines) = (Uuid::now_v7(), json!([{"product": product.id, "quantity": 1}]));
    let order = json!({"id": id, "user": user.id, "lines": lines});
    let subject = system.subjects.command("order", "create");
    let returned = traceparent(&system, subject.clone(), order, &[("traceparent", PARENT)]).await.unwrap();
    assert!(returned.starts_with(&format!("00-{TRACE}-")) && returned != PARENT, "{returned}");

    // The client passes on what it was given, and so the query is in the same trace.
    let head = system.head().await;
    let position = head.to_string();
    let headers = [("traceparent", returned.as_str()), ("Min-Position", position.as_str())];
    let asked = system.subjects.query("order", "get");
    traceparent(&system, asked.clone(), json!({"id": id}), &headers).await.unwrap();
    eventually("all views show the order", async || {
        let data = crate::monitor::data(&system, "projection").await?;
        data["views"].as_array()?.iter().all(|view| view["position"] == head).then_some(())
    })
    .await;
    for replica in [command, projection, query] {
        replica.stop().await;
    }

    let spans = of_trace(&collector, TRACE);
    let named = |name: &str| -> Vec<&Collected> { spans.iter().filter(|it| it.span.name == name).collect() };
    let one = |name: &str| match named(name)[..] {
        [span] => span,
        ref found => {
            panic!("{} spans {name} in {:#?}", found.len(), spans.iter().map(|it| &it.span.name).collect::<Vec<_>>())
        }
    };
    let request = one(&format!("process {subject}"));
    assert_eq!(request.service, "watershed-command");
    assert_eq!(request.parent(), "00f067aa0ba902b7");
    assert_eq!(returned, format!("00-{TRACE}-{}-01", request.id()), "the reply names the request's span");
    assert_eq!(request.attribute("messaging.system"), "nats");
    assert_eq!(request.attribute("messaging.destination.name"), subject);
    for part in ["wait for a batch", "batch"] {
        assert_eq!(one(part).parent(), request.id(), "{part}");
    }
    let committed = one("COMMIT events");
    assert_eq!(committed.parent(), one("batch").id());
    assert_eq!(committed.attribute("db.system.name"), "postgresql");

    // The batch as such is a trace of its own, which links to the requests in it.
    let link = &one("batch").span.links[0];
    let batches = collector.spans();
    let batch = batches.iter().find(|it| it.span.span_id == link.span_id).expect("the batch's own span");
    assert_ne!(batch.trace(), TRACE);
    let linked: BTreeSet<_> = batch.span.links.iter().map(|link| link.span_id.clone()).collect();
    assert!(linked.contains(&request.span.span_id));

    let placed = system.subjects.event("order", "placed");
    let sent = one(&format!("send {placed}"));
    assert_eq!((sent.service.as_str(), sent.parent()), ("watershed-command", request.id()));
    let shown = named(&format!("process {placed}"));
    let views: BTreeSet<String> = shown.iter().map(|span| span.attribute("watershed.view")).collect();
    assert_eq!(Vec::from_iter(views), ["orders", "sales", "users"]);
    for span in &shown {
        assert_eq!((span.service.as_str(), span.parent()), ("watershed-projection", request.id()));
        for part in ["fold".to_owned(), format!("update {}", span.attribute("watershed.view"))] {
            assert!(named(&part).iter().any(|it| it.parent() == span.id()), "{part}");
        }
    }
    let got = one(&format!("process {asked}"));
    assert_eq!((got.service.as_str(), got.parent()), ("watershed-query", request.id()));
    assert!(got.attribute("watershed.position").parse::<u64>().is_ok_and(|shown| shown >= head));
    let found = one("find orders");
    assert_eq!((found.parent(), found.attribute("db.system.name").as_str()), (got.id(), "mongodb"));

    for Collected { span, .. } in &spans {
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano, "{}", span.name);
    }
    let order = |name: &str| one(name).span.end_time_unix_nano;
    assert!(
        order("wait for a batch") <= order("batch") && committed.span.end_time_unix_nano <= got.span.end_time_unix_nano
    );
    print(&spans, &request.parent(), 0);
}

/// Prints the spans below one, indented, as they began.
fn print(spans: &[Collected], parent: &str, depth: usize) {
    let first = spans.iter().map(|it| it.span.start_time_unix_nano).min().unwrap_or_default();
    let mut children: Vec<&Collected> = spans.iter().filter(|it| it.parent() == parent).collect();
    children.sort_by_key(|it| it.span.start_time_unix_nano);
    for it in children {
        let millis = |nanos: u64| nanos as f64 / 1e6;
        let (start, length) = (
            millis(it.span.start_time_unix_nano - first),
            millis(it.span.end_time_unix_nano - it.span.start_time_unix_nano),
        );
        let name = format!("{:indent$}{}", "", it.span.name, indent = 2 * depth);
        println!("{start:8.2} {length:7.2} ms  {:22} {name} {}", it.service, it.attribute("watershed.view"));
        print(spans, &it.id(), depth + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_parent_decides_whether_a_trace_is_sampled() {
    let (system, collector) = (System::new().await, Collector::start().await);
    let command = system.command_with(&["--otel-exporter-otlp-endpoint", &collector.url]).await;
    let subject = system.subjects.command("user", "delete");
    let absent = json!({"id": Uuid::now_v7()});
    let unsampled = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
    let returned = traceparent(&system, subject.clone(), absent.clone(), &[("traceparent", unsampled)]).await;
    assert_eq!(returned.as_deref(), Some(unsampled), "what is not recorded is passed on");
    let returned = traceparent(&system, subject.clone(), absent.clone(), &[("traceparent", PARENT)]).await.unwrap();
    let own = traceparent(&system, subject, absent, &[]).await.unwrap();
    command.stop().await;
    assert!(of_trace(&collector, "0af7651916cd43dd8448eb211c80319c").is_empty());
    assert!(!of_trace(&collector, &returned[3..35]).is_empty() && !of_trace(&collector, &own[3..35]).is_empty());
    let refused = of_trace(&collector, TRACE).into_iter().find(|it| it.span.name.starts_with("process")).unwrap();
    assert_eq!(refused.attribute("watershed.code"), "user_not_found");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_the_trace_of_the_client_is_stored_and_returned() {
    let (system, _replicas) = System::complete().await;
    let subject = system.subjects.command("user", "register");
    let user = json!({"email": "ada@example.com", "name": "Ada"});
    let returned = traceparent(&system, subject, user, &[("traceparent", PARENT)]).await;
    assert_eq!(returned.as_deref(), Some(PARENT));
    let stored = system.journal().await.query_one("select traceparent from events", &[]).await.unwrap();
    assert_eq!(stored.get::<_, &str>(0), PARENT);
    let asked = system.subjects.query("user", "list");
    assert_eq!(traceparent(&system, asked, json!({}), &[]).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_or_slow_or_misspelt_stops_nobody() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let slow = format!("http://{}", silent.local_addr().unwrap());
    for endpoint in ["http://127.0.0.1:1", "nonsense", "https://127.0.0.1:1", &slow] {
        let system = System::new().await;
        let command = system.command_with(&["--otel-exporter-otlp-endpoint", endpoint]).await;
        for _ in 0..10 {
            system.user().await;
        }
        let stopping = tokio::time::timeout(Duration::from_secs(10), command.stop()).await;
        assert!(stopping.is_ok(), "{endpoint}");
    }
}

/// What a client sends is in no line of a log, in no span and in no metric, even when everything goes wrong.
#[tokio::test(flavor = "multi_thread")]
async fn no_log_span_or_metric_holds_what_a_client_sent() {
    let (system, collector) = (System::new().await, Collector::start().await);
    let directory = std::env::temp_dir().join(format!("watershed-logs-{}", system.prefix));
    std::fs::create_dir_all(&directory).unwrap();
    let mut ports = vec![];
    let mut processes = vec![];
    for role in ["command", "projection", "query"] {
        let port = tests::http::free_address();
        ports.push(port);
        let arguments = [
            "--otel-exporter-otlp-endpoint",
            &collector.url,
            "--metrics-address",
            &port.to_string(),
            "--replica",
            role,
        ];
        processes.push(system.logged_process(role, &arguments, &directory.join(role)));
    }
    system.answers("command").await;
    // What a view folds before it serves is not traced.
    journal::caught_up(&system).await;
    let planted = ["planted-mail@example.com", "Planted Name", "PLANTED-SKU", "planted-key", "planted-actor"];
    let headers = [("Nats-Msg-Id", planted[3]), ("Actor", planted[4])];
    let send = async |name: &str, body: Value| {
        let (aggregate, verb) = name.split_once('.').unwrap();
        traceparent(&system, system.subjects.command(aggregate, verb), body, &headers[1..]).await;
    };
    let user = json!({"email": planted[0], "name": planted[1]});
    let price = json!({"amount": 255, "currency": "GBP"});
    let product = json!({"sku": planted[2], "name": planted[1], "price": price, "stock": 5});
    for _ in 0..2 {
        send("user.register", user.clone()).await;
        send("product.create", product.clone()).await;
    }
    send("user.register", json!({"email": planted[0], "name": planted[1], "planted": planted[1]})).await;
    traceparent(&system, system.subjects.command("user", "delete"), json!({"id": Uuid::now_v7()}), &headers).await;
    let journal = system.journal().await;
    // A constraint that the next command violates makes PostgreSQL quote the row.
    journal
        .batch_execute("alter table events add constraint odd check (payload::text not like '%odd%') not valid")
        .await
        .unwrap();
    send("user.register", json!({"email": "odd-planted-mail@example.com", "name": planted[1]})).await;
    journal.batch_execute("alter table events drop constraint odd").await.unwrap();
    // A state and an event that cannot be read, and a document.
    let position = system.head().await;
    let asked = system.subjects.query("user", "get");
    let wait = [("Min-Position", &*position.to_string())];
    eventually("the views are built", async || {
        let reply =
            system.client.nats().request(asked.clone(), json!({"email": planted[0]}).to_string().into()).await.ok()?;
        reply.headers?.get("Position").map(|_| ())
    })
    .await;
    traceparent(&system, asked.clone(), json!({"email": planted[0]}), &wait).await;
    traceparent(&system, asked.clone(), json!({"email": "planted-absent@example.com"}), &wait).await;
    let users = system.views().await.collection::<bson::Document>("users@1");
    users.update_many(bson::doc! {}, bson::doc! {"$set": {"orders": planted[0], "version": planted[1]}}).await.unwrap();
    journal
        .batch_execute(
            r#"update aggregates set state = '{"status":"planted-mail@example.com"}' where kind = 'user';
            update events set payload = '{"email":"planted-mail@example.com"}' where type = 'registered'"#,
        )
        .await
        .unwrap();
    let id: Uuid =
        journal.query_one("select id from aggregates where kind = 'user' limit 1", &[]).await.unwrap().get(0);
    // The relay compares the last event with the stream.
    send("user.register", json!({"email": "other@example.com", "name": "Other"})).await;
    processes.remove(0).kill();
    processes.push(system.logged_process("command", &["--replica", "again"], &directory.join("again")));
    system.answers("command").await;
    send("user.update", json!({"id": id, "name": planted[1]})).await;

    let logs = || -> String {
        let files = std::fs::read_dir(&directory).unwrap();
        files.map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect()
    };
    eventually("the faults are in the logs", async || {
        let logs = logs();
        (logs.contains("a command failed") && logs.contains("cannot be read")).then_some(())
    })
    .await;
    let logs = logs();
    let faults: Vec<Value> = logs
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap_or_else(|_| panic!("not JSON: {line}")))
        .filter(|line| line["message"] == "a request was answered with a fault of the service")
        .collect();
    assert!(!faults.is_empty(), "{logs}");
    for line in faults {
        assert!(
            line["request_id"].is_string() && line["replica"].is_string() && line["service"] == "command",
            "{line}"
        );
        let cause = format!("\"request_id\":{}", line["request_id"]);
        assert!(
            logs.lines().filter(|line| line.contains(&cause)).count() >= 2,
            "the cause has the same identifier: {cause}"
        );
    }
    let mut shown = logs;
    for port in &ports[1..] {
        shown += &tests::http::get(*port, "/metrics").await.unwrap().1;
    }
    for stats in system.all_stats().await {
        shown += &stats.to_string();
    }
    eventually("spans have come", async || (collector.spans().len() > 10).then_some(())).await;
    shown += &format!("{:?}", collector.spans());
    let shown = shown.to_lowercase();
    for secret in planted.iter().map(|text| text.to_lowercase()).chain(["planted".to_owned(), "development".to_owned()])
    {
        let line = shown.lines().find(|line| line.contains(&secret));
        assert_eq!(line, None, "{secret}");
    }
    stays("nobody has ended", true, async || processes.iter_mut().all(|process| !process.has_ended())).await;
    std::fs::remove_dir_all(&directory).unwrap();
}
