//! A batch runs commands as one PostgreSQL transaction. If the cache has all aggregates that it needs, it is
//! optimistic and takes one round trip: decide on the cached states, then write and commit on the condition that they
//! are still current. Otherwise it takes two: load and lock the aggregates; then, with everything decided, write and
//! commit. A state that this program does not read is folded anew, and stored with the batch. Either the whole batch is
//! in the journal, or nothing of it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    convert::Infallible,
    time::{Duration, SystemTime},
};

use domain::{Aggregates, Changed, Claim, Id, State, Timestamp, Undecodable};
use futures_util::join;
use runtime::Pulse;
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
    postgres::{describe, is_lost, with_timeout},
    refold::{self, FoldedStates, Stale},
    state_cache::{CachedAggregate, StateCache},
};

/// Bytes by which an aggregate's first event must stay below the size limit. A later event may repeat its content and
/// add to it, and must not be refused for its size.
const EVENT_HEADROOM: usize = 1024;

/// How often states are folded for one batch before its aggregates are locked. Once is enough, unless many events are
/// added meanwhile.
const MAX_FOLDS: u32 = 3;

/// The answer to a command.
pub type Outcome = Result<Accepted, Failure>;

/// A batch that was written, or that had nothing to write.
#[derive(Debug)]
pub struct Written {
    pub outcomes: Vec<Outcome>,
    /// `None` if there are no events.
    pub committed: Option<Committed>,
}

/// Why a batch was not written. Only after [`BatchError::InDoubt`] may it have been written after all.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// Another batch changed an aggregate, took a claim or used a key first, so the loaded data is out of date. Try
    /// again.
    #[error("another batch was first")]
    Race,
    /// A foreign transaction has held a lock that the batch needs for too long; nothing was written.
    #[error("a foreign transaction holds a lock that the batch needs")]
    Locked,
    /// The server responds, but did not finish the batch in time; nothing was written. The batch may be too large.
    #[error("the batch took too long")]
    Slow,
    /// More states have to be folded anew from their events than may be while they are locked; nothing was written.
    #[error("{} states have to be folded anew", .0.len())]
    Stale(Vec<Stale>),
    /// A newer version of the program has changed an aggregate that a command needs, and this one cannot read how.
    #[error("event {version} of {kind} {id} was written by a newer version of the program: {error}")]
    Newer { kind: String, id: Id, version: u64, error: Undecodable },
    /// There is no connection; nothing was written.
    #[error("no connection to PostgreSQL: {}", describe(.0))]
    NoConnection(anyhow::Error),
    /// The connection was lost before anything was written.
    #[error("the connection to PostgreSQL was lost: {0}")]
    ConnectionLost(#[source] Error),
    /// The connection was lost, or the server did not respond, while the batch was being written. Whether it was
    /// committed must be found out.
    #[error("the commit was not answered: {}", describe(.0))]
    InDoubt(anyhow::Error, Box<InDoubt>),
    /// A statement was refused, or stored data cannot be read: one of the commands is the cause.
    #[error("the batch cannot be written: {}", describe(.0))]
    Fault(anyhow::Error),
}

/// A batch of which it is not known whether it was committed: a transaction in doubt.
#[derive(Debug)]
pub struct InDoubt {
    /// The server process that ran the transaction.
    pub backend: Backend,
    /// PostgreSQL's identifier of the transaction, if it was received.
    pub transaction: Option<String>,
    pub decided: Decided,
}

/// The data on which a batch is decided.
pub struct Loaded {
    aggregates: Aggregates,
    /// The sizes of their states, in bytes of JSON.
    bytes: HashMap<Id, usize>,
    ledger: HashMap<String, LedgerEntry>,
    /// How many states were folded anew.
    pub folded: usize,
    /// The states come from the cache: they are current only if no other writer has changed them since.
    is_optimistic: bool,
}

