//! A lane runs one batch at a time: it takes the commands that are waiting, runs them, answers, and takes those that
//! have arrived meanwhile. No command waits for a batch to fill. A success is answered only after the journal has
//! committed it, and a failure says whether the command may still have succeeded.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::anyhow;
use domain::Id;
use runtime::{
    Nats, Pulse, Tracer,
    micro::Request,
    now,
    traces::{Ended, KeyValue, Kind, TraceContext, database, trace_id},
};
use tokio::{
    sync::{Mutex, mpsc},
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;
use wire::{Code, Failure};

use crate::{
    batch::{self, BatchError, Blocked, InDoubt, Outcome, Written},
    handover::Handover,
    intake::{QueuedCommand, QueuedRequest, Requester},
    journal::{LockTimeout, Session},
    metrics::{Metrics, Retry},
    postgres::{Postgres, TimedOut, describe, with_timeout},
    refold::{FoldedStates, Stale},
    state_cache::StateCache,
};

/// How often a batch is tried in all, when another batch is faster or a connection breaks.
const MAX_TRIES: usize = 5;
/// For how many batches a lane loads the aggregates instead of using its cache, after another writer has changed them.
const PESSIMISTIC_BATCHES: u32 = 100;
/// How long to try to find out what became of a transaction in doubt.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The same if the server did not respond before, since its clients have already waited for a long time.
const RESOLVE_TIMEOUT_UNRESPONSIVE: Duration = Duration::from_secs(2);
/// How long to wait before checking the locks again: by then other lanes have released theirs.
const RECHECK_DELAY: Duration = Duration::from_millis(50);
/// How long an aggregate counts as contended after a foreign lock on it has blocked commands.
const CONTENDED_FOR: Duration = Duration::from_secs(5);
/// Bytes of NATS's largest message that are reserved for an event's headers.
const HEADER_ROOM: usize = 4096;

pub struct Lane {
    pub queue: Arc<Mutex<mpsc::Receiver<QueuedRequest>>>,
    pub batch_commands: usize,
    pub postgres: Postgres,
    pub nats: Nats,
    pub handover: Handover,
    /// The replies that are being sent.
    pub replies: TaskTracker,
    /// The lane's own connection, while it has one.
    pub session: Option<Session>,
    pub cache: StateCache,
    pub folded: FoldedStates,
    /// For how many more batches the cache is not used.
    pub pessimistic_batches: u32,
    /// The aggregates on which a foreign lock has recently blocked commands, and when it did.
    pub contended: HashMap<Id, Instant>,
    pub metrics: Arc<Metrics>,
    pub pulse: Pulse,
    pub tracer: Tracer,
    /// The last commit, if it is of interest to a trace.
    pub commit: Option<Commit>,
}

/// When a batch was written and committed.
#[derive(Clone, Copy)]
pub struct Commit {
    began: SystemTime,
    ended: SystemTime,
}

impl Lane {
    /// Runs until the queue is closed and empty.
    pub async fn run(mut self) {
        while self.step().await {}
    }

    /// Runs one batch; returns whether there may be another.
    async fn step(&mut self) -> bool {
        let mut waiting = Vec::new();
        if self.queue.lock().await.recv_many(&mut waiting, self.batch_commands).await == 0 {
            return false;
        }
        let (commands, requesters): (Vec<QueuedCommand>, Vec<Requester>) =
            waiting.into_iter().map(|QueuedRequest { command, requester }| (command, requester)).unzip();
        let (known, taken) = (self.cache.len(), SystemTime::now());
        self.answer(&commands, requesters.into_iter().map(Some).collect(), taken).await;
        self.metrics.known_aggregates_changed(self.cache.len() as i64 - known as i64);
        true
    }

    /// Runs the commands, in one batch if possible. A batch that fails is split, so that one bad command cannot fail
    /// others with it. Commands that a foreign lock blocks are set apart, so that only they wait for it. The commands
    /// of each sub-batch are answered as soon as it is done.
    async fn answer(&mut self, commands: &[QueuedCommand], mut requesters: Vec<Option<Requester>>, taken: SystemTime) {
        let mut stack = self.sub_batches(commands);
        while let Some(sub_batch) = stack.pop() {
            let _working = self.pulse.work();
            let started = Instant::now();
            let ran = self.run_batch(&sub_batch).await;
            self.metrics.batch(sub_batch.commands.len(), started.elapsed());
            // A batch that is run again in parts is shown when its parts have been run.
            if self.tracer.is_on() && !matches!(&ran, Err(error) if error.is_run_again(&sub_batch)) {
                let traced = sub_batch.indexes.iter().filter_map(|index| requesters[*index].as_ref());
                let began = SystemTime::now() - started.elapsed();
                let failed = ran.as_ref().err().map(|error| error.retry().label());
                self.trace(traced.map(Requester::request), sub_batch.commands.len(), taken, began, failed);
            }
            let (indexes, outcomes) = match ran {
                Ok(written) => {
                    if let Some(committed) = written.committed {
                        self.metrics.journal.advance(committed.after + committed.events.len() as u64);
                        self.handover.committed(&self.nats, committed).await;
                    }
                    (sub_batch.indexes, written.outcomes)
                }
                Err(BatchError::Locked) => match self.blocked(&sub_batch).await {
                    Ok(blocked) => {
                        let refused = self.defer_blocked(sub_batch, &blocked, &mut stack);
                        let outcomes = refused.iter().map(|_| Err(locked())).collect();
                        (refused, outcomes)
                    }
                    Err(error) => self.fail(&error, sub_batch),
                },
                Err(BatchError::Stale(stale)) if sub_batch.commands.len() > 1 => {
                    stack.extend(sub_batch.set_apart(&stale));
                    continue;
                }
                Err(error) if error.is_split(&sub_batch) => {
                    tracing::warn!(%error, commands = sub_batch.commands.len(), "a batch failed, splitting it");
                    stack.extend(sub_batch.halves());
                    continue;
                }
                Err(error) => self.fail(&error, sub_batch),
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

    /// Records a batch that has been run: a span of its own, linked to the commands in it, and in the trace of each
    /// command what became of it.
    fn trace<'r>(
        &mut self,
        requests: impl Iterator<Item = &'r Request>,
        commands: usize,
        taken: SystemTime,
        began: SystemTime,
        failed: Option<&'static str>,
    ) {
        let (commit, tracer) = (self.commit.take(), &self.tracer);
        let traced: Vec<(&Request, &TraceContext)> =
            requests.filter_map(|request| Some((request, request.span()?))).collect();
        if traced.is_empty() {
            return;
        }
        let count = KeyValue::new("messaging.batch.message_count", i64::try_from(commands).unwrap_or(i64::MAX));
        let error = failed.map(|reason| KeyValue::new("error.type", reason));
        let attributes: Vec<KeyValue> = [count].into_iter().chain(error).collect();
        let batch = || Ended::new("batch", Kind::Internal, began, SystemTime::now()).with(attributes.clone());
        let written = || {
            let Commit { began, ended } = commit?;
            let attributes = database("postgresql", "COMMIT", "events", commands);
            Some(Ended::new("COMMIT events", Kind::Client, began, ended).with(attributes))
        };
        let links = traced.iter().map(|(_, span)| (*span).clone());
        let own = tracer.record(None, batch().linked(links));
        if let (Some(own), Some(written)) = (&own, written()) {
            tracer.record(Some(own), written);
        }
        for (request, span) in traced {
            tracer.record(Some(span), Ended::new("wait for a batch", Kind::Internal, request.received_at(), taken));
            let part = tracer.record(Some(span), batch().linked(own.clone()));
            if let (Some(part), Some(written)) = (part, written()) {
                tracer.record(Some(&part), written);
            }
        }
    }

    /// The batches to run, as a stack: commands that need a contended aggregate are at the bottom, to run last.
    fn sub_batches<'a>(&mut self, commands: &'a [QueuedCommand]) -> Vec<SubBatch<'a>> {
        self.contended.retain(|_, since| since.elapsed() < CONTENDED_FOR);
        let needs_contended = |QueuedCommand { command, .. }: &QueuedCommand| {
            // The references of a stored aggregate are known only once it has been loaded.
            !self.contended.is_empty()
                && (command.touches_references_of().is_some()
                    || command.touches().iter().any(|id| self.contended.contains_key(id)))
        };
        let (contended, other): (Vec<_>, Vec<_>) =
            commands.iter().enumerate().partition(|(_, command)| needs_contended(command));
        let sub_batches = [SubBatch::new(contended, LockTimeout::Short), SubBatch::new(other, LockTimeout::Usual)];
        sub_batches.into_iter().filter(|sub_batch| !sub_batch.commands.is_empty()).collect()
    }

    /// Finds out which commands a foreign lock blocks. Commands that would be refused for it are checked twice, so that
    /// only a lock that outlasts those of other lanes counts.
    async fn blocked(&mut self, sub_batch: &SubBatch<'_>) -> Result<Blocked, BatchError> {
        let mut blocked = self.check_locks(sub_batch).await?;
        if sub_batch.lock_timeout == LockTimeout::Short && blocked.commands.contains(&true) {
            tokio::time::sleep(RECHECK_DELAY).await;
            let again = self.check_locks(sub_batch).await?;
            for (first, again) in blocked.commands.iter_mut().zip(again.commands) {
                *first &= again;
            }
        }
        Ok(blocked)
    }

    async fn check_locks(&mut self, sub_batch: &SubBatch<'_>) -> Result<Blocked, BatchError> {
        let session = connected(&self.postgres, &mut self.session).await?;
        let blocked = batch::find_blocked(session, &sub_batch.commands, &self.folded).await;
        if blocked.is_err() {
            self.discard();
        }
        blocked
    }

    /// Puts the blocked commands back for later; those that have already been put back are refused, and their indexes
    /// returned. The others are to be run at once.
    fn defer_blocked<'a>(
        &mut self,
        sub_batch: SubBatch<'a>,
        blocked: &Blocked,
        stack: &mut Vec<SubBatch<'a>>,
    ) -> Vec<usize> {
        let SubBatch { indexes, commands, lock_timeout } = sub_batch;
        tracing::warn!(commands = commands.len(), "commands are blocked by a foreign lock, running the others first");
        let all = indexes.into_iter().zip(commands).zip(&blocked.commands);
        let (deferred, free): (Vec<_>, Vec<_>) = all.partition(|(_, blocked)| **blocked);
        let [deferred, free] =
            [deferred, free].map(|commands| commands.into_iter().map(|(command, _)| command).collect());
        let (deferred, free) = (SubBatch::new(deferred, LockTimeout::Short), SubBatch::new(free, lock_timeout));
        self.contended.extend(blocked.ids.iter().map(|id| (*id, Instant::now())));
        if deferred.commands.is_empty() {
            // The lock has been released by now, or it is of a kind that cannot be looked up. Perhaps only one half of
            // the commands needs it.
            match (free.commands.len(), lock_timeout) {
                (1, LockTimeout::Short) => return free.indexes,
                (1, LockTimeout::Usual) => stack.push(SubBatch { lock_timeout: LockTimeout::Short, ..free }),
                _ => stack.extend(SubBatch { lock_timeout: LockTimeout::Short, ..free }.halves()),
            }
            return vec![];
        }
        let refused = match lock_timeout {
            LockTimeout::Short => deferred.indexes,
            LockTimeout::Usual => {
                stack.push(deferred);
                vec![]
            }
        };
        if !free.commands.is_empty() {
            stack.push(free);
        }
        refused
    }

    /// The answers to the commands of a sub-batch that could not be run.
    fn fail(&self, error: &BatchError, sub_batch: SubBatch<'_>) -> (Vec<usize>, Vec<Outcome>) {
        let failure = self.failure(error, &sub_batch.commands);
        let outcomes = sub_batch.commands.iter().map(|_| Err(failure.clone())).collect();
        (sub_batch.indexes, outcomes)
    }

    /// Runs the commands as one batch, and again after a lost race or a broken connection.
    async fn run_batch(&mut self, sub_batch: &SubBatch<'_>) -> Result<Written, BatchError> {
        let mut tries = 0;
        loop {
            tries += 1;
            self.pulse.beat();
            let error = match self.try_once(sub_batch).await {
                Ok(written) => return Ok(written),
                Err(error) => error,
            };
            self.metrics.retry(error.retry());
            // The cache may hold states that were not written, or that are out of date.
            self.cache.clear();
            if error.is_of_the_connection() {
                self.folded.clear();
            }
            match error {
                BatchError::Race if tries < MAX_TRIES => {
                    self.pessimistic_batches = PESSIMISTIC_BATCHES;
                    self.roll_back().await;
                }
                error @ (BatchError::Locked | BatchError::Stale(_) | BatchError::Newer { .. }) => {
                    self.roll_back().await;
                    return Err(error);
                }
                // The connection may have broken while it was idle; the next try opens another.
                BatchError::ConnectionLost(_) if tries == 1 => self.discard(),
                BatchError::InDoubt(error, in_doubt) => {
                    self.discard();
                    let timed_out = error.is::<TimedOut>();
                    if timed_out {
                        self.postgres.mark_down();
                    }
                    let bound = if timed_out { RESOLVE_TIMEOUT_UNRESPONSIVE } else { RESOLVE_TIMEOUT };
                    match self.resolve(&in_doubt, bound).await {
                        Some(Fate::Committed(base)) => return Ok(in_doubt.decided.written(base)),
                        Some(Fate::RolledBack) if tries < MAX_TRIES && !timed_out => {}
                        // The server responds again and has rolled back: the batch was too much for it.
                        Some(Fate::RolledBack) if timed_out => return Err(BatchError::Slow),
                        Some(Fate::RolledBack) => return Err(BatchError::NoConnection(error)),
                        Some(Fate::Unknown) | None => return Err(BatchError::InDoubt(error, in_doubt)),
                    }
                }
                BatchError::Slow => {
                    self.discard();
                    let responds = self.postgres.responds().await;
                    return Err(if responds { BatchError::Slow } else { BatchError::NoConnection(TimedOut.into()) });
                }
                error => {
                    self.discard();
                    return Err(error);
                }
            }
        }
    }

    async fn try_once(&mut self, sub_batch: &SubBatch<'_>) -> Result<Written, BatchError> {
        let (commands, lock_timeout) = (&sub_batch.commands, sub_batch.lock_timeout);
        let (now, max_event_bytes) = (now(), self.nats.client.max_payload().saturating_sub(HEADER_ROOM));
        let Self { postgres, session, cache, folded, pessimistic_batches, metrics, pulse, commit, .. } = self;
        let session = connected(postgres, session).await?;
        let started = Instant::now();
        let mut committed = |written: Result<Written, BatchError>| {
            written.inspect(|_| {
                metrics.transaction_duration.observe(started.elapsed().as_secs_f64());
                let ended = SystemTime::now();
                *commit = Some(Commit { began: ended - started.elapsed(), ended });
            })
        };
        if *pessimistic_batches == 0
            && let Some(cached) = batch::from_cache(cache, commands)
        {
            let decided = batch::decide(commands, cached, cache, now, max_event_bytes)?;
            // A refusal may be due to a state that is out of date, so it must be confirmed on loaded states.
            if !decided.changes_nothing() {
                return committed(batch::write(session, decided, Some(lock_timeout)).await);
            }
        }
        *pessimistic_batches = pessimistic_batches.saturating_sub(1);
        let loaded = batch::load(session, commands, lock_timeout, folded, pulse).await?;
        metrics.states_folded.inc_by(loaded.folded as u64);
        let decided = batch::decide(commands, loaded, cache, now, max_event_bytes)?;
        if decided.changes_nothing() {
            with_timeout(session.rollback()).await.map_err(BatchError::NoConnection)?;
            return Ok(decided.written(0));
        }
        committed(batch::write(session, decided, None).await)
    }

    async fn roll_back(&mut self) {
        if let Some(session) = &self.session
            && with_timeout(session.rollback()).await.is_err()
        {
            self.discard();
        }
    }

    fn discard(&mut self) {
        if let Some(session) = self.session.take() {
            session.discard();
        }
    }

    /// Finds out what became of a transaction whose commit was not answered; `None` if that takes longer than `bound`.
    async fn resolve(&self, in_doubt: &InDoubt, bound: Duration) -> Option<Fate> {
        let resolving = async {
            let mut backoff = runtime::Backoff::default();
            loop {
                match self.fate(in_doubt).await {
                    Ok(Some(fate)) => {
                        self.postgres.mark_up();
                        return fate;
                    }
                    // The transaction is still open: the server has not noticed yet that its client is gone.
                    Ok(None) => {}
                    Err(error) => {
                        self.postgres.mark_down();
                        tracing::debug!(error = describe(&error), "cannot resolve a transaction in doubt yet");
                    }
                }
                self.refuse_waiting();
                backoff.wait().await;
            }
        };
        timeout(bound, resolving).await.ok()
    }

    /// Refuses the commands in the queue while the server is down: they must not wait until the transaction is
    /// resolved.
    fn refuse_waiting(&self) {
        if self.postgres.is_up() {
            return;
        }
        let Ok(mut waiting) = self.queue.try_lock() else { return };
        while let Ok(QueuedRequest { requester, .. }) = waiting.try_recv() {
            self.replies.spawn(requester.answer(Err(unavailable())));
        }
    }

    async fn fate(&self, in_doubt: &InDoubt) -> anyhow::Result<Option<Fate>> {
        let InDoubt { backend, transaction, decided } = in_doubt;
        let client = self.postgres.get().await?;
        let first = decided.first_event().map(|(id, version)| i64::try_from(version).map(|version| (id, version)));
        let first = first.transpose()?;
        let Some(transaction) = transaction else {
            // Once its server process has ended, a transaction that has not committed will never commit.
            let ended = with_timeout(client.query(END, &[&backend.pid, &backend.started])).await?;
            let Some((id, version)) = first else { return Ok(Some(Fate::Unknown)) };
            if !ended.is_empty() {
                return Ok(None);
            }
            let found = with_timeout(client.query(BEFORE, &[&id, &version])).await?;
            return Ok(Some(if found.is_empty() { Fate::RolledBack } else { Fate::Unknown }));
        };
        let row = with_timeout(client.query_one("select pg_xact_status($1::text::xid8)", &[&transaction])).await?;
        let status: Option<String> = row.try_get(0)?;
        match status.as_deref() {
            Some("committed") => {}
            Some("aborted") => return Ok(Some(Fate::RolledBack)),
            _ => return Ok(None),
        }
        let base = match first {
            Some((id, version)) => with_timeout(client.query_one(BEFORE, &[&id, &version])).await?,
            None => with_timeout(client.query_one("select position from journal_head", &[])).await?,
        };
        Ok(Some(Fate::Committed(base.try_get(0)?)))
    }

    /// Logs why commands could not be run, and returns the failure to answer with.
    fn failure(&self, error: &BatchError, commands: &[&QueuedCommand]) -> Failure {
        match error {
            BatchError::Slow => {
                tracing::error!(%error, commands = commands.len(), "a batch failed");
                Failure::new(Code::Unavailable, "the journal's database took too long; nothing was changed")
            }
            BatchError::NoConnection(_) | BatchError::ConnectionLost(_) => {
                self.postgres.mark_down();
                unavailable()
            }
            BatchError::InDoubt(..) => {
                tracing::error!(%error, commands = commands.len(), "it is not known whether a batch was committed");
                self.postgres.mark_down();
                let message = "the journal's database did not confirm the command, which may have succeeded: send it \
                    again with the same Nats-Msg-Id to find out";
                Failure::new(Code::Unavailable, message).with("outcome", "unknown")
            }
            BatchError::Locked => locked(),
            BatchError::Stale(_) => {
                tracing::warn!(%error, commands = commands.len(), "states change faster than they can be folded anew");
                Failure::new(Code::Overloaded, "what the command needs has to be read anew: try again")
            }
            BatchError::Newer { kind, id, .. } => {
                for QueuedCommand { command, request_id, .. } in commands {
                    let target = command.target();
                    tracing::warn!(%error, %target, %request_id, "a command needs a newer version of this program");
                }
                let message = format!(
                    "{kind} {id} was changed by a newer version of the service than this replica; nothing was changed: \
                        try again"
                );
                Failure::new(Code::Unavailable, message).with("kind", kind.as_str()).with("id", id.to_string())
            }
            BatchError::Race => Failure::new(Code::Overloaded, "other commands were faster, several times: try again"),
            BatchError::Fault(_) => {
                for QueuedCommand { command, request_id, traceparent, .. } in commands {
                    let (target, trace_id) = (command.target(), traceparent.as_deref().and_then(trace_id));
                    tracing::error!(%error, %target, %request_id, trace_id, "a command failed");
                }
                Failure::new(Code::Internal, "the command failed by a fault of the service; nothing was changed")
            }
        }
    }
}

