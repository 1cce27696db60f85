//! An installation of Watershed for one test, with its own subject prefix, stream and databases. The test starts
//! replicas of the services in its own process, or in child processes that it can kill.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use clap::Parser;
use client::{Client, ConnectOptions, Error};
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::{task::JoinHandle, time::timeout};
use tokio_postgres::NoTls;
use tokio_util::sync::{CancellationToken, DropGuard};
use uuid::Uuid;
use wire::{Accepted, Prefix, Subjects, nats_options};

use crate::{Answer, Expect, Stack, eventually};

pub struct System {
    pub stack: Arc<Stack>,
    /// The subject prefix, which is also the name of the databases.
    pub prefix: String,
    pub subjects: Subjects,
    pub client: Client,
}

/// A replica in the test's own process. It is stopped when this is dropped.
pub struct Replica {
    stop: DropGuard,
    task: JoinHandle<anyhow::Result<()>>,
}

/// A replica in a child process. It is killed when this is dropped.
pub struct Process(Child);

impl System {
    /// A fresh installation on the shared servers, without any replica.
    pub async fn new() -> Self {
        Self::on(Stack::shared()).await
    }

    /// A fresh installation on these servers.
    pub async fn on(stack: Arc<Stack>) -> Self {
        let prefix = format!("t{}", Uuid::now_v7().simple());
        let subjects = Subjects::new(Some(&prefix.parse::<Prefix>().unwrap()));
        let client = connect_client(&stack, "NATS_URL", &prefix).await;
        let system = Self { stack, prefix, subjects, client };
        let server = connect(system.stack.url("POSTGRES_URL")).await.unwrap();
        server.batch_execute(&format!("create database {}", system.prefix)).await.unwrap();
        system
    }

    /// A fresh installation with one replica of each service.
    pub async fn complete() -> (Self, [Replica; 3]) {
        let system = Self::new().await;
        let replicas = [system.command().await, system.projection().await, system.query().await];
        // A replica of its own may have to wait for servers, so `projection` does not.
        system.offers_operations("projection").await;
        (system, replicas)
    }

    /// Starts a replica of the command service and waits until it answers.
    pub async fn command(&self) -> Replica {
        self.command_with(&[]).await
    }

    pub async fn command_with(&self, arguments: &[&str]) -> Replica {
        let replica = self.start_command(arguments);
        self.answers("command").await;
        replica
    }

    /// Starts a replica of the command service.
    pub fn start_command(&self, arguments: &[&str]) -> Replica {
        let config = command_service::Config::parse_from(self.arguments("command", arguments));
        Replica::start(|stop| command_service::run(config, stop))
    }

    /// Starts a replica of the projection service.
    pub async fn projection(&self) -> Replica {
        self.start_projection(&[])
    }

    pub fn start_projection(&self, arguments: &[&str]) -> Replica {
        let config = projection_service::Config::parse_from(self.arguments("projection", arguments));
        Replica::start(|stop| projection_service::run(config, stop))
    }

    /// Starts a replica of the query service and waits until all views can be queried.
    pub async fn query(&self) -> Replica {
        self.query_with(&[]).await
    }

    pub async fn query_with(&self, arguments: &[&str]) -> Replica {
        let replica = self.start_query(arguments);
        eventually("the views can be queried", async || {
            for (_, query) in views::queries() {
                let example = serde_json::from_str(query.examples.first()?).ok()?;
                let answer = self.ask(&format!("qry.{}", query.name()), example, &[]).await;
                matches!(answer, Ok(_) | Err(Error::NotFound(_))).then_some(())?;
            }
            Some(())
        })
        .await;
        replica
    }

    pub fn start_query(&self, arguments: &[&str]) -> Replica {
        let config = query_service::Config::parse_from(self.arguments("query", arguments));
        Replica::start(|stop| query_service::run(config, stop))
    }

    /// Starts a replica of `command`, `projection` or `query` in a child process.
    pub fn process(&self, role: &str, arguments: &[&str]) -> Process {
        let arguments = self.arguments(role, arguments);
        Process::start(Command::new(binary(role)).args(&arguments[1..]).env("RUST_LOG", "warn"))
    }

