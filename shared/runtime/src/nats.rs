//! The connection to NATS that publishes and reads events, and talks to JetStream. Requests come by one of their own
//! ([`crate::micro`]): no client may publish to what is subscribed to here. A lost connection is waited out, logged once,
//! and never fatal; start-up waits too. One that has ended for good is an error ([`Nats::gone`]).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, anyhow};
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use bytes::Bytes;
use futures_util::{StreamExt, future::BoxFuture};
use percent_encoding::percent_decode_str;
use tokio::{sync::watch, time::timeout};
use tokio_util::sync::CancellationToken;
use wire::{Prefix, Subjects};

use crate::{
    LogThrottle,
    config::{Password, with_password},
};

/// How long a dead peer may go unnoticed is twice this.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Between two tries to connect: the library's own wait grows to 4 s, which a client sees as an outage.
const FIRST_RECONNECT: Duration = Duration::from_millis(50);
const LONGEST_RECONNECT: Duration = Duration::from_millis(500);
/// How long a new connection may take in the place of one that has ended for good.
const NEW_CONNECTION: Duration = Duration::from_secs(10);
/// How long an answer of the server, or of JetStream, is waited for.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Clone, clap::Args)]
pub struct NatsConfig {
    /// NATS servers, comma-separated, the first with the user and password of this service:
    /// nats://user:password@host:port
    #[arg(long = "nats-url", env = "NATS_URL", hide_env_values = true, default_value = "nats://127.0.0.1:4222")]
    url: String,
    /// A file with the password, instead of the one in the URL
    #[arg(long = "nats-password-file", env = "NATS_PASSWORD_FILE", value_parser = Password::from_file)]
    password: Option<Password>,
    /// One token in front of every subject, for a tenant or a test
    #[arg(long, env = "SUBJECT_PREFIX")]
    pub subject_prefix: Option<Prefix>,
    /// JetStream stream that holds the events
    #[arg(long, env = "STREAM", default_value = "EVENTS")]
    pub stream: String,
}

impl NatsConfig {
    /// The servers, with the user and password.
    ///
    /// # Errors
    /// If the password is in a file, but no user is named.
    pub fn url(&self) -> anyhow::Result<String> {
        with_password(&self.url, self.password.as_ref()).context("NATS_URL")
    }
}

/// A connection, and whether it is up.
#[derive(Clone)]
pub struct Nats {
    pub client: Client,
    pub subjects: Subjects,
    pub(crate) servers: Servers,
    link: watch::Receiver<Link>,
    pub(crate) closed: CancellationToken,
}

/// The connection has ended for good, or that of the requests: nothing comes by it any more, and nothing goes.
#[derive(Debug, thiserror::Error)]
#[error("the connection to NATS has ended")]
pub struct ConnectionClosed;

/// Runs a service; again, when its connection has ended for good and another can be had. `role` is as in [`Nats::connect`].
///
/// # Errors
/// What the service ends with.
pub async fn serve_again(
    config: &NatsConfig,
    role: &str,
    shutdown: &CancellationToken,
    mut serve: impl FnMut() -> BoxFuture<'static, anyhow::Result<()>>,
) -> anyhow::Result<()> {
    loop {
        let ended = serve().await;
        if !ended.as_ref().is_err_and(|error| error.is::<ConnectionClosed>()) {
            return ended;
        }
        tracing::error!("the connection to NATS has ended for good: the service begins anew");
        let nats = Nats::connect(config, role).await?;
        match shutdown.run_until_cancelled(timeout(NEW_CONNECTION, nats.up())).await {
            None => return Ok(()),
            Some(Ok(())) => {}
            Some(Err(_)) => return ended.context("there is no new one to be had"),
        }
        nats.close().await;
    }
}

