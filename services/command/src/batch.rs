//! A batch of commands as one PostgreSQL transaction. Where the aggregates are known from the batches before, in one
//! round trip: decide on what is known, then write and commit if it is still so. Otherwise in two: load and lock; then,
//! with everything decided, write and commit. Either the whole batch is in the journal, or nothing of it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    convert::Infallible,
    time::{Duration, SystemTime},
};

use domain::{Aggregates, Changed, Claim, Id, State, Timestamp};
use futures_util::join;
use tokio_postgres::{Error, error::SqlState};
use uuid::Uuid;
use wire::{Accepted, Code, Failure};

use crate::{
    handover::Committed,
    intake::{IdempotencyKey, QueuedCommand},
    journal::{
        self, AggregateRow, Appended, Backend, EventRow, LedgerAnswer, LedgerEntry, LockTimeout, Session,
        StoredAggregate, unsigned,
    },
    postgres::{is_lost, with_timeout},
    state_cache::{CachedAggregate, StateCache},
};

/// Bytes by which the first event of an aggregate stays below the limit: a later one may repeat what it says and add to
/// it, and must not be refused for that.
const EVENT_HEADROOM: usize = 1024;

/// What is answered to a command.
pub type Outcome = Result<Accepted, Failure>;

/// A batch that was written, or that had nothing to write.
#[derive(Debug)]
pub struct Written {
    pub outcomes: Vec<Outcome>,
    /// `None` where there are no events.
    pub committed: Option<Committed>,
}

/// Why a batch was not written. Only after [`BatchError::Unknown`] is there a doubt.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// Another batch was first with an aggregate, a claim or a key: what was loaded is no longer so. Try again.
    #[error("another batch was first")]
    Race,
    /// Somebody else holds a lock that the batch needs, and has held it for long; nothing was written.
    #[error("somebody else holds a lock that the batch needs")]
    Locked,
    /// The server answers, but took too long for this; nothing was written. It may be too much at once.
    #[error("the batch takes too long")]
    Slow,
    /// There is no connection; nothing was written.
    #[error("no connection to PostgreSQL: {0:#}")]
    NoConnection(anyhow::Error),
    /// The connection broke before anything was written.
    #[error("the connection to PostgreSQL broke: {0}")]
    ConnectionLost(#[source] Error),
    /// The connection broke, or the server did not answer, while the batch was being written; the transaction itself will
    /// tell.
    #[error("the commit was not answered: {0:#}")]
    InDoubt(anyhow::Error, Box<InDoubt>),
    /// A statement was refused, or something stored cannot be read: one of the commands is to blame.
    #[error("the batch cannot be written: {0:#}")]
    Fault(anyhow::Error),
}

/// A batch of which it is not known whether it was committed.
#[derive(Debug)]
pub struct InDoubt {
    /// The server's process that had it.
    pub backend: Backend,
    /// PostgreSQL's identifier of the transaction, if it came.
    pub transaction: Option<String>,
    pub decided: Decided,
}

/// What a batch is decided on.
pub struct Loaded {
    aggregates: Aggregates,
    /// Bytes of their states, as JSON.
    bytes: HashMap<Id, usize>,
    ledger: HashMap<String, LedgerEntry>,
    /// It was not loaded: it is so only if nobody else has written since.
    is_optimistic: bool,
}

/// What the batch needs, as far as it is known; what commands make, claim, or have as a key is taken to be new. `None` if
/// something is missing.
pub fn from_cache(cache: &mut StateCache, commands: &[&QueuedCommand]) -> Option<Loaded> {
    let mut ids: HashSet<Id> = HashSet::new();
    let mut created: HashSet<Id> = HashSet::new();
    for QueuedCommand { command, .. } in commands {
        ids.extend(command.touches());
        if command.creates() {
            created.insert(command.target());
        }
        if let Some(id) = command.touches_references_of() {
            ids.extend(cache.get(id)?.state.references());
        }
    }
    if ids.iter().any(|id| !created.contains(id) && cache.get(*id).is_none()) {
        return None;
    }
    let (mut aggregates, mut bytes) = (Aggregates::default(), HashMap::with_capacity(ids.len()));
    for id in ids {
        if let Some(aggregate) = cache.take(id) {
            aggregates.load(id, aggregate.version, aggregate.state);
            bytes.insert(id, aggregate.bytes);
        }
    }
    Some(Loaded { aggregates, bytes, ledger: HashMap::new(), is_optimistic: true })
}

