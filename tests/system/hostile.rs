//! Hostile messages: nothing that a client can send ends a service, stops it from listening, or keeps the requests of
//! others from being answered.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use async_nats::{HeaderMap, Request};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tests::{Expect, Proxy, Raw, System, eventually, journal};
use tokio::time::{interval, timeout};
use uuid::Uuid;

use crate::{
    projection::{assert_views_are_journal, terms},
    relay::assert_stream_is_journal,
};

/// Header blocks that this client library, or another one, may be unable to parse.
const BROKEN: [&[u8]; 16] = [
    b"NATS/1.0\r\nActor: Ada\rLovelace\r\n\r\n",
    b"NATS/1.0\r\nActor: Ada\nLovelace\r\n\r\n",
    b"NATS/1.0\r\nActor: \xff\xfe\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/1.0\r\na blank: x\r\n\r\n",
    b"NATS/1.0\r\n: no name\r\n\r\n",
    b"NATS/1.0\r\nN\xc3\xa4me: x\r\n\r\n",
    b"NATS/1.0 abc\r\n\r\n",
    b"NATS/1.0 503 No Responders\r\n\r\n",
    b"NATS/1.0 99999999999999999999\r\n\r\n",
    b"NATS/2.0\r\nActor: x\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"\r\n\r\n",
    b"NATS/1.0\r\n folded\r\n\r\n",
    b"NATS/1.0\r\nActor: x",
    b"\x00\xff\x0a\x0d",
];

/// Reply subjects that are invalid, or not an inbox.
const REPLIES: [&[u8]; 8] = [
    b"_INBOX.x",
    b"_INBOX.\xff",
    b"_INBOX.\x0b\x0c\xc2\x85\xe2\x80\xa8",
    b"_INBOX.a..b",
    b"_INBOX.>",
    b"evt.order.placed",
    b"\x00",
    b"_INBOX.'\"\\",
];

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_a_client_sends_ends_a_service_or_keeps_others_from_being_answered() {
    let (system, replicas) = System::complete().await;
    system.user().await;
    journal::caught_up(&system).await;
    let leaders = terms(&system).await;
    for (rate, pause) in [(10, Duration::from_millis(5)), (100, Duration::from_millis(1))] {
        let enough = AtomicBool::new(false);
        let requests = async {
            thousand_requests(&system, pause).await;
            enough.store(true, Relaxed);
        };
        tokio::join!(send_hostile(&system, rate, &enough), requests);
        assert!(replicas.iter().all(|replica| !replica.has_ended()));
    }
    for service in ["command", "projection", "query"] {
        assert_answers(&system, service).await;
    }
    assert_eq!(terms(&system).await, leaders, "no view has a new leader");
    assert_stream_is_journal(&system).await;
    assert_views_are_journal(&system).await;
}

/// Sends 1,000 well-formed requests, alternately commands with a key and queries, each up to three times.
async fn thousand_requests(system: &System, pause: Duration) {
    let (tries, product) = (AtomicU64::new(0), system.product(0).await.id);
    let send = async |number: usize| {
        let (subject, body) = match number % 2 {
            0 => (system.subjects.command("product", "restock"), json!({"id": product, "quantity": 1})),
            _ => (system.subjects.query("product", "search"), json!({"text": "lantern"})),
        };
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Msg-Id", Uuid::now_v7().to_string());
        for _ in 0..3 {
            tries.fetch_add(1, Relaxed);
            let request = Request::new().payload(body.to_string().into()).headers(headers.clone());
            let request = request.timeout(Some(Duration::from_secs(5)));
            if let Ok(reply) = system.client.nats().send_request(subject.clone(), request).await {
                assert_eq!(wire::failure_status(&reply), None, "{:?}", reply.payload);
                return;
            }
        }
        panic!("request {number} was not answered in three tries");
    };
    let mut paced = interval(pause);
    let mut numbers = stream::iter(0..1_000).map(send).buffer_unordered(32);
    while let Some(()) = numbers.next().await {
        paced.tick().await;
    }
    // No hostile message has cost another client a request.
    assert_eq!(tries.load(Relaxed), 1_000);
}

/// Sends the broken header blocks, and random mutations of them, to the subjects that a client may publish to.
async fn send_hostile(system: &System, per_second: u64, enough: &AtomicBool) {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let subjects = subjects(system);
    let url = system.stack.url("NATS_URL");
    let (mut raw, mut paced) = (Raw::connect(url).await, interval(Duration::from_secs(1) / per_second as u32));
    while !enough.load(Relaxed) {
        paced.tick().await;
        if raw.is_lost() {
            raw = Raw::connect(url).await;
        }
        let subject = &subjects[random.below(subjects.len())];
        let broken = BROKEN[random.below(BROKEN.len())];
        let headers = if random.below(2) == 0 { broken.to_vec() } else { random.mutated(broken) };
        let reply = REPLIES[random.below(REPLIES.len())];
        raw.publish(subject, reply, &headers, b"{}").await;
    }
}

fn subjects(system: &System) -> Vec<String> {
    let commands = domain::commands().map(|it| system.subjects.command(it.aggregate, it.verb));
    let queries = views::queries().into_iter().map(|(_, it)| system.subjects.query(it.noun, it.verb));
    let verbs = ["PING", "INFO", "STATS"].into_iter();
    let services = verbs.flat_map(|verb| {
        let named = ["command", "projection", "query"].map(|service| format!("$SRV.{verb}.{service}"));
        named.into_iter().chain([format!("$SRV.{verb}")])
    });
    commands.chain(queries).chain(services).collect()
}