impl Nats {
    /// Starts to connect, and goes on trying. `role` is the service's name: `command`, `projection` or `query`.
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub async fn connect(config: &NatsConfig, role: &str) -> anyhow::Result<Self> {
        let servers = Servers::parse(&config.url()?)?;
        let (sender, link) = watch::channel(Link::default());
        let log = Arc::new(EventLog { link: sender, servers: servers.to_string(), log_throttle: Mutex::default() });
        let options = servers
            .options()
            .name(format!("watershed {role}"))
            .custom_inbox_prefix(format!("_INBOX_{role}"))
            .retry_on_initial_connect()
            .ping_interval(PING_INTERVAL)
            .reconnect_delay_callback(|tries| (FIRST_RECONNECT * tries.min(10) as u32).min(LONGEST_RECONNECT))
            .request_timeout(Some(REQUEST_TIMEOUT))
            .event_callback(move |event| {
                let log = Arc::clone(&log);
                async move { log.note(&event) }
            });
        // The library's own error may quote the URL, and with it the password.
        let connecting = options.connect(servers.configured.clone()).await;
        let client = connecting.map_err(|error| anyhow!("NATS_URL: {}", error.kind()))?;
        // Nothing ever comes by this subscription. It ends with the task that has the connection, also if that panics.
        let mut witness = client.subscribe(client.new_inbox()).await?;
        let closed = CancellationToken::new();
        let ended = closed.clone();
        tokio::spawn(async move {
            while witness.next().await.is_some() {}
            ended.cancel();
        });
        Ok(Self { client, subjects: Subjects::new(config.subject_prefix.as_ref()), servers, link, closed })
    }

    /// Waits until the connection is up.
    pub async fn up(&self) {
        // The sender lives in the client's callback, and the client lives in `self`.
        let _ = self.link.clone().wait_for(|link| link.is_up).await;
    }

    /// How often the connection has been lost: to be asked before something is asked of NATS, for [`Nats::lost`].
    pub fn losses(&self) -> u64 {
        self.link.borrow().losses
    }

    /// Waits until the connection is lost that was there when so many had been. A loss that is over by now counts too: what
    /// was on its way then does not come.
    pub async fn lost(&self, losses: u64) {
        let mut link = self.link.clone();
        tokio::select! {
            _ = link.wait_for(|link| link.losses != losses) => {}
            () = self.closed.cancelled() => {}
        }
    }

    /// Waits until the connection has ended for good, which no server's absence makes it do.
    pub async fn closed(&self) -> ConnectionClosed {
        self.closed.cancelled().await;
        ConnectionClosed
    }

    pub fn is_up(&self) -> bool {
        self.link.borrow().is_up && !self.closed.is_cancelled()
    }

    /// Whether NATS answers. Asked for is what is known of a stream, which may be whatever it is.
    pub async fn responds(&self, stream: &str) -> bool {
        let answered = self.client.request(format!("$JS.API.STREAM.INFO.{stream}"), Bytes::new());
        self.is_up() && answered.await.is_ok_and(|_| !self.closed.is_cancelled())
    }

    /// Sends what is still to be sent and closes the connection.
    pub async fn close(&self) {
        let closing = async {
            let _ = self.client.flush().await;
            let _ = self.client.drain().await;
        };
        // While the server is away there is nothing to wait for.
        let _ = timeout(Duration::from_secs(2), closing).await;
    }
}

/// What is known of the connection. A state alone would not tell of a loss that is over before somebody looks.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    is_up: bool,
    losses: u64,
}

/// What the connection tells of itself. A trouble that lasts is logged once, and then at long intervals.
struct EventLog {
    link: watch::Sender<Link>,
    servers: String,
    log_throttle: Mutex<LogThrottle>,
}

impl EventLog {
    fn note(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.link.send_modify(|link| link.is_up = true);
                self.log_throttle().reset();
                tracing::info!("connected to NATS");
            }
            Event::Disconnected => {
                self.link.send_modify(|link| *link = Link { is_up: false, losses: link.losses + 1 });
                tracing::warn!("lost the connection to NATS, trying again");
            }
            // A permission that is missing, for one: the caller of what was forbidden sees a time-out only.
            Event::ServerError(error) => self.log_error(&error.to_string()),
            Event::ClientError(error) => self.log_error(&error.to_string()),
            Event::SlowConsumer(subscription) => {
                tracing::error!(subscription, "messages were dropped: a subscription was not read fast enough");
            }
            Event::LameDuckMode | Event::Draining | Event::Closed => tracing::debug!(%event, "NATS"),
        }
    }

    fn log_error(&self, error: &str) {
        // The library says the same of a server that refuses and of a connection that was refused.
        let reason = error.trim_start_matches("nats: ");
        if self.log_throttle().is_due(reason) {
            tracing::error!(servers = self.servers, reason, "trouble with NATS (NATS_URL), trying again");
        }
    }

    /// Nothing that holds this lock can leave it half changed.
    fn log_throttle(&self) -> std::sync::MutexGuard<'_, LogThrottle> {
        self.log_throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The servers that the URL names, and those of their cluster, to be tried in turns.
