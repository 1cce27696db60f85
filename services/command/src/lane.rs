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
    known::Known,
    postgres::Postgres,
};

/// How often a batch is tried again that was too slow for another.
const RACES: usize = 5;
/// For how many batches a lane loads what it needs after it was wrong: others write the same aggregates.
const CAUTION: u32 = 100;
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
    /// The lane's own connection, while there is one.
    pub session: Option<Session>,
    pub known: Known,
    /// For how many more batches what is known is not relied on.
    pub caution: u32,
}

impl Lane {
    /// Runs until the queue is closed and empty.
    pub async fn run(mut self) {
        while self.step().await {}
    }

    /// One batch; `false` if there will be none any more.
    async fn step(&mut self) -> bool {
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
    async fn answer(&mut self, commands: &[Command]) -> Vec<Outcome> {
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
    async fn attempt(&mut self, commands: &[Command]) -> Result<Written, BatchError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let failed = match self.try_once(commands).await {
                Ok(written) => return Ok(written),
                Err(error) => error,
            };
            // It may be what was not written, or not what is stored.
            self.known.forget();
            match failed {
                BatchError::Race if tries < RACES => {
                    self.caution = CAUTION;
                    self.roll_back().await;
                }
                // A connection may have broken while it lay idle: the next try has a new one.
                BatchError::Away(_) if tries == 1 => self.discard(),
                BatchError::Unknown(error, unsettled) => {
                    self.discard();
                    match self.settle(&unsettled).await {
                        Some(Fate::Committed(base)) => return Ok(unsettled.decided.written(base)),
                        Some(Fate::RolledBack) if tries < RACES => {}
                        Some(Fate::RolledBack) => return Err(BatchError::Away(error)),
                        Some(Fate::Untold) | None => return Err(BatchError::Unknown(error, unsettled)),
                    }
                }
                error => {
                    self.discard();
                    return Err(error);
                }
            }
        }
    }

    async fn try_once(&mut self, commands: &[Command]) -> Result<Written, BatchError> {
        let (now, max_event_bytes) = (now(), self.nats.client.max_payload().saturating_sub(HEADER_ROOM));
        let Self { postgres, session, known, caution, .. } = self;
        let session = connected(postgres, session).await?;
        if *caution == 0
            && let Some(believed) = batch::believe(known, commands)
        {
            let decided = batch::decide(commands, believed, known, now, max_event_bytes)?;
            // What is refused for what is only believed must be looked at.
            if !decided.changes_nothing() {
                return batch::write(session, decided, true).await;
            }
        }
        *caution = caution.saturating_sub(1);
        let loaded = batch::load(session, commands).await?;
        let decided = batch::decide(commands, loaded, known, now, max_event_bytes)?;
        if decided.changes_nothing() {
            session.rollback().await.map_err(BatchError::Away)?;
            return Ok(decided.written(0));
        }
        batch::write(session, decided, false).await
    }

    async fn roll_back(&mut self) {
        if let Some(session) = &self.session
            && session.rollback().await.is_err()
        {
            self.discard();
        }
    }

    fn discard(&mut self) {
        if let Some(session) = self.session.take() {
            session.discard();
        }
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
                Err(error) => {
                    self.postgres.went_away();
                    tracing::debug!(error = format!("{error:#}"), "cannot ask for a transaction's fate yet");
                }
            }
            backoff.wait().await;
        }
        None
    }

    async fn fate(&self, unsettled: &Unsettled) -> anyhow::Result<Option<Fate>> {
        let Unsettled { backend, transaction, decided } = unsettled;
        let client = self.postgres.get().await?;
        let first = decided.first_event().map(|(id, version)| i64::try_from(version).map(|version| (id, version)));
        let first = first.transpose()?;
        let Some(transaction) = transaction else {
            // Once the process that had it is gone, what it has not written it will not write.
            let ended = client.query(END, &[&backend.pid, &backend.started]).await?;
            let Some((id, version)) = first else { return Ok(Some(Fate::Untold)) };
            if !ended.is_empty() {
                return Ok(None);
            }
            let found = client.query(BEFORE, &[&id, &version]).await?;
            return Ok(Some(if found.is_empty() { Fate::RolledBack } else { Fate::Untold }));
        };
        let row = client.query_one("select pg_xact_status($1::text::xid8)", &[&transaction]).await?;
        let status: Option<String> = row.try_get(0)?;
        match status.as_deref() {
            Some("committed") => {}
            Some("aborted") => return Ok(Some(Fate::RolledBack)),
            _ => return Ok(None),
        }
        let base = match first {
            Some((id, version)) => client.query_one(BEFORE, &[&id, &version]).await?,
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
    /// It cannot be told.
    Untold,
}

/// The position before an event's.
const BEFORE: &str = "select position - 1 from events where id = $1 and version = $2";

/// Ends a process of the server, if it is there still.
const END: &str = "
    select pg_terminate_backend(pid)
    from pg_stat_activity
    where pid = $1 and backend_start::text = $2";

/// The lane's connection, a new one if there is none.
async fn connected<'a>(postgres: &Postgres, session: &'a mut Option<Session>) -> Result<&'a Session, BatchError> {
    let open = match session.take().filter(|session| !session.is_lost()) {
        Some(session) => session,
        None => {
            let client = postgres.get().await.map_err(|error| BatchError::NoConnection(error.into()))?;
            Session::open(client).await.map_err(|error| BatchError::NoConnection(error.into()))?
        }
    };
    Ok(session.insert(open))
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
