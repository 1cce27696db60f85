//! The connection to NATS that publishes and reads events, and talks to JetStream. Requests arrive on a connection of
//! their own ([`crate::micro`]), since clients must not be able to send anything to this one. While the server is
//! down, the connection is retried and the outage logged once; at the start too. A connection that is closed for good
//! is an error ([`Nats::closed`]).

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, anyhow};
use async_nats::{Client, Event, Message, ServerAddr};
use bytes::Bytes;
use futures_util::{StreamExt, future::BoxFuture};
use serde::Deserialize;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use wire::{Credentials, Prefix, Subjects, nats_options, parse_servers};

use crate::{
    LogThrottle, Server, ServerStatus,
    config::{Password, with_password},
};

/// The interval of pings. A dead server is noticed after two of them.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// The delays between two attempts to connect. The library's own grow to 4 s, which clients would notice as an outage.
const FIRST_RECONNECT: Duration = Duration::from_millis(50);
const LONGEST_RECONNECT: Duration = Duration::from_millis(500);
/// How long to try to open a new connection in place of one that was closed for good.
const NEW_CONNECTION: Duration = Duration::from_secs(10);
/// How long to wait for a response of the server, or of JetStream.
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
    /// If the password is in a file, but the URL names no user.
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
    pub status: ServerStatus,
    pub(crate) closed: CancellationToken,
}

/// The state of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct StreamState {
    pub messages: u64,
    pub bytes: u64,
    #[serde(rename = "last_seq")]
    pub last_sequence: u64,
}

/// The connection to NATS, or the one for requests, is closed for good: nothing can be sent or received any more.
#[derive(Debug, thiserror::Error)]
#[error("the connection to NATS is closed")]
pub struct ConnectionClosed;

/// Runs a service, and starts it again if its connection was closed for good and a new one can be opened. `role` is
/// as in [`Nats::connect`].
///
/// # Errors
/// The service's error, if it was another, or if there is no new connection.
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
        tracing::error!("the connection to NATS was closed for good: restarting the service");
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
    /// Starts to connect, and keeps trying. `role` is the service's name: `command`, `projection` or `query`.
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub async fn connect(config: &NatsConfig, role: &str) -> anyhow::Result<Self> {
        let url = config.url()?;
        let (servers, (options, _)) = (Servers::parse(&url)?, nats_options(&url)?);
        let status = ServerStatus::new(Server::Nats);
        let log =
            Arc::new(EventLog { status: status.clone(), servers: servers.to_string(), log_throttle: Mutex::default() });
        let options = options
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
        // The library's own error may quote the URL, and with it the password, so it is left out.
        let connecting = options.connect(servers.configured.clone()).await;
        let client = connecting.map_err(|error| anyhow!("NATS_URL: {}", error.kind()))?;
        // Nothing is ever sent to this subject. The subscription ends with the task that runs the connection, even if
        // that task panics.
        let mut witness = client.subscribe(client.new_inbox()).await?;
        let closed = CancellationToken::new();
        let ended = closed.clone();
        tokio::spawn(async move {
            while witness.next().await.is_some() {}
            ended.cancel();
        });
        Ok(Self { client, subjects: Subjects::new(config.subject_prefix.as_ref()), servers, status, closed })
    }

    /// Waits until the connection is up.
    pub async fn up(&self) {
        self.status.up().await;
    }

    /// How often the connection has been lost. To be read before a request to NATS, for [`Nats::lost`].
    pub fn losses(&self) -> u64 {
        self.status.losses()
    }

    /// Waits until the connection has been lost more than `losses` times. A loss that has been repaired meanwhile
    /// counts too, since the responses that were in flight will never arrive.
    pub async fn lost(&self, losses: u64) {
        tokio::select! {
            () = self.status.lost(losses) => {}
            () = self.closed.cancelled() => {}
        }
    }

    /// Waits until the connection is closed for good. An unreachable server does not close it.
    pub async fn closed(&self) -> ConnectionClosed {
        self.closed.cancelled().await;
        ConnectionClosed
    }

    pub fn is_up(&self) -> bool {
        self.status.is_up() && !self.closed.is_cancelled()
    }

    /// The state of a stream; `None` if there is no such stream.
    ///
    /// # Errors
    /// If NATS does not answer, or not as it should.
    pub async fn stream_state(&self, stream: &str) -> anyhow::Result<Option<StreamState>> {
        #[derive(Deserialize)]
        struct Info {
            state: Option<StreamState>,
        }

        anyhow::ensure!(self.is_up(), "NATS does not answer");
        let reply = self.client.request(format!("$JS.API.STREAM.INFO.{stream}"), Bytes::new()).await?;
        let Info { state } = serde_json::from_slice(&reply.payload)?;
        Ok(state)
    }

    /// Sends a request to all who hear the subject, and returns the replies that come until `quiet` has passed without
    /// one, or `at_most` in all.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn gather(&self, subject: String, quiet: Duration, at_most: Duration) -> anyhow::Result<Vec<Message>> {
        // Services answer to `_INBOX.` only, where this user may listen under a name of its own.
        let inbox = format!("_INBOX.{}", self.client.new_inbox().trim_start_matches("_INBOX_"));
        let mut replies = self.client.subscribe(inbox.clone()).await?;
        self.client.publish_with_reply(subject, inbox, Bytes::new()).await?;
        let mut gathered = Vec::new();
        let gathering = async {
            while let Ok(Some(reply)) = timeout(quiet, replies.next()).await {
                if reply.status.is_none() {
                    gathered.push(reply);
                }
            }
        };
        let _ = timeout(at_most, gathering).await;
        Ok(gathered)
    }

    /// Whether NATS responds. It is asked for information about a stream, which need not exist.
    pub async fn responds(&self, stream: &str) -> bool {
        let answered = self.client.request(format!("$JS.API.STREAM.INFO.{stream}"), Bytes::new());
        self.is_up() && answered.await.is_ok_and(|_| !self.closed.is_cancelled())
    }

    /// Sends what is still buffered, and closes the connection.
    pub async fn close(&self) {
        let closing = async {
            let _ = self.client.flush().await;
            let _ = self.client.drain().await;
        };
        // Sending is bounded in time, since the server may be down.
        let _ = timeout(Duration::from_secs(2), closing).await;
    }
}

