//! A lane: one batch at a time. It takes what is waiting, runs it, answers, and takes what has gathered meanwhile; nobody
//! waits for a batch to fill. What the journal took is acknowledged, and what it did not take is said not to be.

use std::{sync::Arc, time::Duration};

use runtime::{Nats, now};
use tokio::{
    sync::{Mutex, mpsc},
    time::Instant,
};
use tokio_util::task::TaskTracker;
use wire::{Code, Failure};

use crate::{
    batch::{self, BatchError, Outcome, Unsettled, Written},
    handover::Handover,
    intake::{Command, Requester, Waiting},
    journal::Session,
    postgres::Postgres,
};

/// How often a batch is tried again that was too slow for another.
const RACES: usize = 5;
/// How long the server may take to come back and tell what became of a transaction.
const SETTLE: Duration = Duration::from_secs(10);
/// What an event's headers may need of the largest message that the NATS server takes, in bytes.
const HEADER_ROOM: usize = 4096;

pub struct Lane {
    pub waiting: Arc<Mutex<mpsc::Receiver<Waiting>>>,
    pub batch_commands: usize,
    pub postgres: Postgres,
    pub nats: Nats,
    pub handover: Handover,
    /// The replies on their way out.
    pub replies: TaskTracker,
}

impl Lane {
    /// Runs until the queue is closed and empty.
    pub async fn run(self) {
        while self.step().await {}
    }

    /// One batch; `false` if there will be none any more.
    async fn step(&self) -> bool {
        let mut waiting = Vec::new();
        if self.waiting.lock().await.recv_many(&mut waiting, self.batch_commands).await == 0 {
            return false;
        }
        let (commands, requesters): (Vec<Command>, Vec<Requester>) =
            waiting.into_iter().map(|Waiting { command, requester }| (command, requester)).unzip();
        let outcomes = self.answer(&commands).await;
        self.replies.spawn(async move {
            for (requester, outcome) in requesters.into_iter().zip(outcomes) {
                requester.answer(outcome).await;
            }
        });
        true
    }

    /// Runs the commands, in one batch if that goes well. A batch that fails is split, so that one bad command cannot
    /// take others with it.
    async fn answer(&self, commands: &[Command]) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(commands.len());
        let mut left = vec![commands];
        while let Some(part) = left.pop() {
            match self.attempt(part).await {
                Ok(written) => {
                    outcomes.extend(written.outcomes);
                    if let Some(committed) = written.committed {
                        self.handover.committed(&self.nats, committed).await;
                    }
                }
                Err(error) if part.len() > 1 && error.is_for_one() => {
                    tracing::warn!(%error, commands = part.len(), "a batch failed: split");
                    let (first, second) = part.split_at(part.len() / 2);
                    left.extend([second, first]);
                }
                Err(error) => {
                    let failure = self.failure(&error, part);
                    outcomes.extend(part.iter().map(|_| Err(failure.clone())));
                }
            }
        }
        outcomes
    }

    /// Runs the commands as one batch, again where a lost race or a broken connection is to blame.
    async fn attempt(&self, commands: &[Command]) -> Result<Written, BatchError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let max_event_bytes = self.nats.client.max_payload().saturating_sub(HEADER_ROOM);
            let session = self.session().await?;
            let failed = match batch::run(&session, commands, now(), max_event_bytes).await {
                Ok(written) => return Ok(written),
                Err(error) => error,
            };
            match failed {
                BatchError::Race if tries < RACES => {
                    if session.rollback().await.is_err() {
                        session.discard();
                    }
                }
                // A connection may have broken while it lay in the pool: the next try has a new one.
                BatchError::Away(_) if tries == 1 => session.discard(),
                BatchError::Unknown(error, unsettled) => {
                    session.discard();
                    match self.settle(&unsettled).await {
                        Some(Fate::Committed(base)) => return Ok(unsettled.decided.written(base)),
                        Some(Fate::RolledBack) if tries < RACES => {}
                        Some(Fate::RolledBack) => return Err(BatchError::Away(error)),
                        None => return Err(BatchError::Unknown(error, unsettled)),
                    }
                }
                error => {
                    session.discard();
                    return Err(error);
                }
            }
        }
    }

    async fn session(&self) -> Result<Session, BatchError> {
        let client = self.postgres.get().await.map_err(|error| BatchError::NoConnection(error.into()))?;
        Session::open(client).await.map_err(|error| BatchError::NoConnection(error.into()))
    }

    /// Asks what became of a transaction whose commit was not answered. `None` if that cannot be told in time.
    async fn settle(&self, unsettled: &Unsettled) -> Option<Fate> {
        let deadline = Instant::now() + SETTLE;
        let mut backoff = runtime::Backoff::default();
        while Instant::now() < deadline {
            match self.fate(unsettled).await {
                Ok(Some(fate)) => return Some(fate),
                // It is still open: the server has not noticed yet that its client is gone.
                Ok(None) => {}
                Err(error) => tracing::debug!(error = format!("{error:#}"), "cannot ask for a transaction's fate yet"),
            }
            backoff.wait().await;
        }
        None
    }

    async fn fate(&self, unsettled: &Unsettled) -> anyhow::Result<Option<Fate>> {
        let client = self.postgres.get().await?;
        let row = client.query_one("select pg_xact_status($1::text::xid8)", &[&unsettled.transaction]).await?;
        let status: Option<String> = row.try_get(0)?;
        match status.as_deref() {
            Some("committed") => {}
            Some("aborted") => return Ok(Some(Fate::RolledBack)),
            _ => return Ok(None),
        }
        let base = match unsettled.decided.first_event() {
            Some((id, version)) => {
                let version = i64::try_from(version)?;
                let statement = "select position - 1 from events where id = $1 and version = $2";
                client.query_one(statement, &[&id, &version]).await?
            }
            None => client.query_one("select position from journal_head", &[]).await?,
        };
        Ok(Some(Fate::Committed(base.try_get(0)?)))
    }

    /// What is said of commands that could not be run, after it has been logged.
    fn failure(&self, error: &BatchError, commands: &[Command]) -> Failure {
        match error {
            BatchError::NoConnection(_) | BatchError::Away(_) => {
                self.postgres.went_away();
                Failure::new(Code::Unavailable, "the journal's database is away; nothing was changed")
            }
            BatchError::Unknown(..) => {
                tracing::error!(%error, commands = commands.len(), "it is not known whether a batch was committed");
                self.postgres.went_away();
                let message = "the journal's database broke off; the command may have succeeded: send it again with the \
                    same Nats-Msg-Id to find out";
                Failure::new(Code::Unavailable, message).with("outcome", "unknown")
            }
            BatchError::Race => Failure::new(Code::Overloaded, "other commands were faster, several times: try again"),
            BatchError::Fault(_) => {
                let target = commands.first().map(|command| command.command.target().to_string());
                tracing::error!(%error, target, "a command failed");
                Failure::new(Code::Internal, "the command failed by a fault of the service; nothing was changed")
            }
        }
    }
}

enum Fate {
    /// With the position before the batch's first event.
    Committed(i64),
    RolledBack,
}

impl BatchError {
    /// Whether one command may be to blame, rather than the server.
    fn is_for_one(&self) -> bool {
        match self {
            Self::Race | Self::Fault(_) => true,
            Self::NoConnection(_) | Self::Away(_) | Self::Unknown(..) => false,
        }
    }
}