/// Begins a transaction, and loads and locks in it what the batch needs.
///
/// # Errors
/// See [`BatchError`].
pub async fn load(
    session: &Session,
    commands: &[&QueuedCommand],
    lock_timeout: LockTimeout,
) -> Result<Loaded, BatchError> {
    let loaded = with_timeout(async { Ok::<_, Infallible>(load_all(session, commands, lock_timeout).await) }).await;
    loaded.map_err(|_| BatchError::Slow)?
}

async fn load_all(
    session: &Session,
    commands: &[&QueuedCommand],
    lock_timeout: LockTimeout,
) -> Result<Loaded, BatchError> {
    let keys: Vec<&str> = commands.iter().filter_map(|command| Some(&*command.key.as_ref()?.id)).collect();
    let claims: Vec<Claim> = commands.iter().flat_map(|command| command.command.claims()).collect();
    let mut ids: BTreeSet<Id> = commands.iter().flat_map(|command| command.command.touches()).collect();
    let referring: Vec<Id> = commands.iter().filter_map(|command| command.command.touches_references_of()).collect();
    if !referring.is_empty() {
        // Without a lock: references never change, and so all locks can be taken in one order.
        for stored in session.peek(&referring).await.map_err(before_writing)? {
            ids.extend(state(&stored)?.references());
        }
    }
    let ids: Vec<Id> = ids.into_iter().collect();
    // Joined, they go out together: one round trip.
    let (begun, ledger, stored, holders) =
        join!(session.begin(lock_timeout), session.ledger(&keys), session.lock(&ids), session.holders(&claims));
    begun.map_err(before_writing)?;
    let (mut aggregates, mut bytes) = (Aggregates::default(), HashMap::new());
    for stored in stored.map_err(before_writing)? {
        bytes.insert(stored.id, stored.state.len());
        aggregates.load(stored.id, stored.version, state(&stored)?);
    }
    for (claim, id) in holders.map_err(before_writing)? {
        aggregates.load_claim(claim, id);
    }
    let unloaded = |id: &Id| aggregates.references(*id).iter().any(|reference| !aggregates.exists(*reference));
    if referring.iter().any(unloaded) {
        // It was made between the look without a lock and the one with it.
        return Err(BatchError::Race);
    }
    let ledger = ledger.map_err(before_writing)?.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    Ok(Loaded { aggregates, bytes, ledger, is_optimistic: false })
}

/// What somebody else has locked of what commands need.
pub struct Blocked {
    /// Of each command, whether it needs something of it; all do if it is the journal's head, or a table.
    pub commands: Vec<bool>,
    pub ids: HashSet<Id>,
}

/// Asks what is locked of what the commands need.
///
/// # Errors
/// See [`BatchError`].
pub async fn find_blocked(session: &Session, commands: &[&QueuedCommand]) -> Result<Blocked, BatchError> {
    let referring: Vec<Id> = commands.iter().filter_map(|command| command.command.touches_references_of()).collect();
    let asked = async {
        let referring = session.peek(&referring).await?;
        let ids: BTreeSet<Id> = commands.iter().flat_map(|command| command.command.touches()).collect();
        let references = referring.iter().filter_map(|stored| Some((stored.id, state(stored).ok()?.references())));
        let references: HashMap<Id, Vec<Id>> = references.collect();
        let ids: BTreeSet<Id> = ids.into_iter().chain(references.values().flatten().copied()).collect();
        let locked = session.locked(&ids.into_iter().collect::<Vec<_>>()).await?;
        Ok::<_, Error>((references, locked))
    };
    // In a transaction of its own, for the look must not wait for a lock as long as the batch has.
    let asked = async {
        session.begin(LockTimeout::Short).await?;
        let found = asked.await;
        session.rollback().await?;
        found
    };
    let (references, locked) = match with_timeout(asked).await {
        Ok(found) => found,
        Err(error) => {
            return match error.downcast_ref::<Error>().and_then(Error::code) {
                // Somebody has locked a whole table.
                Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                    Ok(Blocked { commands: vec![true; commands.len()], ids: HashSet::new() })
                }
                Some(_) | None => Err(BatchError::NoConnection(error)),
            };
        }
    };
    let needs_locked = |command: &&QueuedCommand| {
        let references = references.get(&command.command.target()).cloned().unwrap_or_default();
        locked.head || command.command.touches().iter().chain(&references).any(|id| locked.ids.contains(id))
    };
    Ok(Blocked { commands: commands.iter().map(needs_locked).collect(), ids: locked.ids })
}