/// The data that the batch needs, from the cache; `None` if an aggregate is missing there. Identifiers of new
/// aggregates, claims and idempotency keys are assumed to be unused, which the write then checks.
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
    Some(Loaded { aggregates, bytes, ledger: HashMap::new(), folded: 0, is_optimistic: true })
}

/// Begins a transaction, and loads and locks in it the data that the batch needs. States that take many events to fold
/// anew are folded before they are locked, into `folded`.
///
/// # Errors
/// See [`BatchError`]. [`BatchError::Stale`] if several commands together need more than one batch should fold, or
/// events are added faster than they can be folded.
pub async fn load(
    session: &Session,
    commands: &[&QueuedCommand],
    lock_timeout: LockTimeout,
    folded: &FoldedStates,
    pulse: &Pulse,
) -> Result<Loaded, BatchError> {
    let mut tries = 0;
    loop {
        let loading = load_all(session, commands, lock_timeout, folded, pulse);
        let loaded = with_timeout(async { Ok::<_, Infallible>(loading.await) }).await.map_err(|_| BatchError::Slow)?;
        let Err(BatchError::Stale(stale)) = loaded else { return loaded };
        let events = folded.events_to_read(&stale);
        tries += 1;
        if tries > MAX_FOLDS || (commands.len() > 1 && events > refold::BATCH_EVENTS) {
            return Err(BatchError::Stale(stale));
        }
        with_timeout(session.rollback()).await.map_err(BatchError::NoConnection)?;
        tracing::info!(states = stale.len(), events, "folding states anew from their events");
        refold::fold(session, stale, folded, pulse).await?;
    }
}

async fn load_all(
    session: &Session,
    commands: &[&QueuedCommand],
    lock_timeout: LockTimeout,
    folded: &FoldedStates,
    pulse: &Pulse,
) -> Result<Loaded, BatchError> {
    let keys: Vec<&str> = commands.iter().filter_map(|command| Some(&*command.key.as_ref()?.id)).collect();
    let claims: Vec<Claim> = commands.iter().flat_map(|command| command.command.claims()).collect();
    let mut ids: BTreeSet<Id> = commands.iter().flat_map(|command| command.command.touches()).collect();
    let referring: Vec<Id> = commands.iter().filter_map(|command| command.command.touches_references_of()).collect();
    if !referring.is_empty() {
        // References never change, so they can be read without a lock; then all locks are taken in one order.
        let (current, stale) = states(session.peek(&referring).await.map_err(before_writing)?);
        let anew = fold_few(session, stale, folded, pulse).await?;
        ids.extend(current.into_iter().chain(anew).flat_map(|(_, _, state)| state.references()));
    }
    let ids: Vec<Id> = ids.into_iter().collect();
    // Joined, the statements are pipelined into one round trip.
    let (begun, ledger, stored, holders) =
        join!(session.begin(lock_timeout), session.ledger(&keys), session.lock(&ids), session.holders(&claims));
    begun.map_err(before_writing)?;
    let (mut aggregates, mut bytes) = (Aggregates::default(), HashMap::new());
    let stored = stored.map_err(before_writing)?;
    bytes.extend(stored.iter().map(|stored| (stored.id, stored.state.len())));
    let (current, stale) = states(stored);
    for (id, version, state) in current {
        aggregates.load(id, version, state);
    }
    let anew = fold_few(session, stale, folded, pulse).await?;
    let number_folded = anew.len();
    for (id, version, state) in anew {
        aggregates.load_folded(id, version, state);
    }
    for (claim, id) in holders.map_err(before_writing)? {
        aggregates.load_claim(claim, id);
    }
    let unloaded = |id: &Id| aggregates.references(*id).iter().any(|reference| !aggregates.exists(*reference));
    if referring.iter().any(unloaded) {
        // The aggregate was created between the read without a lock and the one with it.
        return Err(BatchError::Race);
    }
    let ledger = ledger.map_err(before_writing)?.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
    Ok(Loaded { aggregates, bytes, ledger, folded: number_folded, is_optimistic: false })
}

