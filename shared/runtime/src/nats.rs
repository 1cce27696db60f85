//! The connection to NATS. A lost connection is waited out, logged once, and never fatal; start-up waits too.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context;
use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use percent_encoding::percent_decode_str;
use tokio::sync::watch;
use wire::{Prefix, Subjects};

use crate::config::{Password, with_password};

/// How long a dead peer may go unnoticed is twice this.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Between two tries to connect: the library's own wait grows to 4 s, which a client sees as an outage.
const FIRST_RECONNECT: Duration = Duration::from_millis(50);
const LONGEST_RECONNECT: Duration = Duration::from_millis(500);
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
    connected: watch::Receiver<bool>,
}

impl Nats {
    /// Starts to connect, and goes on trying. `role` is the service's name: `command`, `projection` or `query`.
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub async fn connect(config: &NatsConfig, role: &str) -> anyhow::Result<Self> {
        let (options, servers) = nats_options(&config.url()?)?;
        let (up, connected) = watch::channel(false);
        let log = Arc::new(EventLog { up, last_error: Mutex::default() });
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
        // The library's own error may quote the URL, and with it the password.
        let client = options.connect(servers).await.map_err(|error| anyhow::anyhow!("NATS: {}", error.kind()))?;
        Ok(Self { client, subjects: Subjects::new(config.subject_prefix.as_ref()), connected })
    }

    /// Waits until the connection is up.
    pub async fn up(&self) {
        // The sender lives in the client's callback, and the client lives in `self`.
        let _ = self.connected.clone().wait_for(|connected| *connected).await;
    }

    /// Waits until the connection is lost.
    pub async fn down(&self) {
        let _ = self.connected.clone().wait_for(|connected| !connected).await;
    }

    pub fn is_up(&self) -> bool {
        *self.connected.borrow()
    }

    /// Sends what is still to be sent and closes the connection.
    pub async fn close(&self) {
        let closing = async {
            let _ = self.client.flush().await;
            let _ = self.client.drain().await;
        };
        // While the server is away there is nothing to wait for.
        let _ = tokio::time::timeout(Duration::from_secs(2), closing).await;
    }
}

/// What the connection tells of itself. A trouble that lasts is logged once.
struct EventLog {
    up: watch::Sender<bool>,
    last_error: Mutex<String>,
}

impl EventLog {
    fn note(&self, event: &Event) {
        match event {
            Event::Connected => {
                self.up.send_replace(true);
                self.last_error.lock().unwrap_or_else(PoisonError::into_inner).clear();
                tracing::info!("connected to NATS");
            }
            Event::Disconnected => {
                self.up.send_replace(false);
                tracing::warn!("lost the connection to NATS, trying again");
            }
            // A permission that is missing, for one: the caller of what was forbidden sees a time-out only.
            Event::ServerError(_) | Event::ClientError(_) => self.complain(event.to_string()),
            Event::SlowConsumer(subscription) => {
                tracing::error!(subscription, "messages were dropped: a subscription was not read fast enough");
            }
            Event::LameDuckMode | Event::Draining | Event::Closed => tracing::debug!(%event, "NATS"),
        }
    }

    fn complain(&self, error: String) {
        let mut last = self.last_error.lock().unwrap_or_else(PoisonError::into_inner);
        if *last != error {
            tracing::error!(%error, "NATS");
            *last = error;
        }
    }
}

/// Reads a comma-separated list of server URLs, the first with the user and password, which the library would leave aside.
///
/// # Errors
/// If a URL cannot be read.
pub fn nats_options(urls: &str) -> anyhow::Result<(ConnectOptions, Vec<ServerAddr>)> {
    let servers: Vec<ServerAddr> =
        urls.split(',').map(str::parse).collect::<Result<_, _>>().context("cannot read the NATS URL")?;
    let credentials = servers.iter().find_map(|server| server.username().zip(server.password()));
    let options = match credentials {
        Some((user, password)) => ConnectOptions::with_user_and_password(decoded(user), decoded(password)),
        None => ConnectOptions::new(),
    };
    Ok((options, servers))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}
