//! A lane: one batch at a time. It takes what is waiting, runs it, answers, and takes what has gathered meanwhile; nobody
//! waits for a batch to fill. What the journal took is acknowledged, and what it did not take is said not to be.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::anyhow;
use domain::Id;
use runtime::{Nats, now};
use tokio::{
    sync::{Mutex, mpsc},
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;
use wire::{Code, Failure};

use crate::{
    batch::{self, BatchError, LockedOut, Outcome, Unsettled, Written},
    handover::Handover,
    intake::{Command, Requester, Waiting},
    journal::{Patience, Session},
    known::Known,
    postgres::{Postgres, Silent, answered},
};

/// How often a batch is tried again that was too slow for another.
const RACES: usize = 5;
/// For how many batches a lane loads what it needs after it was wrong: others write the same aggregates.
const CAUTION: u32 = 100;
/// How long the server may take to come back and tell what became of a transaction.
const SETTLE: Duration = Duration::from_secs(10);
/// The same of a server that is silent: its clients have waited for long already.
const SETTLE_SILENT: Duration = Duration::from_secs(2);
/// How long other lanes may hold what is taken for a stranger's.
const LET_GO: Duration = Duration::from_millis(50);
/// For how long commands are run apart that need what somebody else held up.
const SUSPECT: Duration = Duration::from_secs(5);
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
    /// What commands needed that were held up by somebody else's lock, and when that was.
    pub held_up: HashMap<Id, Instant>,
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
        self.answer(&commands, requesters.into_iter().map(Some).collect()).await;
        true
    }

    /// Runs the commands, in one batch if that goes well. A batch that fails is split, so that one bad command cannot
    /// take others with it; and so is one that somebody else holds up, so that only those wait whom that concerns. Each
    /// part is answered as soon as it is done.
    async fn answer(&mut self, commands: &[Command], mut requesters: Vec<Option<Requester>>) {
        let mut left = self.parts(commands);
        while let Some(part) = left.pop() {
            let (indexes, outcomes) = match self.attempt(&part).await {
                Ok(written) => {
                    if let Some(committed) = written.committed {
                        self.handover.committed(&self.nats, committed).await;
                    }
                    (part.indexes, written.outcomes)
                }
                Err(BatchError::Locked) => match self.locked_out(&part).await {
                    Ok(locked_out) => {
                        let refused = self.make_way(part, &locked_out, &mut left);
                        let outcomes = refused.iter().map(|_| Err(held_up())).collect();
                        (refused, outcomes)
                    }
                    Err(error) => self.failed(&error, part),
                },
                Err(error) if part.commands.len() > 1 && error.is_for_one() => {
                    tracing::warn!(%error, commands = part.commands.len(), "a batch failed: split");
                    left.extend(part.halves());
                    continue;
                }
                Err(error) => self.failed(&error, part),
            };
            let answered: Vec<_> =
                indexes.into_iter().zip(outcomes).map(|(index, outcome)| (requesters[index].take(), outcome)).collect();
            self.replies.spawn(async move {
                for (requester, outcome) in answered {
                    if let Some(requester) = requester {
                        requester.answer(outcome).await;
                    }
                }
            });
        }
    }

    /// What is run first stands last: commands that need what somebody else has lately held up come after all others.
    fn parts<'a>(&mut self, commands: &'a [Command]) -> Vec<Part<'a>> {
        self.held_up.retain(|_, since| since.elapsed() < SUSPECT);
        let needs_suspect = |Command { command, .. }: &Command| {
            // What it refers to is known when it is loaded, and not before.
            !self.held_up.is_empty()
                && (command.touches_references_of().is_some()
                    || command.touches().iter().any(|id| self.held_up.contains_key(id)))
        };
        let (suspect, other): (Vec<_>, Vec<_>) =
            commands.iter().enumerate().partition(|(_, command)| needs_suspect(command));
        let parts = [Part::new(suspect, Patience::Short), Part::new(other, Patience::Usual)];
        parts.into_iter().filter(|part| !part.commands.is_empty()).collect()
    }

    /// Asks which of the commands are held up by somebody else's lock. Before some are refused for it, it must be so still
    /// when others than strangers have let go.
    async fn locked_out(&mut self, part: &Part<'_>) -> Result<LockedOut, BatchError> {
        let mut locked_out = self.look_at_locks(part).await?;
        if part.patience == Patience::Short && locked_out.commands.contains(&true) {
            tokio::time::sleep(LET_GO).await;
            let again = self.look_at_locks(part).await?;
            for (first, again) in locked_out.commands.iter_mut().zip(again.commands) {
                *first &= again;
            }
        }
        Ok(locked_out)
    }

    async fn look_at_locks(&mut self, part: &Part<'_>) -> Result<LockedOut, BatchError> {
        let session = connected(&self.postgres, &mut self.session).await?;
        let locked_out = batch::locked_out(session, &part.commands).await;
        if locked_out.is_err() {
            self.discard();
        }
        locked_out
    }

    /// Leaves those that are held up for later, or, where they have waited already, says which are refused. The others go
    /// on at once.
    fn make_way<'a>(&mut self, part: Part<'a>, locked_out: &LockedOut, left: &mut Vec<Part<'a>>) -> Vec<usize> {
        let Part { indexes, commands, patience } = part;
        tracing::warn!(commands = commands.len(), "somebody else has locked what commands need: the others go on");
        let all = indexes.into_iter().zip(commands).zip(&locked_out.commands);
        let (held_up, free): (Vec<_>, Vec<_>) = all.partition(|(_, locked_out)| **locked_out);
        let [held_up, free] =
            [held_up, free].map(|commands| commands.into_iter().map(|(command, _)| command).collect());
        let (held_up, free) = (Part::new(held_up, Patience::Short), Part::new(free, patience));
        self.held_up.extend(locked_out.ids.iter().map(|id| (*id, Instant::now())));
        if held_up.commands.is_empty() {
            // It is gone by now, or it is nothing that can be asked for: half of them may not need it.
            match (free.commands.len(), patience) {
                (1, Patience::Short) => return free.indexes,
                (1, Patience::Usual) => left.push(Part { patience: Patience::Short, ..free }),
                _ => left.extend(Part { patience: Patience::Short, ..free }.halves()),
            }
            return vec![];
        }
        let refused = match patience {
            Patience::Short => held_up.indexes,
            Patience::Usual => {
                left.push(held_up);
                vec![]
            }
        };
        if !free.commands.is_empty() {
            left.push(free);
        }
        refused
    }

    /// What is answered to commands that could not be run.
    fn failed(&self, error: &BatchError, part: Part<'_>) -> (Vec<usize>, Vec<Outcome>) {
        let failure = self.failure(error, &part.commands);
        let outcomes = part.commands.iter().map(|_| Err(failure.clone())).collect();
        (part.indexes, outcomes)
    }

    /// Runs the commands as one batch, again where a lost race or a broken connection is to blame.
    async fn attempt(&mut self, part: &Part<'_>) -> Result<Written, BatchError> {
        let mut tries = 0;
        loop {
            tries += 1;
            let failed = match self.try_once(part).await {
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
                BatchError::Locked => {
                    self.roll_back().await;
                    return Err(failed);
                }
                // A connection may have broken while it lay idle: the next try has a new one.
                BatchError::Away(_) if tries == 1 => self.discard(),
                BatchError::Unknown(error, unsettled) => {
                    self.discard();
                    let is_silent = error.is::<Silent>();
                    if is_silent {
                        self.postgres.went_away();
                    }
                    match self.settle(&unsettled, if is_silent { SETTLE_SILENT } else { SETTLE }).await {
                        Some(Fate::Committed(base)) => return Ok(unsettled.decided.written(base)),
                        Some(Fate::RolledBack) if tries < RACES && !is_silent => {}
                        // It answers, and what was too much at once was ended.
                        Some(Fate::RolledBack) if is_silent => return Err(BatchError::Slow),
                        Some(Fate::RolledBack) => return Err(BatchError::NoConnection(error)),
                        Some(Fate::Untold) | None => return Err(BatchError::Unknown(error, unsettled)),
                    }
                }
                BatchError::Slow => {
                    self.discard();
                    let is_there = self.postgres.answers_now().await;
                    return Err(if is_there { BatchError::Slow } else { BatchError::NoConnection(Silent.into()) });
                }
                error => {
                    self.discard();
                    return Err(error);
                }
            }
        }
    }

    async fn try_once(&mut self, part: &Part<'_>) -> Result<Written, BatchError> {
        let (commands, patience) = (&part.commands, part.patience);
        let (now, max_event_bytes) = (now(), self.nats.client.max_payload().saturating_sub(HEADER_ROOM));
        let Self { postgres, session, known, caution, .. } = self;
        let session = connected(postgres, session).await?;
        if *caution == 0
            && let Some(believed) = batch::believe(known, commands)
        {
            let decided = batch::decide(commands, believed, known, now, max_event_bytes)?;
            // What is refused for what is only believed must be looked at.
            if !decided.changes_nothing() {
                return batch::write(session, decided, Some(patience)).await;
            }
        }
        *caution = caution.saturating_sub(1);
        let loaded = batch::load(session, commands, patience).await?;
        let decided = batch::decide(commands, loaded, known, now, max_event_bytes)?;
        if decided.changes_nothing() {
            answered(session.rollback()).await.map_err(BatchError::NoConnection)?;
            return Ok(decided.written(0));
        }
        batch::write(session, decided, None).await
    }

    async fn roll_back(&mut self) {
        if let Some(session) = &self.session
            && answered(session.rollback()).await.is_err()
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
    async fn settle(&self, unsettled: &Unsettled, bound: Duration) -> Option<Fate> {
        let asking = async {
            let mut backoff = runtime::Backoff::default();
            loop {
                match self.fate(unsettled).await {
                    Ok(Some(fate)) => {
                        self.postgres.is_back();
                        return fate;
                    }
                    // It is still open: the server has not noticed yet that its client is gone.
                    Ok(None) => {}
                    Err(error) => {
                        self.postgres.went_away();
                        tracing::debug!(error = format!("{error:#}"), "cannot ask for a transaction's fate yet");
                    }
                }
                self.refuse_waiting();
                backoff.wait().await;
            }
        };
        timeout(bound, asking).await.ok()
    }

    /// Those that came before the server went away must not wait for what becomes of others.
    fn refuse_waiting(&self) {
        if self.postgres.is_up() {
            return;
        }
        let Ok(mut waiting) = self.waiting.try_lock() else { return };
        while let Ok(Waiting { requester, .. }) = waiting.try_recv() {
            self.replies.spawn(requester.answer(Err(away())));
        }
    }

    async fn fate(&self, unsettled: &Unsettled) -> anyhow::Result<Option<Fate>> {
        let Unsettled { backend, transaction, decided } = unsettled;
        let client = self.postgres.get().await?;
        let first = decided.first_event().map(|(id, version)| i64::try_from(version).map(|version| (id, version)));
        let first = first.transpose()?;
        let Some(transaction) = transaction else {
            // Once the process that had it is gone, what it has not written it will not write.
            let ended = answered(client.query(END, &[&backend.pid, &backend.started])).await?;
            let Some((id, version)) = first else { return Ok(Some(Fate::Untold)) };
            if !ended.is_empty() {
                return Ok(None);
            }
            let found = answered(client.query(BEFORE, &[&id, &version])).await?;
            return Ok(Some(if found.is_empty() { Fate::RolledBack } else { Fate::Untold }));
        };
        let row = answered(client.query_one("select pg_xact_status($1::text::xid8)", &[&transaction])).await?;
        let status: Option<String> = row.try_get(0)?;
        match status.as_deref() {
            Some("committed") => {}
            Some("aborted") => return Ok(Some(Fate::RolledBack)),
            _ => return Ok(None),
        }
        let base = match first {
            Some((id, version)) => answered(client.query_one(BEFORE, &[&id, &version])).await?,
            None => answered(client.query_one("select position from journal_head", &[])).await?,
        };
        Ok(Some(Fate::Committed(base.try_get(0)?)))
    }

    /// What is said of commands that could not be run, after it has been logged.
    fn failure(&self, error: &BatchError, commands: &[&Command]) -> Failure {
        match error {
            BatchError::Slow => {
                tracing::error!(%error, commands = commands.len(), "a command failed");
                Failure::new(Code::Unavailable, "the journal's database took too long; nothing was changed")
            }
            BatchError::NoConnection(_) | BatchError::Away(_) => {
                self.postgres.went_away();
                away()
            }
            BatchError::Unknown(..) => {
                tracing::error!(%error, commands = commands.len(), "it is not known whether a batch was committed");
                self.postgres.went_away();
                let message = "the journal's database broke off; the command may have succeeded: send it again with the \
                    same Nats-Msg-Id to find out";
                Failure::new(Code::Unavailable, message).with("outcome", "unknown")
            }
            BatchError::Locked => held_up(),
            BatchError::Race => Failure::new(Code::Overloaded, "other commands were faster, several times: try again"),
            BatchError::Fault(_) => {
                let target = commands.first().map(|command| command.command.target().to_string());
                tracing::error!(%error, target, "a command failed");
                Failure::new(Code::Internal, "the command failed by a fault of the service; nothing was changed")
            }
        }
    }
}