/// Commands that are run as one batch, with their indexes among all commands that were taken from the queue.
struct SubBatch<'a> {
    indexes: Vec<usize>,
    commands: Vec<&'a QueuedCommand>,
    lock_timeout: LockTimeout,
}

impl<'a> SubBatch<'a> {
    fn new(commands: Vec<(usize, &'a QueuedCommand)>, lock_timeout: LockTimeout) -> Self {
        let (indexes, commands) = commands.into_iter().unzip();
        Self { indexes, commands, lock_timeout }
    }

    /// Splits the sub-batch so that commands which may need these aggregates come first, and so run last.
    fn set_apart(self, stale: &[Stale]) -> [Self; 2] {
        let needs_stale = |command: &QueuedCommand| {
            command.command.touches_references_of().is_some()
                || command.command.touches().iter().any(|id| stale.iter().any(|stale| stale.id == *id))
        };
        if self.commands.iter().all(|command| needs_stale(command)) {
            return self.halves();
        }
        let Self { indexes, commands, lock_timeout } = self;
        let all = indexes.into_iter().zip(commands);
        let (needing, others): (Vec<_>, Vec<_>) = all.partition(|(_, command)| needs_stale(command));
        [needing, others].map(|commands| Self::new(commands, lock_timeout))
    }

    /// Splits the sub-batch. The first half comes second: it is on top of the stack, and so runs first.
    fn halves(mut self) -> [Self; 2] {
        let half = self.commands.len() / 2;
        let (indexes, commands) = (self.indexes.split_off(half), self.commands.split_off(half));
        [Self { indexes, commands, lock_timeout: self.lock_timeout }, self]
    }
}

fn unavailable() -> Failure {
    Failure::new(Code::Unavailable, "the journal's database is unavailable; nothing was changed")
}

fn locked() -> Failure {
    Failure::new(Code::Overloaded, "somebody else has locked what the command needs; nothing was changed: try again")
}

/// What became of a transaction.
enum Fate {
    /// Committed, with the position before the batch's first event.
    Committed(i64),
    RolledBack,
    /// This cannot be found out.
    Unknown,
}

/// The position before that of an event.
const BEFORE: &str = "select position - 1 from events where id = $1 and version = $2";

/// Ends a server process if it is still running.
const END: &str = "
    select pg_terminate_backend(pid)
    from pg_stat_activity
    where pid = $1 and backend_start::text = $2";

/// The lane's connection; opens one if there is none.
async fn connected<'a>(postgres: &Postgres, session: &'a mut Option<Session>) -> Result<&'a Session, BatchError> {
    if !postgres.is_up() {
        return Err(BatchError::NoConnection(anyhow!("the server is down")));
    }
    let open = match session.take().filter(|session| !session.is_lost()) {
        Some(session) => session,
        None => {
            let client = postgres.get().await.map_err(|error| BatchError::NoConnection(error.into()))?;
            with_timeout(Session::open(client)).await.map_err(BatchError::NoConnection)?
        }
    };
    Ok(session.insert(open))
}

