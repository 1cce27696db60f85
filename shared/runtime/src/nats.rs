//! The connection to NATS. A lost connection is waited out, logged once, and never fatal; start-up waits too.

use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerError};
use tokio::sync::watch;
use wire::{Prefix, Subjects};

/// How long a dead peer may go unnoticed is twice this.
const PING_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Clone, clap::Args)]
pub struct NatsConfig {
    /// NATS server, with the user and password of this service: nats://user:password@host:port
    #[arg(long = "nats-url", env = "NATS_URL", hide_env_values = true)]
    pub url: String,
    /// One token in front of every subject, for a tenant or a test
    #[arg(long, env = "SUBJECT_PREFIX")]
    pub subject_prefix: Option<Prefix>,
    /// JetStream stream that holds the events
    #[arg(long, env = "STREAM", default_value = "EVENTS")]
    pub stream: String,
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
        let (up, connected) = watch::channel(false);
        let client = ConnectOptions::new()
            .name(format!("watershed {role}"))
            .custom_inbox_prefix(format!("_INBOX_{role}"))
            .retry_on_initial_connect()
            .ping_interval(PING_INTERVAL)
            .request_timeout(Some(Duration::from_secs(5)))
            .event_callback(move |event| {
                let up = up.clone();
                async move { note(&event, &up) }
            })
            .connect(config.url.as_str())
            .await
            // The library's error may quote the URL, and with it the password.
            .map_err(|error| anyhow::anyhow!("cannot use the NATS URL: {}", error.kind()))?;
        Ok(Self { client, subjects: Subjects::new(config.subject_prefix.as_ref()), connected })
    }

    /// Waits until the connection is up.
    pub async fn up(&self) {
        // The sender lives in the client's callback, and the client lives in `self`.
        let _ = self.connected.clone().wait_for(|connected| *connected).await;
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

fn note(event: &Event, up: &watch::Sender<bool>) {
    match event {
        Event::Connected => {
            up.send_replace(true);
            tracing::info!("connected to NATS");
        }
        Event::Disconnected => {
            up.send_replace(false);
            tracing::warn!("lost the connection to NATS, trying again");
        }
        // The caller of what was forbidden sees a time-out only.
        Event::ServerError(ServerError::Other(error)) => tracing::error!(%error, "NATS refused something"),
        Event::ServerError(error) => tracing::error!(%error, "NATS refused something"),
        Event::SlowConsumer(subscription) => {
            tracing::error!(subscription, "messages were dropped: a subscription was not read fast enough");
        }
        Event::LameDuckMode | Event::Draining | Event::Closed => tracing::debug!(%event, "NATS"),
        Event::ClientError(error) => tracing::warn!(%error, "NATS"),
    }
}
