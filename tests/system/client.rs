//! The client: it reads its own writes, and sends requests again until they are settled or the deadline is over; a
//! command that it sends more than once happens once.

use std::{
    future::IntoFuture,
    time::{Duration, Instant},
};

use client::{Client, ConnectOptions, Error, Request, Session};
use domain::{Email, Id, Name, product, strict::Choice, user};
use futures_util::future::join_all;
use serde_json::json;
use tests::{Proxy, Stack, System, eventually, journal};
use uuid::Uuid;
use views::{
    Limit,
    products::GetProduct,
    users::{GetUser, ListUsers, Sort},
};
use wire::{Accepted, Prefix};

/// A client as services have it, which retries; the tests' own sends each request once.
async fn connect(system: &System, url: &str) -> Client {
    let prefix: Prefix = system.prefix.parse().unwrap();
    Client::connect(&ConnectOptions::url(url).prefix(Some(prefix))).await.unwrap()
}

fn register() -> user::Register {
    let email = Email::new(&format!("{}@example.com", Uuid::now_v7().simple())).unwrap();
    user::Register { id: Id::default(), email, name: Name::new("Ada Lovelace").unwrap(), country: None }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_sees_what_the_same_session_has_written() {
    let (system, _replicas) = System::complete().await;
    let client = connect(&system, system.stack.url("NATS_URL")).await;
    for n in 0..100 {
        let registered = register();
        let user = client.command(&registered).await.unwrap();
        assert_eq!(client.session().position(), user.position);
        let by_id = client.query(&GetUser { id: Some(user.id), email: None }).reply().await.unwrap();
        assert_eq!((&by_id.body.email, &by_id.body.name), (&registered.email, &registered.name));
        assert!(by_id.position >= Some(user.position));
        let update = user::Update { id: user.id, email: None, name: Some(Name::new("Grace").unwrap()), country: None };
        client.command(&update).expected_version(1).actor("Zoë").await.unwrap();
        let newest = ListUsers { sort: Some(Choice(Sort::Registered)), ..ListUsers::default() };
        let newest = client.query(&ListUsers { limit: Some(Limit(2)), ..newest }).await.unwrap();
        assert_eq!((newest.items[0].id, &*newest.items[0].name), (user.id, "Grace"));
        assert_eq!(newest.next.is_some(), n > 1);
    }

    // Another session is told nothing, and can be told where to begin.
    let other = client.with_session(Session::default());
    assert_eq!(other.session().position(), 0);
    let user = client.command(&register()).await.unwrap();
    other.session().note(user.position);
    assert_eq!(other.query(&GetUser { id: Some(user.id), email: None }).await.unwrap().id, user.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_told_by_its_code_and_never_retried_when_it_is_definite() {
    let (system, _replicas) = System::complete().await;
    let client = connect(&system, system.stack.url("NATS_URL")).await;
    let registered = register();
    let user = client.command(&registered).await.unwrap();
    let began = Instant::now();
    let taken = client.command(&registered).await;
    let Err(Error::Rejected(failure)) = taken else { panic!("{taken:?}") };
    assert_eq!((&*failure.code, &failure.details["id"]), ("email_taken", &json!(user.id)));
    let conflict = client.command(&user::Delete { id: user.id }).expected_version(7).await;
    assert_eq!(conflict.unwrap_err().code(), Some("version_conflict"));
    let nobody = client.query(&GetUser { id: Some(Id(Uuid::now_v7())), email: None }).await;
    assert!(matches!(nobody, Err(Error::NotFound(_))));
    let malformed = client.query(&GetUser::default()).await;
    assert!(matches!(malformed, Err(Error::Malformed(_))));
    let key = Uuid::now_v7().to_string();
    client.command(&register()).key(&key).await.unwrap();
    assert!(matches!(client.command(&register()).key(&key).await, Err(Error::CommandIdReused(_))));
    let large = client.request("cmd.user.register", vec![b' '; 5 << 20]).await;
    assert!(matches!(large, Err(Error::TooLarge(_))), "{large:?}");
    let header = client.command(&register()).actor("Ada\r\nNats-Msg-Id: k-1").await;
    assert!(matches!(header, Err(Error::Unsendable(_))));
    let forbidden = client.request("evt.user.registered", "{}").await;
    assert!(matches!(forbidden, Err(Error::Forbidden(_))), "{forbidden:?}");
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

/// The replies are lost with the connection in the middle of a load, and the replica is killed in the middle of batches.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_whose_reply_is_lost_is_sent_again_and_happens_once() {
    const CLIENTS: usize = 16;
    const COMMANDS: usize = 60;
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_URL")).await;
    let mut command = system.process("command", &[]);
    system.answers("command").await;
    let product = system.product(0).await.id;
    let client = connect(&system, &proxy.url).await;
    let one_client = async || {
        for _ in 0..COMMANDS {
            client.command(&product::Restock { id: product, quantity: 1 }).await.unwrap();
        }
    };
    let trouble = async {
        for round in 1..6 {
            eventually("more commands are done", async || (system.head().await > round * 100).then_some(())).await;
            proxy.cut();
            std::mem::replace(&mut command, system.process("command", &[])).kill();
        }
    };
    tokio::join!(join_all((0..CLIENTS).map(|_| one_client())), trouble);
    let events = journal::events(&system).await;
    assert_eq!(events.iter().filter(|event| event.id == product).count(), 1 + CLIENTS * COMMANDS);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_is_kept_and_says_what_is_known() {
    let system = System::new().await;
    let proxy = Proxy::start(system.stack.url("NATS_URL")).await;
    let client = connect(&system, &proxy.url).await.with_deadline(Duration::from_secs(1));
    let in_time = async |request: Request<'_, Accepted>| {
        let began = Instant::now();
        let error = request.await.unwrap_err();
        assert!(began.elapsed() < Duration::from_millis(1_500), "{error} after {:?}", began.elapsed());
        error
    };
    // Nobody serves commands, so nothing has happened.
    let error = in_time(client.command(&register())).await;
    assert!(matches!(error, Error::NoResponders(_)), "{error}");

    let _command = system.command().await;
    let (registered, key) = (register(), Uuid::now_v7().to_string());
    proxy.swallow();
    let error = in_time(client.command(&registered).key(&key)).await;
    assert!(matches!(&error, Error::OutcomeUnknown { key: told, .. } if *told == key), "{error}");
    // Whoever has the key finds out.
    let direct = connect(&system, system.stack.url("NATS_URL")).await;
    direct.command(&registered).key(&key).await.unwrap();
    assert_eq!(journal::events(&system).await.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_unavailable_is_retried_until_it_is_back() {
    let stack = Stack::private("client");
    let system = System::on(stack.clone()).await;
    let _replicas = [system.command().await, system.projection().await, system.query().await];
    let client = connect(&system, system.stack.url("NATS_URL")).await.with_deadline(tests::PATIENCE);
    let product = system.product(0).await;
    client.session().note(product.position);
    let product = product.id;
    let read = GetProduct { id: Some(product), sku: None };
    for server in ["postgres", "mongodb", "nats"] {
        client.query(&read).await.unwrap();
        tokio::task::block_in_place(|| stack.stop(server));
        let nothing = json!({"id": product});
        let unavailable = async || match server {
            "postgres" => {
                matches!(system.try_command("product.update", nothing.clone()).await, Err(Error::Unavailable(_)))
            }
            "mongodb" => matches!(system.ask("qry.user.list", json!({}), &[]).await, Err(Error::Unavailable(_))),
            _ => true,
        };
        eventually("requests are refused", async || unavailable().await.then_some(())).await;
        let restocks = (0..8).map(|_| client.command(&product::Restock { id: product, quantity: 1 }).into_future());
        let resume = async { tokio::task::block_in_place(|| stack.resume(server)) };
        let (restocked, read, ()) = tokio::join!(join_all(restocks), client.query(&read).into_future(), resume);
        assert!(restocked.iter().all(Result::is_ok) && read.is_ok(), "{server}: {restocked:?} {read:?}");
    }
    assert_eq!(client.query(&read).await.unwrap().stock, 24);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_context_of_the_nats_cli_says_where_to_connect() {
    let system = System::new().await;
    let _command = system.command().await;
    let home = std::env::temp_dir().join(format!("watershed-home-{}", Uuid::now_v7()));
    let contexts = home.join(".config/nats/context");
    std::fs::create_dir_all(&contexts).unwrap();
    let server: async_nats::ServerAddr = system.stack.url("NATS_URL").parse().unwrap();
    let context = json!({
        "url": format!("nats://{}:{}", server.host(), server.port()),
        "user": server.username(), "password": server.password(), "inbox_prefix": "_INBOX.shop",
    });
    std::fs::write(contexts.join("shop.json"), context.to_string()).unwrap();
    std::fs::write(home.join(".config/nats/context.txt"), "shop").unwrap();
    let options = ConnectOptions::context_in(&home.join(".config/nats"), None).unwrap();
    let client = Client::connect(&options.prefix(Some(system.prefix.parse().unwrap()))).await.unwrap();
    client.command(&register()).await.unwrap();
    std::fs::remove_dir_all(home).unwrap();
}
