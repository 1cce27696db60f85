//! MongoDB, as this service uses it: only read, only from the primary, each read bounded in time. While it is away,
//! reads are refused at once.

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use bson::{RawDocument, RawDocumentBuf};
use mongodb::{
    Client, Collection, Database,
    error::{Error, ErrorKind},
    options::{ClientOptions, ReadConcern, ReadPreference},
    raw_batch_cursor::RawBatch,
};
use tokio::{
    sync::{Semaphore, SemaphorePermit, watch},
    time::timeout,
};
use views::layout;
use wire::{Code, Failure};

use crate::{
    positions::ViewPosition,
    reply::{self, internal},
};

/// The server stops a read that takes longer: an index serves each, so it takes milliseconds.
pub const MAX_TIME: Duration = Duration::from_secs(3);
/// How long a read waits for a primary. A failover that is over by then is not noticed outside.
pub const SELECTION: Duration = Duration::from_secs(2);
/// A connection that does not answer at all is given up after this.
const READ_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two looks of the driver at the server: what makes it give a hung one up.
const HEARTBEAT: Duration = Duration::from_secs(5);

const CONNECTIONS: u32 = 64;
/// Pages and reports that are read at the same time. The other connections are left to the lookups and to the look at
/// the positions, which must not queue behind a thousand lists.
const READ_PERMITS: usize = 48;

/// The server's codes for what the driver retries: it is stopping, stepping down, or cannot reach its peers.
const AWAY_CODES: [i32; 13] = [6, 7, 89, 91, 134, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436];
const MAX_TIME_EXPIRED: i32 = 50;

/// The views' database, and whether its server is there.
#[derive(Clone)]
pub struct Store {
    /// Where the server is, for the log.
    pub address: Arc<str>,
    database: Database,
    up: Arc<watch::Sender<bool>>,
    read_permits: Arc<Semaphore>,
}

impl Store {
    /// Starts to connect; counts as away until [`Store::is_back`].
    ///
    /// # Errors
    /// If the URL cannot be read.
    pub async fn new(url: &str, database: &str) -> anyhow::Result<Self> {
        // The driver's error may quote the URL, and with it the password.
        let mut options = ClientOptions::parse(url).await.map_err(|_| anyhow!("cannot read MONGODB_URL"))?;
        let address = options.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        options.app_name = Some("watershed query".to_owned());
        options.max_pool_size = Some(CONNECTIONS);
        options.server_selection_timeout = Some(SELECTION);
        options.connect_timeout = Some(SELECTION);
        options.heartbeat_freq = Some(HEARTBEAT);
        // Every commit that was announced is visible to a local read from the primary, also from one that has just been
        // elected, whose majority snapshot may lag for a moment.
        options.selection_criteria = Some(ReadPreference::Primary.into());
        options.read_concern = Some(ReadConcern::local());
        let client = Client::with_options(options).map_err(|_| anyhow!("cannot use MONGODB_URL"))?;
        Ok(Self {
            address: address.into(),
            database: client.database(database),
            up: Arc::new(watch::channel(false).0),
            read_permits: Arc::new(Semaphore::new(READ_PERMITS)),
        })
    }

    pub fn database(&self) -> &Database {
        &self.database
    }

    /// The collection of a view's generation.
    pub fn collection(&self, view: &str, view_position: ViewPosition) -> Collection<RawDocumentBuf> {
        self.database.collection(&layout::collection(view, view_position.generation))
    }

    /// Waits for the turn of a page or a report.
    pub async fn read_permit(&self) -> Option<SemaphorePermit<'_>> {
        // It is never closed.
        self.read_permits.acquire().await.ok()
    }

    /// Carries a read out.
    ///
    /// # Errors
    /// What is to be answered instead; it has been logged.
    pub async fn read<T>(&self, view: &str, read: impl Future<Output = Result<T, Error>>) -> Result<T, Failure> {
        self.check()?;
        match timeout(READ_TIMEOUT, read).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.failure(view, &error)),
            Err(_) => {
                tracing::warn!(view, "a read was given up: MongoDB did not answer in time");
                Err(reply::unavailable())
            }
        }
    }

    /// The documents of a reply, where they lie in it.
    ///
    /// # Errors
    /// If the reply is broken; it has been logged.
    pub fn documents<'a>(
        &self,
        view: &str,
        reply: &'a RawBatch,
    ) -> Result<impl Iterator<Item = Result<&'a RawDocument, Failure>>, Failure> {
        let documents = reply.doc_slices().map_err(|error| self.failure(view, &error))?;
        Ok(documents.into_iter().map(move |document| {
            let document = document.map_err(|error| internal(view, error))?;
            document.as_document().ok_or_else(|| internal(view, "MongoDB sent something else than documents"))
        }))
    }

    /// # Errors
    /// If MongoDB is away.
    pub fn check(&self) -> Result<(), Failure> {
        if *self.up.borrow() { Ok(()) } else { Err(reply::unavailable()) }
    }

    /// Logs what went wrong with a read, and says what to answer.
    pub fn failure(&self, view: &str, error: &Error) -> Failure {
        match error.kind.as_ref() {
            ErrorKind::Command(command) if command.code == MAX_TIME_EXPIRED => {
                tracing::warn!(view, "a read was stopped by MongoDB: it took too long");
                Failure::new(Code::Overloaded, format!("the query took longer than {} seconds", MAX_TIME.as_secs()))
            }
            _ if no_primary(error) => {
                self.mark_down(error);
                reply::unavailable()
            }
            _ => internal(view, &error.kind),
        }
    }

    /// MongoDB did not answer: reads are refused until [`Store::is_back`].
    pub fn mark_down(&self, error: &Error) {
        if self.set_is_up(false) {
            tracing::error!(error = %error.kind, "MongoDB is away: queries are refused until it is back");
        }
    }

    /// MongoDB answered.
    pub fn mark_up(&self) {
        if self.set_is_up(true) {
            tracing::info!("MongoDB answers");
        }
    }

    /// Whether that is news.
    fn set_is_up(&self, up: bool) -> bool {
        self.up.send_if_modified(|was| std::mem::replace(was, up) != up)
    }

    /// Tells when it goes away or comes back.
    pub fn changes(&self) -> watch::Receiver<bool> {
        self.up.subscribe()
    }
}

/// Whether the error means that no primary answers, rather than that one refused this read.
fn no_primary(error: &Error) -> bool {
    match error.kind.as_ref() {
        ErrorKind::Io(_)
        | ErrorKind::ConnectionPoolCleared { .. }
        | ErrorKind::ServerSelection { .. }
        | ErrorKind::DnsResolve { .. }
        | ErrorKind::Authentication { .. } => true,
        ErrorKind::Command(command) => AWAY_CODES.contains(&command.code),
        // The driver's enum, which may grow.
        _ => false,
    }
}
