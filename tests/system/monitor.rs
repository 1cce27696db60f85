//! What the services show of themselves: figures in `$SRV.STATS`, operations, metrics, health and readiness.

use std::{collections::BTreeMap, time::Duration};

use async_nats::Client as Nats;
use serde_json::{Value, json};
use tests::{Expect, Proxy, Stack, System, eventually, http};

use crate::relay::assert_stream_is_journal;

/// The `data` of a service's only replica.
pub async fn data(system: &System, service: &str) -> Option<Value> {
    let stats = system.all_stats().await;
    let own = stats.into_iter().find(|stats| stats["name"] == service)?;
    Some(own["data"].clone())
}

async fn operation(nats: &Nats, system: &System, name: &str, body: Value) -> Value {
    let (noun, verb) = name.split_once('.').unwrap();
    let subject = system.subjects.operation(noun, verb);
    let reply = nats.request(subject, body.to_string().into()).await.unwrap();
    serde_json::from_slice(&reply.payload).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_replica_shows_its_live_figures() {
    let (system, _replicas) = System::complete().await;
    system.send_samples().await;
    let head = system.head().await;
    let command = eventually("the relay has published everything", async || {
        data(&system, "command").await.filter(|data| data["stream"]["position"] == head)
    })
    .await;
    assert_eq!(command["ready"], true, "{command}");
    assert_eq!(command["problems"], json!([]));
    assert_eq!(command["servers"]["nats"]["up"], true);
    assert_eq!(command["servers"]["postgres"]["losses"], 0);
    assert_eq!(
        command["queue"],
        json!({"commands": 0, "bytes": 0, "max_commands": 8192, "max_bytes": 64 << 20}),
        "nothing waits"
    );
    assert!(command["batches"]["commands"].as_u64() >= command["batches"]["count"].as_u64());
    assert!(command["batches"]["largest"].as_u64() >= Some(1));
    assert!(command["known_aggregates"].as_u64() > Some(0));
    assert_eq!(command["relay"], true);
    assert_eq!(command["journal"]["position"], head);

    let projection = eventually("the views have caught up", async || {
        let data = data(&system, "projection").await?;
        let views = data["views"].as_array()?.clone();
        let done = |view: &Value| view["lag_events"] == 0 && view["position"] == head && view["lag_seconds"] == 0.0;
        (views.len() == 4 && views.iter().all(done)).then_some(data)
    })
    .await;
    assert_eq!(projection["stream"]["position"], head);
    for view in projection["views"].as_array().unwrap() {
        assert_eq!(
            (&view["state"], &view["term"], &view["reason"]),
            (&json!("live"), &json!(1), &Value::Null),
            "{view}"
        );
    }
    let query = eventually("the query service has heard it", async || {
        let data = data(&system, "query").await?;
        data["views"].as_array()?.iter().all(|view| view["position"] == head).then_some(data)
    })
    .await;
    assert_eq!((&query["in_flight"], &query["max_in_flight"]), (&json!(0), &json!(4096)));
    assert_eq!(query["views"].as_array().unwrap().len(), 4);

    for stats in system.all_stats().await {
        assert_eq!(stats["metadata"]["stream"], system.stream());
        assert_eq!(stats["metadata"]["prefix"], system.prefix);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_can_ask_and_nobody_else() {
    let (system, _replicas) = System::complete().await;
    let user = system.user().await;
    system.read("user.get", json!({"id": user.id}), user.position).await.data();
    let operator = system.operator().await;

    let journal = operation(&operator, &system, "journal.show", json!({})).await;
    assert_eq!(journal["position"], user.position, "{journal}");
    assert_eq!(journal["stream"]["position"], user.position);
    assert_eq!(journal["stream"]["name"], system.stream());
    let replicas = operation(&operator, &system, "replica.list", json!({})).await;
    let replicas = replicas["replicas"].as_array().unwrap();
    let services: Vec<&str> = replicas.iter().filter_map(|replica| replica["service"].as_str()).collect();
    assert_eq!(services, ["command", "projection", "query"]);
    assert_eq!(journal["relay"], replicas[0]["replica"], "the replica that runs the relay");

    let views = operation(&operator, &system, "view.list", json!({})).await;
    let views = views["views"].as_array().unwrap();
    let names: Vec<&str> = views.iter().filter_map(|view| view["view"].as_str()).collect();
    assert_eq!(BTreeMap::from_iter(names.iter().map(|name| (*name, ()))).len(), 4, "{names:?}");
    for view in views {
        assert_eq!(view["leader"], replicas[1]["replica"], "{view}");
    }
    let shown = operation(&operator, &system, "view.show", json!({"view": "users"})).await;
    assert_eq!((&shown["documents"], &shown["generation"]), (&json!(1), &json!(1)), "{shown}");
    assert!(shown["bytes"].as_i64() > Some(0));
    assert!(shown["indexes"].as_array().unwrap().contains(&json!("_id_")));
    assert_eq!(shown["journal"], journal["journal"]);

    let refused = operation(&operator, &system, "view.show", json!({"view": "nonsense"})).await;
    assert_eq!(refused["error"]["code"], "not_found");
    let refused = operation(&operator, &system, "view.list", json!({"x": 1})).await;
    assert_eq!(refused["error"]["code"], "malformed");

    let operations = [("journal", "show"), ("replica", "list"), ("view", "list"), ("view", "show")];
    for role in ["NATS_URL", "NATS_COMMAND_URL", "NATS_PROJECTION_URL", "NATS_QUERY_URL", "NATS_SUBSCRIBER_URL"] {
        let other = system.connect_as(role).await.nats().clone();
        for (noun, verb) in operations {
            let asked = other.request(system.subjects.operation(noun, verb), r#"{"view":"users"}"#.into());
            let answer = tokio::time::timeout(Duration::from_millis(300), asked).await;
            assert!(!matches!(answer, Ok(Ok(_))), "{role} {noun}.{verb}");
        }
    }
    for stats in system.all_stats().await {
        for endpoint in stats["endpoints"].as_array().unwrap() {
            let is_operation =
                endpoint["subject"].as_str().unwrap().starts_with(&system.subjects.operation("", "")[..4]);
            assert!(!is_operation || endpoint["queue_group"] == stats["name"]);
        }
    }
    assert_stream_is_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health_are_served_over_http() {
    let system = System::new().await;
    let ports: Vec<_> = (0..3).map(|_| http::free_address()).collect();
    let arguments: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let with = |n: usize| ["--metrics-address", &arguments[n]];
    let _command = system.command_with(&with(0)).await;
    let _projection = system.start_projection(&with(1));
    let _query = system.query_with(&with(2)).await;
    system.send_samples().await;
    let user = system.user().await;
    system.read("user.get", json!({"id": user.id}), user.position).await.data();
    let refused = system.try_command("user.delete", json!({"id": uuid::Uuid::now_v7()})).await;
    assert_eq!(refused.code(), "user_not_found");

    for port in &ports {
        eventually("the replica is ready", async || {
            (http::get(*port, "/readyz").await.ok()? == (200, "ok\n".to_owned())).then_some(())
        })
        .await;
        assert_eq!(http::get(*port, "/healthz").await.unwrap(), (200, "ok\n".to_owned()));
        assert_eq!(http::get(*port, "/nonsense").await.unwrap().0, 404);
    }
    let command = http::get(ports[0], "/metrics").await.unwrap().1;
    for line in [
        "watershed_ready 1.0",
        "watershed_server_up{server=\"postgres\"} 1.0",
        "watershed_requests_total{endpoint=\"cmd.user.delete\",code=\"user_not_found\"} ",
        "watershed_requests_total{endpoint=\"cmd.user.register\",code=\"ok\"} ",
        "watershed_relay_running 1.0",
        "watershed_batch_retries_total{reason=\"race\"} ",
    ] {
        assert!(command.contains(line), "{line}\n{command}");
    }
    let projection = http::get(ports[1], "/metrics").await.unwrap().1;
    assert!(projection.contains("watershed_view_leading{view=\"users\"} 1.0"), "{projection}");
    let query = http::get(ports[2], "/metrics").await.unwrap().1;
    assert!(query.contains(&format!("watershed_view_position{{view=\"users\"}} {}.0", user.position)), "{query}");
    // Every family has a help text that ends, and a unit in its name where it has one.
    for text in [command, projection, query] {
        assert!(text.ends_with("# EOF\n"));
        for line in text.lines().filter(|line| line.starts_with("# HELP")) {
            assert!(line.ends_with('.') && !line.ends_with(".."), "{line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_stops_nobody_and_is_opened_when_it_is_free() {
    let system = System::new().await;
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let _command = system.command_with(&["--metrics-address", &address.to_string()]).await;
    system.user().await;
    drop(taken);
    eventually("the port is opened", async || http::get(address, "/healthz").await.ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_without_its_servers_is_healthy_but_not_ready_and_says_why() {
    let stack = Stack::private("monitor");
    let system = System::on(stack.clone()).await;
    let ports: Vec<_> = (0..3).map(|_| http::free_address()).collect();
    let arguments: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let with = |n: usize| ["--metrics-address", &arguments[n]];
    let _command = system.start_command(&with(0));
    let _projection = system.start_projection(&with(1));
    let _query = system.start_query(&with(2));
    let readiness = async |n: usize| http::get(ports[n], "/readyz").await.ok();
    let becomes = async |n: usize, status: u16, text: &str| {
        eventually(&format!("replica {n} says {status} {text}"), async || {
            readiness(n).await.filter(|(is, says)| *is == status && says.contains(text))
        })
        .await;
    };
    for n in 0..3 {
        becomes(n, 200, "ok").await;
    }
    for (server, name, concerned) in
        [("postgres", "PostgreSQL", vec![0]), ("mongodb", "MongoDB", vec![1, 2]), ("nats", "NATS", vec![0, 1, 2])]
    {
        tokio::task::block_in_place(|| stack.stop(server));
        for n in &concerned {
            becomes(*n, 503, name).await;
            assert_eq!(http::get(ports[*n], "/healthz").await.unwrap().0, 200);
        }
        tokio::task::block_in_place(|| stack.resume(server));
        for n in &concerned {
            becomes(*n, 200, "ok").await;
            let metrics = http::get(ports[*n], "/metrics").await.unwrap().1;
            assert!(
                metrics.contains(&format!("watershed_server_losses_total{{server=\"{server}\"}} 1.0")),
                "{metrics}"
            );
        }
    }
}

/// A view that stands still says why, and the replica goes on with the others.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_cannot_be_written_says_why() {
    let system = System::new().await;
    let _command = system.command().await;
    let port = http::free_address();
    let _projection = system.start_projection(&["--metrics-address", &port.to_string()]);
    let _query = system.query().await;
    // Another version of the view wrote the documents.
    let checkpoints = system.views().await.collection::<bson::Document>("checkpoints");
    let other = bson::doc! {"$set": {"version": 99}};
    eventually("the view has a checkpoint", async || {
        let updated = checkpoints.update_one(bson::doc! {"_id": "users@1"}, other.clone()).await.ok()?;
        (updated.matched_count == 1).then_some(())
    })
    .await;
    checkpoints
        .update_one(bson::doc! {"_id": "users@1"}, bson::doc! {"$inc": {"position": 1_000_000_i64}})
        .await
        .unwrap();
    let product = system.product(1).await;
    system.user().await;
    eventually("the reason is shown", async || {
        let data = data(&system, "projection").await?;
        let users = data["views"].as_array()?.iter().find(|view| view["view"] == "users")?.clone();
        let problems = data["problems"].to_string();
        (users["state"] == "failing"
            && users["reason"].as_str()?.contains("version 99")
            && problems.contains("the view users stands still")
            && data["ready"] == true)
            .then_some(())
    })
    .await;
    let (status, text) = http::get(port, "/readyz").await.unwrap();
    assert_eq!(status, 200, "it works on: {text}");
    assert!(text.contains("the view users stands still"), "{text}");
    system.read("product.get", json!({"id": product.id}), product.position).await.data();
}

/// What hangs is told apart from what waits: nothing that the process waits for makes it unhealthy.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_way_to_nats_does_not_make_a_replica_unhealthy() {
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_COMMAND_URL")).await;
    let port = http::free_address();
    let address = port.to_string();
    let _command = system.command_with(&["--nats-url", &proxy.url, "--metrics-address", &address]).await;
    proxy.swallow();
    eventually("it is not ready", async || (http::get(port, "/readyz").await.ok()?.0 == 503).then_some(())).await;
    assert_eq!(http::get(port, "/healthz").await.unwrap().0, 200);
}