fn state(stored: &StoredAggregate) -> Result<State, BatchError> {
    State::decode(&stored.kind, stored.state.as_bytes()).map_err(|error| {
        BatchError::Fault(anyhow::anyhow!("the stored state of {} {} cannot be read: {error}", stored.kind, stored.id))
    })
}

/// What became of the commands, before positions are given.
#[derive(Debug)]
pub struct Decided {
    at: Timestamp,
    answers: Vec<Answer>,
    events: Vec<EventRow>,
    ledger: Vec<LedgerEntry>,
    changes: journal::Changes,
    released: Vec<(Claim, Id)>,
    taken: Vec<(Claim, Id)>,
}

/// Commands as they are decided, one after the other.
struct BatchDecider {
    aggregates: Aggregates,
    answers: Vec<Answer>,
    events: Vec<EventRow>,
    ledger: Vec<LedgerEntry>,
}

#[derive(Debug)]
enum Answer {
    /// The ledger had it.
    Replayed(Outcome),
    /// The same key came before in this batch.
    SameAs(usize),
    Refused(Failure),
    /// The position counts from the journal's head: the batch's events up to and with this command's.
    Accepted(Accepted),
}

/// Decides the commands, each on what those before it left. The states that come of it are known from then on, though
/// they are not written yet.
///
/// # Errors
/// If a state or an event has no JSON form.
pub fn decide(
    commands: &[&QueuedCommand],
    loaded: Loaded,
    cache: &mut StateCache,
    now: Timestamp,
    max_event_bytes: usize,
) -> Result<Decided, BatchError> {
    let Loaded { aggregates, mut bytes, ledger, is_optimistic } = loaded;
    let mut decider = BatchDecider { aggregates, answers: vec![], events: vec![], ledger: vec![] };
    decider.execute_all(commands, &ledger, now, max_event_bytes)?;
    let BatchDecider { aggregates, answers, events, ledger } = decider;
    let mut changes = journal::Changes::default();
    for Changed { id, stored_version, version, state } in aggregates.changed() {
        let kind = state.aggregate();
        let state = json(state.encode())?;
        bytes.insert(id, state.len());
        let into = if stored_version == 0 { &mut changes.created } else { &mut changes.updated };
        into.push(AggregateRow { id: id.0, kind, stored_version, version, state });
    }
    if is_optimistic {
        let ids: HashSet<Uuid> = changes.created.iter().chain(&changes.updated).map(|aggregate| aggregate.id).collect();
        let read = bytes.keys().filter(|id| !ids.contains(&id.0));
        changes.expected.extend(read.map(|id| (*id, aggregates.version(*id))));
        changes.expected.sort_unstable_by_key(|(id, _)| *id);
        let makers = commands.iter().filter(|command| command.command.creates());
        let targets = makers.map(|command| command.command.target());
        changes.absent.extend(targets.filter(|id| !aggregates.exists(*id)));
    }
    let released = aggregates.released_claims().map(|(claim, id)| (claim.clone(), id)).collect();
    let taken = aggregates.taken_claims().map(|(claim, id)| (claim.clone(), id)).collect();
    for (id, version, state) in aggregates.into_states() {
        let bytes = bytes.get(&id).copied().unwrap_or_default();
        cache.insert(id, CachedAggregate { version, state, bytes });
    }
    Ok(Decided { at: now, answers, events, ledger, changes, released, taken })
}