/// Commands that are run together, by their places among all that were taken.
struct Part<'a> {
    indexes: Vec<usize>,
    commands: Vec<&'a Command>,
    patience: Patience,
}

impl<'a> Part<'a> {
    fn new(commands: Vec<(usize, &'a Command)>, patience: Patience) -> Self {
        let (indexes, commands) = commands.into_iter().unzip();
        Self { indexes, commands, patience }
    }

    /// The first half stands last, to be run first.
    fn halves(mut self) -> [Self; 2] {
        let half = self.commands.len() / 2;
        let (indexes, commands) = (self.indexes.split_off(half), self.commands.split_off(half));
        [Self { indexes, commands, patience: self.patience }, self]
    }
}

fn away() -> Failure {
    Failure::new(Code::Unavailable, "the journal's database is away; nothing was changed")
}

fn held_up() -> Failure {
    Failure::new(Code::Overloaded, "somebody else has locked what the command needs; nothing was changed: try again")
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
    if !postgres.is_up() {
        return Err(BatchError::NoConnection(anyhow!("the server is away")));
    }
    let open = match session.take().filter(|session| !session.is_lost()) {
        Some(session) => session,
        None => {
            let client = postgres.get().await.map_err(|error| BatchError::NoConnection(error.into()))?;
            answered(Session::open(client)).await.map_err(BatchError::NoConnection)?
        }
    };
    Ok(session.insert(open))
}

impl BatchError {
    /// Whether one command may be to blame, rather than the server.
    fn is_for_one(&self) -> bool {
        match self {
            Self::Race | Self::Slow | Self::Fault(_) => true,
            // Asking tells which.
            Self::Locked => false,
            Self::NoConnection(_) | Self::Away(_) | Self::Unknown(..) => false,
        }
    }
}
