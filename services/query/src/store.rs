//! The connection to MongoDB as this service uses it: it only reads, only from the primary, and every read is bounded
//! in time. While MongoDB is down, queries are refused at once.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::anyhow;
use bson::{RawDocument, RawDocumentBuf};
use mongodb::{
    Client, Collection, Database,
    error::{Error, ErrorKind},
    options::{ClientOptions, ReadConcern, ReadPreference},
    raw_batch_cursor::RawBatch,
};
use runtime::{
    Histogram, Monitor, Server, ServerStatus, mongodb_driver,
    traces::{Ended, Kind, database},
};
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};
use views::layout;
use wire::{Code, Failure};

use crate::{
    metrics::Metrics,
    reply::{self, internal},
};

/// How long MongoDB may work on a read before it stops it. An index serves every read, so they take milliseconds.
pub const MAX_TIME: Duration = Duration::from_secs(3);
/// How long a read waits for a primary to be elected. Clients do not notice a failover that takes less.
pub const SELECTION: Duration = Duration::from_secs(2);
/// How long a read may take as a whole, when the connection does not answer at all.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the driver checks the server, which is how it notices that a server hangs.
const HEARTBEAT: Duration = Duration::from_secs(5);

const CONNECTIONS: u32 = 64;
/// How many pages and reports are read at the same time. The other connections are left to lookups and to reading the
/// positions, neither of which must queue behind a thousand lists.
const READ_PERMITS: usize = 48;

/// The server's error codes that the driver would retry: it is stopping, stepping down, or cannot reach its peers.
const UNAVAILABLE_CODES: [i32; 13] = [6, 7, 89, 91, 134, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436];
const MAX_TIME_EXPIRED: i32 = 50;

/// The views' database, and whether its server is up.
#[derive(Clone)]
pub struct Store {
    /// The server's address, for the log.
    pub address: Arc<str>,
    database: Database,
    pub status: ServerStatus,
    metrics: Arc<Metrics>,
    read_permits: Arc<Semaphore>,
}

impl Store {
    /// Starts to connect. The server counts as down until [`Store::mark_up`].
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub async fn new(url: &str, database: &str, monitor: &Monitor, metrics: Arc<Metrics>) -> anyhow::Result<Self> {
        // The driver's error may quote the URL, and with it the password, so it is left out.
        let mut options = ClientOptions::parse(url).await.map_err(|_| anyhow!("cannot read MONGODB_URL"))?;
        let address = options.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        options.app_name = Some("watershed query".to_owned());
        options.max_pool_size = Some(CONNECTIONS);
        options.cmap_event_handler = Some(mongodb_driver::observe_pool(monitor, CONNECTIONS));
        options.server_selection_timeout = Some(SELECTION);
        options.connect_timeout = Some(SELECTION);
        options.heartbeat_freq = Some(HEARTBEAT);
        // Every commit that was announced is visible to a local read from the primary, even from one that has just been
        // elected and whose majority snapshot may lag for a moment.
        options.selection_criteria = Some(ReadPreference::Primary.into());
        options.read_concern = Some(ReadConcern::local());
        let client = Client::with_options(options).map_err(|_| anyhow!("cannot use MONGODB_URL"))?;
        Ok(Self {
            address: address.into(),
            database: client.database(database),
            status: ServerStatus::new(Server::Mongodb),
            metrics,
            read_permits: Arc::new(Semaphore::new(READ_PERMITS)),
        })
    }

    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The collection that holds a generation of a view.
    pub fn collection(&self, view: &str, generation: i32) -> Collection<RawDocumentBuf> {
        self.database.collection(&layout::collection(view, generation))
    }

    /// Waits for the permit that a page or a report needs.
    pub async fn read_permit(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.read_permits.acquire().await.ok()
    }

    /// Measures a read, with all its batches, until this is dropped.
    pub fn time_read(&self) -> ReadTimer<'_> {
        ReadTimer { durations: &self.metrics.read_duration, started: Instant::now() }
    }

    /// Runs a read.
    ///
    /// # Errors
    /// The failure to answer with, after it has been logged.
    pub async fn read<T>(&self, view: &str, read: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        self.check()?;
        match timeout(READ_TIMEOUT, read).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failure(view, &error)),
            Err(_) => {
                tracing::warn!(view, "a read timed out: MongoDB did not answer");
                Err(reply::unavailable())
            }
        }
    }

    /// The documents of a reply, borrowed from it.
    ///
    /// # Errors
    /// If the reply is broken, after that has been logged.
    pub fn documents<'a>(
        &self,
        view: &str,
        reply: &'a RawBatch,
    ) -> Result<impl Iterator<Item = Result<&'a RawDocument, Failure>>, Failure> {
        let documents = reply.doc_slices().map_err(|error| self.failure(view, &error))?;
        Ok(documents.into_iter().map(move |document| {
            let document = document.map_err(|error| internal(view, error))?;
            document.as_document().ok_or_else(|| internal(view, "MongoDB sent something other than documents"))
        }))
    }

    /// # Errors
    /// If MongoDB is down.
    pub fn check(&self) -> Result<(), Failure> {
        if self.status.is_up() { Ok(()) } else { Err(reply::unavailable()) }
    }

    /// Logs why a read failed, and returns the failure to answer with.
    pub fn failure(&self, view: &str, error: &Error) -> Failure {
        match error.kind.as_ref() {
            ErrorKind::Command(command) if command.code == MAX_TIME_EXPIRED => {
                tracing::warn!(view, "MongoDB stopped a read that exceeded its time limit");
                Failure::new(Code::Overloaded, format!("the query took longer than {} seconds", MAX_TIME.as_secs()))
            }
            _ if no_primary(error) => {
                self.mark_down(error);
                reply::unavailable()
            }
            _ => internal(view, mongodb_driver::describe(error)),
        }
    }

    /// Says that MongoDB did not answer: queries are refused until [`Store::mark_up`].
    pub fn mark_down(&self, error: &Error) {
        if self.status.set_up(false) {
            tracing::error!(
                error = mongodb_driver::describe(error),
                "MongoDB is unreachable: queries are refused until it answers again"
            );
        }
    }

    /// Says that MongoDB answered.
    pub fn mark_up(&self) {
        if self.status.set_up(true) {
            tracing::info!("connected to MongoDB");
        }
    }
}

/// A read that is going on.
pub struct ReadTimer<'a> {
    durations: &'a Histogram,
    started: Instant,
}

impl Drop for ReadTimer<'_> {
    fn drop(&mut self) {
        self.durations.observe(self.started.elapsed().as_secs_f64());
    }
}

/// The span of a read that has ended now.
pub fn read_span(operation: &'static str, view: &str, requests: usize, began: SystemTime) -> Ended {
    let ended = Ended::new(format!("{operation} {view}"), Kind::Client, began, SystemTime::now());
    ended.with(database("mongodb", operation, view, requests))
}

/// Whether the error means that no primary can be reached, rather than that the primary refused this read.
fn no_primary(error: &Error) -> bool {
    match error.kind.as_ref() {
        ErrorKind::Io(_)
        | ErrorKind::ConnectionPoolCleared { .. }
        | ErrorKind::ServerSelection { .. }
        | ErrorKind::DnsResolve { .. }
        | ErrorKind::Authentication { .. } => true,
        ErrorKind::Command(command) => UNAVAILABLE_CODES.contains(&command.code),
        // The enum is the driver's and non-exhaustive.
        _ => false,
    }
}
