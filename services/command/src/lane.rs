//! A lane: one batch after the other. It takes what is waiting, runs it, answers, and takes what has gathered meanwhile;
//! nobody waits for a batch to fill. While one is written, the next is decided on what that will leave, and sent behind it
//! if there is enough for one. What the journal took is acknowledged, and what it did not take is said not to be.

use std::{sync::Arc, time::Duration};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesOrdered};
use runtime::{Nats, now};
use tokio::{
    sync::{Mutex, mpsc},
    time::Instant,
};
use tokio_util::task::TaskTracker;
use wire::{Code, Failure};

use crate::{
    batch::{self, BatchError, Decided, Outcome, Unsettled, Written},
    handover::Handover,
    intake::{Command, Requester, Waiting},
    journal::Session,
    known::Known,
    postgres::Postgres,
};

/// Batches on their way at most.
const BATCHES: usize = 2;
/// Commands for which a batch goes out behind another. Fewer wait until that is written: small batches cost more.
const MANY: usize = 64;
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
    /// There are no other lanes, which could run at once what this one gathers.
    pub is_only: bool,
    pub postgres: Postgres,
    pub nats: Nats,
    pub handover: Handover,
    /// The replies on their way out.
    pub replies: TaskTracker,
    /// The lane's own connection, while there is one.
    pub session: Option<Arc<Session>>,
    pub known: Known,
    /// For how many more batches what is known is not relied on.
    pub caution: u32,
}

struct Batch {
    commands: Vec<Command>,
    requesters: Vec<Requester>,
}

/// Batches on their way, in their order, which is that of their statements on the connection.
type Flights = FuturesOrdered<BoxFuture<'static, (Batch, Result<Written, BatchError>)>>;

impl Lane {
    /// Runs until the queue is closed and empty.
    pub async fn run(mut self) {
        let (mut gathered, mut is_open, mut flights) = (Vec::new(), true, Flights::new());
        loop {
            let room = self.batch_commands - gathered.len();
            let gathers = is_open && room > 0 && (flights.is_empty() || self.is_only);
            tokio::select! {
                biased;
                Some((batch, result)) = flights.next() => self.land(batch, result, &mut flights).await,
                taken = take(&self.waiting, &mut gathered, room), if gathers => is_open = taken > 0,
                else => return,
            }
            let is_enough = gathered.len() >= MANY.min(self.batch_commands) && flights.len() < BATCHES;
            if !gathered.is_empty() && (flights.is_empty() || is_enough) {
                let waiting = std::mem::take(&mut gathered).into_iter();
                let (commands, requesters) = waiting.map(|Waiting { command, requester }| (command, requester)).unzip();
                self.begin(Batch { commands, requesters }, &mut flights).await;
            }
        }
    }

    /// Sends a batch on its way, if what it needs is known; otherwise runs it when all before it are written.
    async fn begin(&mut self, batch: Batch, flights: &mut Flights) {
        if let Some((session, decided)) = self.believe(&batch.commands).await {
            flights.push_back(Box::pin(async move { (batch, batch::write(&session, decided, true).await) }));
            return;
        }
        while let Some((before, result)) = flights.next().await {
            self.land(before, result, flights).await;
        }
        let outcomes = self.answer(&batch.commands, None).await;
        self.reply(batch.requesters, outcomes);
    }

    async fn believe(&mut self, commands: &[Command]) -> Option<(Arc<Session>, Decided)> {
        if self.caution > 0 {
            return None;
        }
        let session = Arc::clone(connected(&self.postgres, &mut self.session).await.ok()?);
        let believed = batch::believe(&mut self.known, commands)?;
        let decided = batch::decide(commands, believed, &mut self.known, now(), max_event_bytes(&self.nats)).ok()?;
        // What is refused for what is only believed must be looked at.
        (!decided.changes_nothing()).then_some((session, decided))
    }

    /// Answers a batch that was on its way. If it failed, those behind it were decided on what is not so.
    async fn land(&mut self, batch: Batch, result: Result<Written, BatchError>, flights: &mut Flights) {
        let mut failed = Vec::new();
        match result {
            Ok(written) => return self.written(batch.requesters, written).await,
            Err(error) => failed.push((batch, error)),
        }
        while let Some((batch, result)) = flights.next().await {
            match result {
                Ok(written) => self.written(batch.requesters, written).await,
                Err(error) => failed.push((batch, error)),
            }
        }
        for (batch, error) in failed {
            let outcomes = self.answer(&batch.commands, Some(error)).await;
            self.reply(batch.requesters, outcomes);
        }
    }

    async fn written(&self, requesters: Vec<Requester>, written: Written) {
        self.reply(requesters, written.outcomes);
        if let Some(committed) = written.committed {
            self.handover.committed(&self.nats, committed).await;
        }
    }

    fn reply(&self, requesters: Vec<Requester>, outcomes: Vec<Outcome>) {
        self.replies.spawn(async move {
            for (requester, outcome) in requesters.into_iter().zip(outcomes) {
                requester.answer(outcome).await;
            }
        });
    }

    /// Runs the commands, in one batch if that goes well. A batch that fails is split, so that one bad command cannot
    /// take others with it. `failed` is how it has gone before.
    async fn answer(&mut self, commands: &[Command], mut failed: Option<BatchError>) -> Vec<Outcome> {
        let mut outcomes = Vec::with_capacity(commands.len());
        let mut left = vec![commands];
        while let Some(part) = left.pop() {
            match self.attempt(part, failed.take()).await {
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
    async fn attempt(&mut self, commands: &[Command], failed: Option<BatchError>) -> Result<Written, BatchError> {
        let mut tries = 0;
        let mut failed = failed;
        loop {
            tries += 1;
            let error = match failed.take() {
                Some(error) => error,
                None => match self.load_and_write(commands).await {
                    Ok(written) => return Ok(written),
                    Err(error) => error,
                },
            };
            // It may be what was not written, or not what is stored.
            self.known.forget();
            match error {
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

    async fn load_and_write(&mut self, commands: &[Command]) -> Result<Written, BatchError> {
        self.caution = self.caution.saturating_sub(1);
        let session = connected(&self.postgres, &mut self.session).await?;
        let loaded = batch::load(session, commands).await?;
        let decided = batch::decide(commands, loaded, &mut self.known, now(), max_event_bytes(&self.nats))?;
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
        if let Some(session) = self.session.take().and_then(Arc::into_inner) {
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

/// Waits for commands, and takes those that are there; returns how many.
async fn take(queue: &Mutex<mpsc::Receiver<Waiting>>, into: &mut Vec<Waiting>, room: usize) -> usize {
    queue.lock().await.recv_many(into, room).await
}

fn max_event_bytes(nats: &Nats) -> usize {
    nats.client.max_payload().saturating_sub(HEADER_ROOM)
}

/// The lane's connection, a new one if there is none.
async fn connected<'a>(
    postgres: &Postgres,
    session: &'a mut Option<Arc<Session>>,
) -> Result<&'a Arc<Session>, BatchError> {
    let open = match session.take().filter(|session| !session.is_lost()) {
        Some(session) => session,
        None => {
            let client = postgres.get().await.map_err(|error| BatchError::NoConnection(error.into()))?;
            Arc::new(Session::open(client).await.map_err(|error| BatchError::NoConnection(error.into()))?)
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