impl BatchDecider {
    fn execute_all(
        &mut self,
        commands: &[&QueuedCommand],
        ledger: &HashMap<String, LedgerEntry>,
        now: Timestamp,
        max_event_bytes: usize,
    ) -> Result<(), BatchError> {
        let mut first_with: HashMap<&str, (usize, [u8; 32])> = HashMap::new();
        for (index, command) in commands.iter().enumerate() {
            let Some(key) = &command.key else {
                let answer = self.execute(command, now, max_event_bytes)?;
                self.answers.push(answer);
                continue;
            };
            let answer = match (ledger.get(&key.id), first_with.get(&*key.id)) {
                (Some(entry), _) if !key.matches(&entry.fingerprint) => Answer::Refused(reused(&key.id)),
                (Some(entry), _) => Answer::Replayed(match &entry.answer {
                    LedgerAnswer::Accepted(accepted) => Ok(*accepted),
                    LedgerAnswer::Refused(failure) => Err(failure.clone()),
                }),
                (None, Some((_, fingerprint))) if !key.matches(fingerprint) => Answer::Refused(reused(&key.id)),
                (None, Some((first, _))) => Answer::SameAs(*first),
                (None, None) => {
                    first_with.insert(&key.id, (index, key.fingerprint));
                    let answer = self.execute(command, now, max_event_bytes)?;
                    self.ledger.extend(answer.entry(key));
                    answer
                }
            };
            self.answers.push(answer);
        }
        Ok(())
    }

    fn execute(
        &mut self,
        command: &QueuedCommand,
        now: Timestamp,
        max_event_bytes: usize,
    ) -> Result<Answer, BatchError> {
        let id = command.command.target();
        let events = match self.aggregates.decide(command.command.clone(), command.expected_version, now) {
            Ok(events) => events,
            Err(rejection) => return Ok(Answer::Refused(rejection.into())),
        };
        let payloads = events.iter().map(|(_, event)| json(event.encode())).collect::<Result<Vec<_>, _>>()?;
        let is_new = self.aggregates.version(id) == 0;
        let max_bytes = if is_new { max_event_bytes.saturating_sub(EVENT_HEADROOM) } else { max_event_bytes };
        if payloads.iter().any(|payload| payload.len() > max_bytes) {
            let message = format!("what the command would record has more than the {max_bytes} bytes allowed");
            return Ok(Answer::Refused(Failure::new(Code::TooLarge, message).with("max_bytes", max_bytes)));
        }
        let recorded = self.aggregates.record(events, now);
        self.events.extend(recorded.into_iter().zip(payloads).map(|(recorded, payload)| EventRow {
            aggregate: recorded.event.aggregate(),
            id: recorded.id.0,
            version: recorded.version,
            name: recorded.event.name(),
            schema: recorded.event.schema(),
            payload,
            actor: command.actor.clone(),
            command_id: command.key.as_ref().map(|key| key.id.clone()),
            traceparent: command.traceparent.clone(),
        }));
        let version = self.aggregates.version(id);
        Ok(Answer::Accepted(Accepted { id, version, position: self.events.len() as u64 }))
    }
}

impl Decided {
    /// The batch's first event, by which a committed batch is found again.
    pub fn first_event(&self) -> Option<(Uuid, u64)> {
        self.events.first().map(|event| (event.id, event.version))
    }

    /// What came of it, where `base` is the position before the batch's first event.
    pub fn written(self, base: i64) -> Written {
        let after = unsigned(base);
        let mut outcomes: Vec<Outcome> = Vec::with_capacity(self.answers.len());
        for answer in self.answers {
            outcomes.push(match answer {
                Answer::Replayed(outcome) => outcome,
                Answer::SameAs(first) => outcomes[first].clone(),
                Answer::Refused(failure) => Err(failure),
                Answer::Accepted(accepted) => Ok(Accepted { position: after + accepted.position, ..accepted }),
            });
        }
        let (at, events) = (self.at, self.events);
        Written { outcomes, committed: (!events.is_empty()).then_some(Committed { after, at, events }) }
    }

