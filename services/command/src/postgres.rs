//! The connections to PostgreSQL, and whether the server is up: while it is down, commands are refused at once.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime, Status};
use runtime::{Backoff, LogThrottle, Monitor, Server, ServerStatus};
use tokio::time::timeout;
use tokio_postgres::{
    NoTls,
    config::Host,
    error::{DbError, SqlState},
};

/// How long to wait for a connection before the server counts as down.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long to wait for a response. A server that hangs, or that is behind a route which drops all packets, does not
/// close the connection, and does not enforce its own timeouts. The statements take milliseconds.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(3);

/// How long a server that is merely busy may take to respond.
const PROMPT_RESPONSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Statements take milliseconds, so one that exceeds the timeout is a fault. Locks of other lanes are held for
/// milliseconds too. All statements find their rows by index; but a plan that was made while a table was small, and
/// is kept while the table grows, would scan the whole table every time, so such plans are disabled.
const SESSION: &str = "-c statement_timeout=10s -c idle_in_transaction_session_timeout=30s -c lock_timeout=1s \
    -c enable_seqscan=off -c enable_hashjoin=off -c enable_mergejoin=off -c jit=off";

/// The server did not respond in time; it may still carry out the request.
#[derive(Debug, thiserror::Error)]
#[error("PostgreSQL did not respond within {} seconds", RESPONSE_TIMEOUT.as_secs())]
pub struct TimedOut;

/// Waits for a response of the server, for a limited time.
///
/// # Errors
/// [`TimedOut`], or the server's error. After a timeout the connection must not be reused: the response may come later.
pub async fn with_timeout<T, E>(asked: impl Future<Output = Result<T, E>>) -> anyhow::Result<T>
where
    E: std::error::Error + Send + Sync + 'static,
{
    match timeout(RESPONSE_TIMEOUT, asked).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(TimedOut.into()),
    }
}

/// A pool of connections, and whether the server is up.
#[derive(Clone)]
pub struct Postgres {
    pool: Pool,
    /// The server's address, for the log.
    address: Arc<str>,
    pub status: ServerStatus,
}

impl Postgres {
    /// # Errors
    /// If the URL cannot be read.
    pub fn new(url: &str, connections: usize) -> anyhow::Result<Self> {
        let settings = settings(url)?;
        let address = address(&settings).into();
        let manager =
            Manager::from_config(settings, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Verified });
        let pool = Pool::builder(manager)
            .max_size(connections)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(CONNECT_TIMEOUT))
            .create_timeout(Some(CONNECT_TIMEOUT))
            // A connection that was returned while the server was not responding is checked before it is used again.
            .recycle_timeout(Some(CONNECT_TIMEOUT))
            .build()?;
        Ok(Self { pool, address, status: ServerStatus::new(Server::Postgres) })
    }

    pub async fn get(&self) -> Result<deadpool_postgres::Object, deadpool_postgres::PoolError> {
        self.pool.get().await
    }

    pub fn is_up(&self) -> bool {
        self.status.is_up()
    }

    /// Shows how the pool is used.
    pub fn show_pool(&self, monitor: &Monitor) {
        let pool = self.pool.clone();
        monitor.add_figures(move |figures| {
            let Status { max_size, size, available, waiting } = pool.status();
            figures.connections(Server::Postgres, size - available.min(size), available, max_size, waiting);
        });
    }

    /// Says that the server did not respond. From then on it is pinged until it does.
    pub fn mark_down(&self) {
        if !self.status.set_up(false) {
            return;
        }
        tracing::error!(server = &*self.address, "PostgreSQL is unreachable: commands are refused until it responds");
        let postgres = self.clone();
        tokio::spawn(async move {
            postgres.wait_until_up().await;
            tracing::info!("PostgreSQL responds again");
        });
    }

    /// Says that the server has responded.
    pub fn mark_up(&self) {
        self.status.set_up(true);
    }

    /// Whether the server responds promptly.
    pub async fn responds(&self) -> bool {
        timeout(PROMPT_RESPONSE_TIMEOUT, self.ping()).await.is_ok_and(|answer| answer.is_ok())
    }

    async fn ping(&self) -> anyhow::Result<()> {
        with_timeout(self.pool.get().await?.simple_query("select 1")).await?;
        Ok(())
    }

    /// Waits until the server responds.
    pub async fn wait_until_up(&self) {
        let (mut backoff, mut log_throttle) = (Backoff::default(), LogThrottle::default());
        loop {
            match self.ping().await {
                Ok(()) => {
                    self.mark_up();
                    return;
                }
                Err(error) => {
                    let reason = describe(&error);
                    if log_throttle.is_due(&reason) {
                        let server = &*self.address;
                        tracing::warn!(server, reason, "cannot connect to PostgreSQL (POSTGRES_URL), retrying");
                    }
                }
            }
            backoff.wait().await;
        }
    }
}

/// # Errors
/// If the URL cannot be read.
pub fn settings(url: &str) -> anyhow::Result<tokio_postgres::Config> {
    // The error must not quote the URL, which contains a password.
    let mut settings: tokio_postgres::Config = url.parse().context("cannot read POSTGRES_URL")?;
    settings
        .application_name("watershed command")
        .options(SESSION)
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives_idle(Duration::from_secs(10))
        .keepalives_interval(Duration::from_secs(3))
        .keepalives_retries(3)
        .tcp_user_timeout(Duration::from_secs(20));
    Ok(settings)
}

/// The hosts and ports, without user and password.
fn address(settings: &tokio_postgres::Config) -> String {
    let ports = settings.get_ports();
    let host = |host: &Host| match host {
        Host::Tcp(name) => name.clone(),
        Host::Unix(path) => path.display().to_string(),
    };
    let hosts = settings.get_hosts().iter().enumerate();
    let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(5432);
    hosts.map(|(index, it)| format!("{}:{}", host(it), port(index))).collect::<Vec<_>>().join(",")
}

/// Whether the error means that the connection or the server is lost, or that the server is read-only, rather than
/// that it refused a statement.
pub fn is_lost(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else {
        return true;
    };
    // Connection exceptions, insufficient resources, operator intervention; a server in recovery.
    ["08", "53", "57P"].iter().any(|class| code.code().starts_with(class))
        || *code == SqlState::READ_ONLY_SQL_TRANSACTION
}

/// The error with all its causes in one line. Of the server's errors, the details are left out, which may quote what is
/// stored.
pub fn describe(error: &anyhow::Error) -> String {
    let texts = error.chain().map(|cause| match cause.downcast_ref::<DbError>() {
        Some(error) => format!("{}: {} ({})", error.severity(), error.message(), error.code().code()),
        None => cause.to_string(),
    });
    texts.collect::<Vec<_>>().join(": ")
}