/// Logs the connection's events. An error that persists is logged once, and then at long intervals.
struct EventLog {
    status: ServerStatus,
    servers: String,
    log_throttle: Mutex<LogThrottle>,
}

impl EventLog {
    fn note(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.status.set_up(true);
                self.log_throttle().reset();
                tracing::info!("connected to NATS");
            }
            Event::Disconnected => {
                self.status.set_up(false);
                tracing::warn!("the connection to NATS was lost, reconnecting");
            }
            // A missing permission, for example: the caller of the forbidden operation only sees a timeout.
            Event::ServerError(error) => self.log_error(&error.to_string()),
            Event::ClientError(error) => self.log_error(&error.to_string()),
            Event::SlowConsumer(subscription) => {
                tracing::error!(subscription, "slow consumer: messages of a subscription were dropped");
            }
            Event::LameDuckMode | Event::Draining | Event::Closed => tracing::debug!(%event, "NATS"),
        }
    }

    fn log_error(&self, error: &str) {
        // The library reports an error of the server and a refused connection with different prefixes.
        let reason = error.trim_start_matches("nats: ");
        if self.log_throttle().is_due(reason) {
            tracing::error!(servers = self.servers, reason, "NATS reported an error (NATS_URL), retrying");
        }
    }

    /// A panic cannot poison the lock: no code that holds it can leave the data half changed.
    fn log_throttle(&self) -> std::sync::MutexGuard<'_, LogThrottle> {
        self.log_throttle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The servers in the URL, and those that they report of their cluster, to be tried in turn.
#[derive(Clone, Debug)]
pub struct Servers {
    configured: Vec<ServerAddr>,
    learned: Vec<ServerAddr>,
    tried: usize,
    credentials: Option<Credentials>,
}

impl Servers {
    /// Reads comma-separated URLs, of which the first has the user and password.
    ///
    /// # Errors
    /// If a URL cannot be read.
    fn parse(urls: &str) -> anyhow::Result<Self> {
        let (configured, credentials) = parse_servers(urls).context("cannot read NATS_URL")?;
        Ok(Self { configured, learned: vec![], tried: 0, credentials })
    }

    pub(crate) fn credentials(&self) -> Option<&Credentials> {
        self.credentials.as_ref()
    }

    /// The next server to try.
    pub(crate) fn next(&mut self) -> ServerAddr {
        let all: Vec<&ServerAddr> = self.configured.iter().chain(&self.learned).collect();
        let server = all[self.tried % all.len()].clone();
        self.tried += 1;
        server
    }

    /// Whether there is more than one server.
    pub(crate) fn are_several(&self) -> bool {
        self.configured.len() + self.learned.len() > 1
    }

    /// Adds the servers of the cluster that a server has reported, each as `host:port`.
    pub(crate) fn learn(&mut self, addresses: &[String]) {
        let learned = addresses.iter().filter_map(|address| address.parse().ok());
        let known = |server: &ServerAddr| self.configured.iter().any(|it| address(it) == address(server));
        self.learned = learned.filter(|server| !known(server)).collect();
    }
}

/// Shows the addresses of the configured servers, without user and password.
impl std::fmt::Display for Servers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.configured.iter().map(address).collect::<Vec<_>>().join(","))
    }
}

/// The server's address, without user and password.
pub(crate) fn address(server: &ServerAddr) -> String {
    format!("{}:{}", server.host(), server.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_loss_that_was_repaired_before_anybody_looked_is_noticed() {
        #[derive(clap::Parser)]
        struct Settings {
            #[command(flatten)]
            nats: NatsConfig,
        }

        let Settings { nats } = clap::Parser::parse_from(["nats", "--nats-url", "nats://127.0.0.1:1"]);
        let nats = Nats::connect(&nats, "query").await.unwrap();
        nats.status.set_up(true);
        let log = EventLog { status: nats.status.clone(), servers: String::new(), log_throttle: Mutex::default() };
        let before = nats.losses();
        log.note(&Event::Disconnected);
        log.note(&Event::Connected);
        nats.up().await;
        timeout(Duration::from_secs(10), nats.lost(before)).await.unwrap();
        assert!(timeout(Duration::from_millis(1), nats.lost(nats.losses())).await.is_err());
    }
}