    /// The same, with its log written to a file.
    pub fn logged_process(&self, role: &str, arguments: &[&str], log: &Path) -> Process {
        let arguments = self.arguments(role, arguments);
        let log = File::create(log).expect("a file can be made");
        Process::start(Command::new(binary(role)).args(&arguments[1..]).env("RUST_LOG", "warn").stdout(log))
    }

    /// The same with another program for the role than the one that was built with the tests.
    pub fn process_of(&self, program: &Path, role: &str, arguments: &[&str], log: &Path) -> Process {
        let arguments = self.arguments(role, arguments);
        let log = File::options().create(true).append(true).open(log).expect("a file can be made");
        Process::start(Command::new(program).args(&arguments[1..]).env("RUST_LOG", "info").stdout(log))
    }

    /// What every replica of this installation says in `$SRV.STATS`.
    pub async fn all_stats(&self) -> Vec<Value> {
        let nats = self.client.nats();
        let inbox = nats.new_inbox();
        let mut replies = nats.subscribe(inbox.clone()).await.unwrap();
        nats.publish_with_reply("$SRV.STATS", inbox, "".into()).await.unwrap();
        let mut all = Vec::new();
        // Installations of other tests answer too.
        while let Ok(Some(reply)) = timeout(Duration::from_millis(300), replies.next()).await {
            let stats: Value = serde_json::from_slice(&reply.payload).unwrap();
            if stats["metadata"]["prefix"] == self.prefix {
                all.push(stats);
            }
        }
        all
    }

    /// The program `watershed`, for this installation and its NATS as the client, with an empty environment.
    pub fn watershed(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(built("test-watershed"));
        command.env_clear().current_dir("/").args(arguments);
        command.env("NATS_URL", self.stack.url("NATS_URL"));
        command.env("SUBJECT_PREFIX", &self.prefix).env("STREAM", self.stream());
        command
    }

    /// Waits until this replica of the service answers on `$SRV`, to which it subscribes last.
    pub async fn listens(&self, service: &str, replica: &str) {
        let subject = format!("$SRV.PING.{service}.{replica}");
        eventually("the replica answers", async || self.client.nats().request(subject.clone(), "".into()).await.ok())
            .await;
    }

    /// Waits until some replica of the service can be asked for its operations.
    pub async fn offers_operations(&self, service: &str) {
        let nats = self.client.nats();
        eventually("the service offers operations", async || {
            let inbox = nats.new_inbox();
            let mut replies = nats.subscribe(inbox.clone()).await.unwrap();
            nats.publish_with_reply(format!("$SRV.INFO.{service}"), inbox, "".into()).await.unwrap();
            // Installations of other tests answer too.
            while let Ok(Some(reply)) = timeout(Duration::from_millis(300), replies.next()).await {
                let info: Value = serde_json::from_slice(&reply.payload).unwrap_or_default();
                if info["metadata"]["prefix"] == self.prefix {
                    return Some(());
                }
            }
            None
        })
        .await;
    }

    /// Waits until some replica of the service answers.
    pub async fn answers(&self, role: &str) {
        let probe = match role {
            "command" => self.subjects.command("user", "register"),
            _ => self.subjects.query("user", "get"),
        };
        eventually("the service answers", async || {
            matches!(self.ask_with(&probe, "?", &[]).await, Err(Error::Malformed(_))).then_some(())
        })
        .await;
    }

    /// Sends a request such as `cmd.order.create` once, with these headers and no others.
    pub async fn ask(&self, name: &str, body: Value, headers: &[(&str, &str)]) -> Answer {
        self.ask_with(name, body.to_string(), headers).await
    }

    /// The same, with a body that need not be JSON.
    pub async fn ask_with(&self, name: &str, body: impl Into<Bytes>, headers: &[(&str, &str)]) -> Answer {
        let request = self.client.request(name, body).as_given();
        headers.iter().fold(request, |request, (name, value)| request.header(name, value)).reply().await
    }

    /// Asks for an operation such as `view.rebuild`, as the operator.
    pub async fn operate(&self, name: &str, body: Value) -> Answer {
        let operator = self.connect_as("NATS_OPERATOR_URL").await;
        operator.request(&format!("ops.{name}"), body.to_string()).as_given().reply().await
    }