/// The commands and aggregates that are blocked by a foreign lock.
pub struct Blocked {
    /// For each command, whether it is blocked. All are if the journal's head or a whole table is locked.
    pub commands: Vec<bool>,
    pub ids: HashSet<Id>,
}

/// Finds out which of the commands are blocked by a foreign lock.
///
/// # Errors
/// See [`BatchError`].
pub async fn find_blocked(
    session: &Session,
    commands: &[&QueuedCommand],
    folded: &FoldedStates,
) -> Result<Blocked, BatchError> {
    let referring: Vec<Id> = commands.iter().filter_map(|command| command.command.touches_references_of()).collect();
    let lookup = async {
        let referring = session.peek(&referring).await?;
        let ids: BTreeSet<Id> = commands.iter().flat_map(|command| command.command.touches()).collect();
        let (current, stale) = states(referring);
        let current = current.into_iter().map(|(id, _, state)| (id, state.references()));
        // The batch has folded it, unless it was blocked before.
        let anew = stale.iter().map(|stale| (stale.id, folded.references(stale.id)));
        let references: HashMap<Id, Vec<Id>> = current.chain(anew).collect();
        let ids: BTreeSet<Id> = ids.into_iter().chain(references.values().flatten().copied()).collect();
        let locked = session.locked(&ids.into_iter().collect::<Vec<_>>()).await?;
        Ok::<_, Error>((references, locked))
    };
    // A transaction of its own, with the short lock timeout, even if the batch has the usual one.
    let lookup = async {
        session.begin(LockTimeout::Short).await?;
        let found = lookup.await;
        session.rollback().await?;
        found
    };
    let (references, locked) = match with_timeout(lookup).await {
        Ok(found) => found,
        Err(error) => {
            return match error.downcast_ref::<Error>().and_then(Error::code) {
                // A whole table is locked.
                Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                    Ok(Blocked { commands: vec![true; commands.len()], ids: HashSet::new() })
                }
                Some(_) | None => Err(BatchError::NoConnection(error)),
            };
        }
    };
    let is_blocked = |command: &&QueuedCommand| {
        let references = references.get(&command.command.target()).cloned().unwrap_or_default();
        locked.head || command.command.touches().iter().chain(&references).any(|id| locked.ids.contains(id))
    };
    Ok(Blocked { commands: commands.iter().map(is_blocked).collect(), ids: locked.ids })
}

/// The states that this program reads, each with identifier and version, and the aggregates whose state it does not.
fn states(stored: Vec<StoredAggregate>) -> (Vec<(Id, u64, State)>, Vec<Stale>) {
    let (mut current, mut stale) = (Vec::with_capacity(stored.len()), Vec::new());
    for StoredAggregate { id, kind, version, form, state } in stored {
        match State::decode(&kind, form, state.as_bytes()) {
            Ok(state) => current.push((id, version, state)),
            Err(error) => {
                if let Undecodable::Payload(_) = error {
                    tracing::warn!(%id, kind, form, %error, "a stored state cannot be read, folding it anew");
                }
                stale.push(Stale { id, kind, version });
            }
        }
    }
    (current, stale)
}

/// Folds the states while they are locked, if that takes few events.
async fn fold_few(
    session: &Session,
    stale: Vec<Stale>,
    folded: &FoldedStates,
    pulse: &Pulse,
) -> Result<Vec<(Id, u64, State)>, BatchError> {
    if folded.events_to_read(&stale) > refold::LOCKED_EVENTS {
        return Err(BatchError::Stale(stale));
    }
    refold::fold(session, stale, folded, pulse).await
}

/// A batch whose commands have been decided, but which has no positions yet.
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

/// A batch whose commands are being decided, one after the other.
struct BatchDecider {
    aggregates: Aggregates,
    answers: Vec<Answer>,
    events: Vec<EventRow>,
    ledger: Vec<LedgerEntry>,
}