/// Pseudo-random numbers, which are the same in each run (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % bound as u64).unwrap()
    }

    /// The bytes, of which some are changed, removed or duplicated.
    fn mutated(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut mutated = bytes.to_vec();
        for _ in 0..=self.below(4) {
            let at = self.below(mutated.len().max(1));
            match self.below(3) {
                _ if mutated.is_empty() => mutated.push(0),
                0 => mutated[at] = u8::try_from(self.below(256)).unwrap(),
                1 => drop(mutated.remove(at)),
                _ => mutated.insert(at, mutated[at]),
            }
        }
        mutated
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_header_block_is_refused_with_a_sentence() {
    let system = System::new().await;
    let _command = system.command().await;
    let mut replies = system.client.nats().subscribe("_INBOX.broken").await.unwrap();
    let mut raw = Raw::connect(system.stack.url("NATS_URL")).await;
    for headers in BROKEN {
        raw.publish(&system.subjects.command("user", "delete"), b"_INBOX.broken", headers, b"{}").await;
        let reply = timeout(Duration::from_secs(10), replies.next()).await.unwrap().unwrap();
        let body: Value = serde_json::from_slice(&reply.payload).unwrap();
        assert_eq!(body["error"]["code"], "malformed", "{headers:?}: {body}");
    }
    assert_eq!(system.head().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_has_ended_for_good_is_replaced() {
    let (system, replicas) = System::complete().await;
    let user = system.user().await;
    system.read("user.get", json!({"id": user.id}), user.position).await.data();
    // No client may publish to these subjects, but the operator may.
    let mut raw = Raw::connect(system.stack.url("NATS_OPERATOR_URL")).await;
    for subject in [system.subjects.committed(), system.subjects.checkpoint("users")] {
        raw.publish(&subject, b"_INBOX.x", b"NATS/1.0\r\nX: a\rb\r\n\r\n", b"").await;
    }
    raw.settle().await;
    // Other clients read and write as before, as soon as the services are connected again.
    eventually("commands and queries are answered", async || {
        let email = format!("{}@example.com", Uuid::now_v7().simple());
        let body = json!({"email": email, "name": "Ada"});
        let soon = Duration::from_secs(2);
        let accepted = timeout(soon, system.ask("cmd.user.register", body, &[])).await.ok()?.ok()?.body;
        let position = accepted["position"].to_string();
        let headers = [("Min-Position", &*position)];
        let query = system.ask("qry.user.get", json!({"id": accepted["id"]}), &headers);
        timeout(soon, query).await.ok()?.ok()
    })
    .await;
    assert!(replicas.iter().all(|replica| !replica.has_ended()));
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_that_cannot_replace_its_connection_ends_with_an_error() {
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_COMMAND_URL")).await;
    let ready = system.stack.directory().join(format!("{}-ready", system.prefix));
    let arguments = ["--nats-url", &*proxy.url, "--ready-file", ready.to_str().unwrap()];
    let mut command = system.process("command", &arguments);
    system.answers("command").await;
    system.user().await;
    assert_stream_is_journal(&system).await;
    eventually("the service is ready", async || ready.exists().then_some(())).await;
    proxy.refuse();
    let mut raw = Raw::connect(system.stack.url("NATS_OPERATOR_URL")).await;
    raw.publish(&system.subjects.committed(), b"_INBOX.x", BROKEN[0], b"").await;
    raw.settle().await;
    eventually("the service has ended", async || command.has_failed().then_some(())).await;
    assert!(!ready.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_projection_without_a_connection_to_nats_loses_its_views_to_another_one() {
    let system = System::new().await;
    let _command = system.command().await;
    let proxy = Proxy::start(system.stack.url("NATS_PROJECTION_URL")).await;
    let _disconnected = system.start_projection(&["--nats-url", &proxy.url, "--lease-ms", "1000"]);
    system.user().await;
    journal::caught_up(&system).await;
    let before = terms(&system).await;

    proxy.swallow();
    let _connected = system.start_projection(&["--lease-ms", "1000"]);
    system.user().await;
    journal::caught_up(&system).await;
    assert!(terms(&system).await.iter().zip(&before).all(|(now, before)| now > before));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_without_a_connection_to_nats_loses_the_lead_to_another_one() {
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_COMMAND_URL")).await;
    let _disconnected = system.command_with(&["--nats-url", &proxy.url]).await;
    system.user().await;
    assert_stream_is_journal(&system).await;
    proxy.swallow();
    let _connected = system.start_command(&[]);
    eventually("the other replica takes commands", async || {
        let body = json!({"email": format!("{}@example.com", Uuid::now_v7().simple()), "name": "Ada"});
        timeout(Duration::from_secs(1), system.ask("cmd.user.register", body, &[])).await.ok()?.ok()
    })
    .await;
    assert_stream_is_journal(&system).await;
}

async fn assert_answers(system: &System, service: &str) {
    eventually("the service answers", async || {
        let asked = system.client.nats().request(format!("$SRV.PING.{service}"), "".into());
        timeout(Duration::from_secs(5), asked).await.ok()?.ok()
    })
    .await;
}