    /// Sends a command such as `order.create`, which must be accepted.
    pub async fn accept(&self, name: &str, body: Value) -> Accepted {
        self.try_command(name, body).await.accepted()
    }

    /// Sends a command that may be refused.
    pub async fn try_command(&self, name: &str, body: Value) -> Answer {
        self.ask(&format!("cmd.{name}"), body, &[]).await
    }

    /// Sends a query with `Min-Position`: the reply reflects all events up to the position.
    pub async fn read(&self, name: &str, body: Value, position: u64) -> Answer {
        self.ask(&format!("qry.{name}"), body, &[(wire::MIN_POSITION, &position.to_string())]).await
    }

    /// Sends the samples of every aggregate.
    ///
    /// # Panics
    /// If one is not answered as it says.
    pub async fn send_samples(&self) {
        for (known, sample) in domain::samples() {
            let name = format!("{}.{}", known.aggregate, known.verb);
            let reply = self.try_command(&name, serde_json::from_str(sample.request).expect("JSON")).await;
            let code = reply.as_ref().err().map(|error| error.code().unwrap_or("not answered"));
            assert_eq!(code, sample.refused, "{name} {}", sample.request);
        }
    }

    /// Registers a user.
    pub async fn user(&self) -> Accepted {
        let email = format!("{}@example.com", Uuid::now_v7().simple());
        self.accept("user.register", json!({"email": email, "name": "Ada Lovelace"})).await
    }

    /// Creates a product at 2.55 GBP.
    pub async fn product(&self, stock: i64) -> Accepted {
        let sku = Uuid::now_v7().simple().to_string();
        let price = json!({"amount": 255, "currency": "GBP"});
        let product = json!({"sku": sku, "name": "White metal lantern", "price": price, "stock": stock});
        self.accept("product.create", product).await
    }

    /// A connection to the journal's database.
    pub async fn journal(&self) -> tokio_postgres::Client {
        connect(&self.postgres_url()).await.unwrap()
    }

    /// The database of the views.
    pub async fn views(&self) -> mongodb::Database {
        let client = mongodb::Client::with_uri_str(self.stack.url("MONGODB_URL")).await.unwrap();
        client.database(&self.prefix)
    }

    /// A connection to NATS as the command service, the only user that may publish events.
    pub async fn relay_user(&self) -> async_nats::Client {
        let (options, servers) = nats_options(self.stack.url("NATS_COMMAND_URL")).unwrap();
        options.custom_inbox_prefix("_INBOX_command").connect(servers).await.unwrap()
    }

    /// A connection to NATS as the operator, who may do everything but publish events.
    pub async fn operator(&self) -> async_nats::Client {
        self.connect_as("NATS_OPERATOR_URL").await.nats().clone()
    }

    /// Another connection, with the user of this URL of the stack.
    pub async fn connect_as(&self, url: &str) -> Client {
        connect_client(&self.stack, url, &self.prefix).await
    }

    /// The name of the stream.
    pub fn stream(&self) -> String {
        format!("EVENTS_{}", self.prefix)
    }

    /// The last position of the journal.
    pub async fn head(&self) -> u64 {
        let row = self.journal().await.query_one("select position from journal_head", &[]).await.unwrap();
        u64::try_from(row.get::<_, i64>(0)).unwrap()
    }