#[derive(Debug)]
enum Answer {
    /// The answer was in the ledger.
    Replayed(Outcome),
    /// An earlier command of this batch has the same key.
    SameAs(usize),
    Refused(Failure),
    /// The position is relative to the journal's head: the number of the batch's events up to this command's last.
    Accepted(Accepted),
}

/// Decides the commands, each on the states that those before it left. The resulting states are cached at once, though
/// they have not been written yet.
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
    let Loaded { aggregates, mut bytes, ledger, folded: _, is_optimistic } = loaded;
    let mut decider = BatchDecider { aggregates, answers: vec![], events: vec![], ledger: vec![] };
    decider.execute_all(commands, &ledger, now, max_event_bytes)?;
    let BatchDecider { aggregates, answers, events, ledger } = decider;
    let mut changes = journal::Changes::default();
    for Changed { id, stored_version, version, state } in aggregates.changed() {
        let (kind, form) = (state.aggregate(), state.form());
        let state = json(state.encode())?;
        bytes.insert(id, state.len());
        let into = if stored_version == 0 { &mut changes.created } else { &mut changes.updated };
        into.push(AggregateRow { id: id.0, kind, stored_version, version, form, state });
    }
    if is_optimistic {
        let ids: HashSet<Uuid> = changes.created.iter().chain(&changes.updated).map(|aggregate| aggregate.id).collect();
        let read = bytes.keys().filter(|id| !ids.contains(&id.0));
        changes.expected.extend(read.map(|id| (*id, aggregates.version(*id))));
        changes.expected.sort_unstable_by_key(|(id, _)| *id);
        let creating = commands.iter().filter(|command| command.command.creates());
        let targets = creating.map(|command| command.command.target());
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
    /// The batch's first event, which identifies the batch in the journal.
    pub fn first_event(&self) -> Option<(Uuid, u64)> {
        self.events.first().map(|event| (event.id, event.version))
    }

    /// The result of the batch, once it has been written after the position `base`.
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

    /// Whether there is nothing to write. A command that was accepted without an event still needs the head's position.
    pub fn changes_nothing(&self) -> bool {
        let is_folded_anew = !self.changes.updated.is_empty();
        !is_folded_anew
            && self.ledger.is_empty()
            && !self.answers.iter().any(|answer| matches!(answer, Answer::Accepted(_)))
    }
}

impl Answer {
    /// The ledger entry for this answer; none if it is the answer of an earlier command.
    fn entry(&self, key: &IdempotencyKey) -> Option<LedgerEntry> {
        let answer = match self {
            Self::Accepted(accepted) => LedgerAnswer::Accepted(*accepted),
            Self::Refused(failure) => LedgerAnswer::Refused(failure.clone()),
            Self::Replayed(_) | Self::SameAs(_) => return None,
        };
        Some(LedgerEntry { key: key.id.clone(), fingerprint: key.fingerprint, answer })
    }
}

/// Writes and commits in one round trip, in the transaction that [`load`] began, or in a new one if `begins` is
/// given. If a statement fails, those after it fail too, and the commit becomes a rollback.
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
    // The first failure is the cause; the later ones only say that the transaction has failed.
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

pub fn before_writing(error: Error) -> BatchError {
    match error.code() {
        Some(code) if is_race(code) => BatchError::Race,
        Some(&SqlState::LOCK_NOT_AVAILABLE) => BatchError::Locked,
        _ if is_lost(&error) => BatchError::ConnectionLost(error),
        _ => BatchError::Fault(error.into()),
    }
}

/// Whether the error means that another batch was faster, so that trying again will succeed. The optimistic checks
/// divide by zero if a state is out of date.
fn is_race(code: &SqlState) -> bool {
    let races = [
        SqlState::UNIQUE_VIOLATION,
        SqlState::DIVISION_BY_ZERO,
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::T_R_SERIALIZATION_FAILURE,
    ];
    races.contains(code)
}