#[derive(Clone, Debug)]
pub struct Servers {
    configured: Vec<ServerAddr>,
    learned: Vec<ServerAddr>,
    tried: usize,
    credentials: Option<Credentials>,
}

/// How a service proves who it is.
#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

/// Without the password.
impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.user.fmt(f)
    }
}

impl Servers {
    /// Reads a comma-separated list of URLs, the first with the user and password, which the library would leave aside.
    ///
    /// # Errors
    /// If a URL cannot be read.
    fn parse(urls: &str) -> anyhow::Result<Self> {
        let configured: Vec<ServerAddr> =
            urls.split(',').map(str::parse).collect::<Result<_, _>>().context("cannot read NATS_URL")?;
        let credentials = configured.iter().find_map(|server| {
            Some(Credentials { user: decoded(server.username()?), password: decoded(server.password()?) })
        });
        Ok(Self { configured, learned: vec![], tried: 0, credentials })
    }

    fn options(&self) -> ConnectOptions {
        match self.credentials.clone() {
            Some(Credentials { user, password }) => ConnectOptions::with_user_and_password(user, password),
            None => ConnectOptions::new(),
        }
    }

    pub(crate) fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_ref()
    }

    /// The next to be tried.
    pub(crate) fn next(&mut self) -> ServerAddr {
        let all: Vec<&ServerAddr> = self.configured.iter().chain(&self.learned).collect();
        let server = all[self.tried % all.len()].clone();
        self.tried += 1;
        server
    }

    /// Whether there is another to go to.
    pub(crate) fn are_several(&self) -> bool {
        self.configured.len() + self.learned.len() > 1
    }

    /// Notes what a server says of its cluster: `host:port`.
    pub(crate) fn learn(&mut self, addresses: &[String]) {
        let learned = addresses.iter().filter_map(|address| address.parse().ok());
        let known = |server: &ServerAddr| self.configured.iter().any(|it| address(it) == address(server));
        self.learned = learned.filter(|server| !known(server)).collect();
    }
}

/// The addresses, without user and password.
impl std::fmt::Display for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.configured.iter().map(address).collect::<Vec<_>>().join(","))
    }
}

/// Where a server is, without user and password.
pub(crate) fn address(server: &ServerAddr) -> String {
    format!("{}:{}", server.host(), server.port())
}

/// Reads a comma-separated list of server URLs, the first with the user and password.
///
/// # Errors
/// If a URL cannot be read.
pub fn nats_options(urls: &str) -> anyhow::Result<(ConnectOptions, Vec<ServerAddr>)> {
    let servers = Servers::parse(urls)?;
    Ok((servers.options(), servers.configured))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loss_that_is_over_before_anybody_looks_is_seen() {
        #[derive(clap::Parser)]
        struct Settings {
            #[command(flatten)]
            nats: NatsConfig,
        }

        let Settings { nats } = clap::Parser::parse_from(["nats", "--nats-url", "nats://127.0.0.1:1"]);
        let mut nats = Nats::connect(&nats, "query").await.unwrap();
        let (sender, link) = watch::channel(Link { is_up: true, losses: 0 });
        nats.link = link;
        let log = EventLog { link: sender, servers: String::new(), log_throttle: Mutex::default() };
        let before = nats.losses();
        log.note(&Event::Disconnected);
        log.note(&Event::Connected);
        nats.up().await;
        timeout(Duration::from_secs(10), nats.lost(before)).await.unwrap();
        assert!(timeout(Duration::from_millis(1), nats.lost(nats.losses())).await.is_err());
    }
}