    /// The command line of a service. Arguments in `extra` take precedence over the defaults of the tests.
    fn arguments(&self, role: &str, extra: &[&str]) -> Vec<String> {
        let (nats, store) = match role {
            "command" => ("NATS_COMMAND_URL", ["--postgres-url".to_owned(), self.postgres_url()]),
            "projection" => ("NATS_PROJECTION_URL", self.mongodb_url("MONGODB_PROJECTION_URL")),
            _ => ("NATS_QUERY_URL", self.mongodb_url("MONGODB_QUERY_URL")),
        };
        let store = if extra.contains(&&*store[0]) { vec![] } else { store.to_vec() };
        let mut arguments = vec![format!("{role}-service")];
        if !extra.contains(&"--nats-url") {
            arguments.extend(["--nats-url".to_owned(), self.stack.url(nats).to_owned()]);
        }
        arguments.extend(["--subject-prefix".to_owned(), self.prefix.clone()]);
        if !extra.contains(&"--stream") {
            arguments.extend(["--stream".to_owned(), self.stream()]);
        }
        arguments.extend(store);
        if role != "command" && !extra.contains(&"--database") {
            arguments.extend(["--database".to_owned(), self.prefix.clone()]);
        }
        // On a slow machine a view may take longer than clients would wait, which most tests are not about.
        if role == "query" && !extra.contains(&"--min-position-wait-ms") {
            arguments.extend(["--min-position-wait-ms", "20000"].map(str::to_owned));
        }
        arguments.extend(extra.iter().map(|argument| (*argument).to_owned()));
        arguments
    }

    /// The URL of the journal's database.
    pub fn postgres_url(&self) -> String {
        let url = self.stack.url("POSTGRES_URL");
        let (server, _) = url.rsplit_once('/').expect("the URL names a database");
        format!("{server}/{}", self.prefix)
    }

    fn mongodb_url(&self, name: &str) -> [String; 2] {
        ["--mongodb-url".to_owned(), self.stack.url(name).to_owned()]
    }
}

impl Replica {
    fn start<F>(run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let token = CancellationToken::new();
        Self { task: tokio::spawn(run(token.clone())), stop: token.drop_guard() }
    }

    /// Stops the replica as SIGTERM would, and waits until it has ended.
    pub async fn stop(self) {
        drop(self.stop);
        self.task.await.expect("no panic").expect("no error");
    }

    /// Whether the replica has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.task.is_finished()
    }
}

impl Process {
    /// # Panics
    /// If the program cannot be started.
    pub fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).spawn().expect("the program can be started"))
    }

    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// Sends a signal by its name: `KILL`, `TERM`, `STOP`, `CONT`.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.0.id().to_string()).status();
        assert!(status.expect("kill can be run").success());
    }

    /// Kills the process with SIGKILL.
    pub fn kill(mut self) {
        self.0.kill().expect("it runs");
        self.0.wait().expect("it has ended");
    }

    /// Stops the process with SIGTERM, and waits until it has ended.
    ///
    /// # Panics
    /// If it ends with an error.
    pub async fn stop(mut self) {
        self.signal("TERM");
        eventually("the process has ended", async || self.has_ended().then_some(())).await;
    }

    /// Whether the process has ended by itself.
    ///
    /// # Panics
    /// If it has ended with an error.
    pub fn has_ended(&mut self) -> bool {
        let status = self.0.try_wait().expect("it was started");
        assert!(status.is_none_or(|status| status.success()), "{status:?}");
        status.is_some()
    }

    /// Whether the process has ended by itself with an error.
    ///
    /// # Panics
    /// If it has ended successfully.
    pub fn has_failed(&mut self) -> bool {
        let status = self.0.try_wait().expect("it was started");
        assert!(status.is_none_or(|status| !status.success()), "{status:?}");
        status.is_some()
    }

    /// The resident memory of the process in bytes.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn connect_client(stack: &Stack, url: &str, prefix: &str) -> Client {
    let options = ConnectOptions::url(stack.url(url)).prefix(Some(prefix.parse().unwrap()));
    Client::connect(&options).await.unwrap()
}

async fn connect(url: &str) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.context("PostgreSQL")?;
    tokio::spawn(connection);
    Ok(client)
}

/// The program of a service, without arguments, and with an empty environment.
pub fn program(role: &str) -> Command {
    let mut command = Command::new(binary(role));
    command.env_clear();
    command
}

/// The program of a service that was built with the tests.
pub fn binary(role: &str) -> PathBuf {
    built(&format!("test-{role}-service"))
}

/// The path of a program that cargo builds with the tests.
fn built(name: &str) -> PathBuf {
    // .../target/debug/deps/system-0123456789abcdef, or .../target/release/bench
    let own = std::env::current_exe().expect("the program's own path");
    let candidates = own.ancestors().skip(1).map(|directory| directory.join(name));
    candidates.take(2).find(|path| path.exists()).expect("cargo has built the program")
}