    /// A command that was accepted without an event still wants the head's position.
    pub fn changes_nothing(&self) -> bool {
        self.ledger.is_empty() && !self.answers.iter().any(|answer| matches!(answer, Answer::Accepted(_)))
    }
}

impl Answer {
    /// What the ledger keeps of it.
    fn entry(&self, key: &IdempotencyKey) -> Option<LedgerEntry> {
        let answer = match self {
            Self::Accepted(accepted) => LedgerAnswer::Accepted(*accepted),
            Self::Refused(failure) => LedgerAnswer::Refused(failure.clone()),
            Self::Replayed(_) | Self::SameAs(_) => return None,
        };
        Some(LedgerEntry { key: key.id.clone(), fingerprint: key.fingerprint, answer })
    }
}

/// Writes and commits in one round trip, in the transaction that [`load`] began or one that begins here. Where a statement
/// fails, those behind it fail too, and the commit becomes a rollback.
///
/// # Errors
/// See [`BatchError`].
pub async fn write(session: &Session, decided: Decided, begins: Option<LockTimeout>) -> Result<Written, BatchError> {
    let at = SystemTime::UNIX_EPOCH + Duration::from_millis(unsigned(decided.at.unix_millis()));
    let begin = async {
        match begins {
            Some(lock_timeout) => session.begin(lock_timeout).await,
            None => Ok(()),
        }
    };
    let writing = async {
        Ok::<_, Infallible>(join!(
            begin,
            session.store(&decided.changes),
            session.release(&decided.released),
            session.claim(&decided.taken),
            session.append(&decided.events, &decided.ledger, at),
            session.commit(),
        ))
    };
    let (begun, stored, released, taken, appended, committed) = match with_timeout(writing).await {
        Ok(written) => written,
        Err(silent) => {
            let (backend, transaction) = (session.backend.clone(), None);
            return Err(BatchError::InDoubt(silent, Box::new(InDoubt { backend, transaction, decided })));
        }
    };
    // The first failure is the cause; the others only say that the transaction has failed.
    let written = begun.and(stored).and(released).and(taken);
    let (failed, transaction) = match (written, appended, committed) {
        (Ok(()), Ok(Appended { base, .. }), Ok(())) => return Ok(decided.written(base)),
        (Ok(()), Ok(Appended { transaction, .. }), Err(error)) => (error, Some(transaction)),
        (Ok(()), Err(error), _) | (Err(error), ..) => (error, None),
    };
    Err(match failed.code() {
        Some(code) if is_race(code) => BatchError::Race,
        Some(&SqlState::LOCK_NOT_AVAILABLE) => BatchError::Locked,
        _ if is_lost(&failed) => {
            let backend = session.backend.clone();
            BatchError::InDoubt(failed.into(), Box::new(InDoubt { backend, transaction, decided }))
        }
        _ => BatchError::Fault(failed.into()),
    })
}

fn json(encoded: serde_json::Result<Vec<u8>>) -> Result<String, BatchError> {
    let json = encoded.map_err(|error| BatchError::Fault(error.into()))?;
    String::from_utf8(json).map_err(|error| BatchError::Fault(error.into()))
}

fn reused(key: &str) -> Failure {
    Failure::new(Code::CommandIdReused, "this Nats-Msg-Id came before, with another request").with("command_id", key)
}

fn before_writing(error: Error) -> BatchError {
    match error.code() {
        Some(code) if is_race(code) => BatchError::Race,
        Some(&SqlState::LOCK_NOT_AVAILABLE) => BatchError::Locked,
        _ if is_lost(&error) => BatchError::ConnectionLost(error),
        _ => BatchError::Fault(error.into()),
    }
}

/// What a batch meets that another was faster than: it goes through when it is tried again. The statements that demand
/// what was believed divide by zero where it is not so.
fn is_race(code: &SqlState) -> bool {
    let races = [
        SqlState::UNIQUE_VIOLATION,
        SqlState::DIVISION_BY_ZERO,
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::T_R_SERIALIZATION_FAILURE,
    ];
    races.contains(code)
}
