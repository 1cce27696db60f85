//! Folds states anew from the events of their aggregates, where the stored ones are of another form than this
//! program's, or cannot be read. The invariant: a folded state is that after exactly the events up to its version.
//!
//! These events never change. So a state that was folded once serves as the base for folding on, whatever other
//! programs have stored since; while two versions of the program write the same aggregates, each reads only the events
//! that are new to it. And many events are read before the aggregates are locked, so that nobody waits for them.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::anyhow;
use domain::{Event, Id, State, Undecodable};
use runtime::Pulse;

use crate::{
    batch::{BatchError, before_writing},
    journal::{EventRange, Session, StoredEvent},
    postgres::with_timeout,
    state_cache::{CachedAggregate, StateCache},
};

/// How many events are read in one batch while its aggregates are locked: what takes milliseconds.
pub const LOCKED_EVENTS: u64 = 2_000;
/// For how many events several commands stay in one batch, where all wait for them. There is no limit for one command,
/// or an aggregate with more events could never be changed again.
pub const BATCH_EVENTS: u64 = 20_000;

/// Events that are read at once, and bytes of payload; of each aggregate, at least one event is read.
const PAGE_EVENTS: usize = 5_000;
const PAGE_BYTES: usize = 4 << 20;

/// States that were folded anew, as the base for folding on. All lanes of the replica share them.
#[derive(Clone, Default)]
pub struct FoldedStates(Arc<Mutex<StateCache>>);

/// An aggregate whose stored state is to be folded anew.
#[derive(Debug)]
pub struct Stale {
    pub id: Id,
    pub kind: String,
    pub version: u64,
}

/// A state on its way to the version of the stored one.
struct Folding {
    stale: Stale,
    /// The version up to which it is folded; 0 for none.
    version: u64,
    state: Option<State>,
}

/// Folds the states of these aggregates up to the stored versions, and keeps them in `folded` as the base for later.
///
/// # Errors
/// See [`BatchError`]. [`BatchError::Newer`] if a newer version of the program wrote one of the events.
pub async fn fold(
    session: &Session,
    stale: Vec<Stale>,
    folded: &FoldedStates,
    pulse: &Pulse,
) -> Result<Vec<(Id, u64, State)>, BatchError> {
    let mut foldings: Vec<Folding> = stale.into_iter().map(|stale| folded.start(stale)).collect();
    loop {
        let mut pending: Vec<&mut Folding> = foldings.iter_mut().filter(|it| it.version < it.stale.version).collect();
        if pending.is_empty() {
            break;
        }
        pulse.beat();
        read_page(session, &mut pending).await?;
    }
    let finished = foldings.into_iter().map(|Folding { stale: Stale { id, kind, .. }, version, state }| {
        let state = state.ok_or_else(|| fault(&kind, id, "its events lead to no state"))?;
        let bytes = state.encode().map_err(|error| BatchError::Fault(error.into()))?.len();
        folded.states().insert(id, CachedAggregate { version, state: state.clone(), bytes });
        Ok((id, version, state))
    });
    finished.collect()
}

/// Reads the next events of these aggregates and applies them.
async fn read_page(session: &Session, pending: &mut [&mut Folding]) -> Result<(), BatchError> {
    let range = |it: &&mut Folding| EventRange { id: it.stale.id, after: it.version, last: it.stale.version };
    let ranges: Vec<EventRange> = pending.iter().map(range).collect();
    let (events, bytes) = (PAGE_EVENTS / ranges.len(), PAGE_BYTES / ranges.len());
    let page = async { Ok::<_, Infallible>(session.events(&ranges, events.max(1), bytes.max(1)).await) };
    let page = with_timeout(page).await.map_err(|_| BatchError::Slow)?.map_err(before_writing)?;
    let mut page = page.into_iter().peekable();
    // The events come in the order of the ranges.
    for folding in pending {
        let before = folding.version;
        while let Some(event) = page.next_if(|event| event.id == folding.stale.id) {
            folding.apply(&event)?;
        }
        if folding.version == before {
            return Err(folding.misses_an_event());
        }
    }
    Ok(())
}

impl FoldedStates {
    /// How many events have to be read to fold these states.
    pub fn events_to_read(&self, stale: &[Stale]) -> u64 {
        let states = self.states();
        stale.iter().map(|stale| stale.version - base(&states, stale).map_or(0, |base| base.version)).sum()
    }

    /// The aggregates that the aggregate refers to.
    pub fn references(&self, id: Id) -> Vec<Id> {
        self.states().get(id).map(|folded| folded.state.references()).unwrap_or_default()
    }

    /// Forgets all: the journal may have been restored, and have another history.
    pub fn clear(&self) {
        self.states().clear();
    }

    fn start(&self, stale: Stale) -> Folding {
        match base(&self.states(), &stale) {
            Some(base) => Folding { version: base.version, state: Some(base.state.clone()), stale },
            None => Folding { version: 0, state: None, stale },
        }
    }

    fn states(&self) -> MutexGuard<'_, StateCache> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The state that was folded last, unless that went further than the stored one.
fn base<'a>(states: &'a StateCache, stale: &Stale) -> Option<&'a CachedAggregate> {
    states.get(stale.id).filter(|base| base.version <= stale.version)
}

impl Folding {
    fn apply(&mut self, stored: &StoredEvent) -> Result<(), BatchError> {
        if stored.version != self.version + 1 {
            return Err(self.misses_an_event());
        }
        let Stale { id, kind, .. } = &self.stale;
        let event = Event::decode(&stored.aggregate, &stored.name, stored.schema, stored.payload.as_bytes());
        let event = event.map_err(|error| match error {
            // No name and no schema was ever taken back, so a newer version of the program wrote it.
            Undecodable::Unknown | Undecodable::Newer { .. } => {
                BatchError::Newer { kind: kind.clone(), id: *id, version: stored.version, error }
            }
            Undecodable::Payload(_) | Undecodable::Form { .. } => {
                fault(kind, *id, &format!("event {} cannot be read: {error}", stored.version))
            }
        })?;
        self.state = State::evolve(self.state.take(), &event);
        self.version = stored.version;
        Ok(())
    }

    fn misses_an_event(&self) -> BatchError {
        let Stale { id, kind, .. } = &self.stale;
        fault(kind, *id, &format!("the journal does not have its event {}", self.version + 1))
    }
}

fn fault(kind: &str, id: Id, reason: &str) -> BatchError {
    BatchError::Fault(anyhow!("{kind} {id} cannot be folded anew: {reason}"))
}