impl BatchError {
    fn retry(&self) -> Retry {
        match self {
            Self::Race => Retry::Race,
            Self::Locked => Retry::Locked,
            Self::Slow => Retry::Slow,
            Self::NoConnection(_) | Self::ConnectionLost(_) => Retry::Connection,
            Self::InDoubt(..) => Retry::InDoubt,
            Self::Stale(_) => Retry::Stale,
            Self::Newer { .. } => Retry::Newer,
            Self::Fault(_) => Retry::Fault,
        }
    }

    /// Whether the batch is to be split, since one of its commands may be the cause.
    fn is_split(&self, sub_batch: &SubBatch<'_>) -> bool {
        sub_batch.commands.len() > 1 && self.may_concern_one_command()
    }

    /// Whether the commands of the batch are run again, in other batches.
    fn is_run_again(&self, sub_batch: &SubBatch<'_>) -> bool {
        matches!(self, Self::Locked) || self.is_split(sub_batch)
    }

    /// Whether the connection to the server is the cause.
    fn is_of_the_connection(&self) -> bool {
        match self {
            Self::NoConnection(_) | Self::ConnectionLost(_) | Self::InDoubt(..) => true,
            Self::Race | Self::Locked | Self::Slow | Self::Stale(_) | Self::Newer { .. } | Self::Fault(_) => false,
        }
    }

    /// Whether a single command may be the cause, rather than the server.
    fn may_concern_one_command(&self) -> bool {
        match self {
            Self::Race | Self::Slow | Self::Stale(_) | Self::Newer { .. } | Self::Fault(_) => true,
            // The locks are looked up instead, which tells the blocked commands from the others.
            Self::Locked => false,
            Self::NoConnection(_) | Self::ConnectionLost(_) | Self::InDoubt(..) => false,
        }
    }
}
