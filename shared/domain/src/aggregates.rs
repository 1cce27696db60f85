//! The aggregates that a batch of commands touches, in memory. Each command sees the changes of the commands before it.
//! The invariants: versions have no gaps, no two aggregates hold the same claim, and a refused command changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::{Command, Event, Id, Recorded, Rejection, State, Timestamp};

/// The codes that commands of every kind of aggregate may be refused with.
pub(crate) const REJECTIONS: &[(&str, &str)] = &[
    ("version_conflict", "the aggregate is not at `Expected-Version`"),
    ("id_taken", "the id of a new aggregate is in use, or was"),
];

/// A value that only one living aggregate may hold, such as an e-mail address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Claim {
    /// The set of values within which this one is unique, such as `user.email`.
    pub scope: &'static str,
    pub value: String,
}

/// The type of the state of one kind of aggregate.
pub trait Kind: Sized {
    /// The state as this type, if it is of this kind.
    fn of(state: &State) -> Option<&Self>;
}

/// Loaded aggregates and claims, with the changes that the commands executed so far have made to them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Aggregates {
    loaded: HashMap<Id, Loaded>,
    claims: HashMap<Claim, Id>,
    changed: BTreeSet<Id>,
    claims_changed: BTreeMap<Claim, ClaimChange>,
}

#[derive(Clone, Debug, PartialEq)]
struct Loaded {
    /// The version in the journal; 0 if the aggregate is not stored yet.
    stored_version: u64,
    version: u64,
    state: State,
}

/// The holder of a claim as it was loaded. The present holder is in [`Aggregates::claims`].
#[derive(Clone, Debug, PartialEq)]
struct ClaimChange {
    loaded_holder: Option<Id>,
}

/// An aggregate that has changed and has to be stored.
#[derive(Debug)]
pub struct Changed<'a> {
    pub id: Id,
    /// The version in the journal; 0 if the aggregate is not stored yet.
    pub stored_version: u64,
    pub version: u64,
    pub state: &'a State,
}

impl Aggregates {
    /// Adds an aggregate as it was read from the journal, with the claims that its state holds.
    pub fn load(&mut self, id: Id, version: u64, state: State) {
        for claim in state.claims() {
            // A newer rule of normalisation may give two stored aggregates the same claim. The table of claims says
            // which of them holds it, see `load_claim`.
            self.claims.entry(claim).or_insert(id);
        }
        self.loaded.insert(id, Loaded { stored_version: version, version, state });
    }

    /// Adds an aggregate whose state was folded anew from its events, so that it is stored even if no command changes
    /// it. Its claims are those that it held before: a state of another form has the same.
    pub fn load_folded(&mut self, id: Id, version: u64, state: State) {
        self.load(id, version, state);
        self.changed.insert(id);
    }

    /// Adds a claim as it was read from the journal. It takes precedence over the claims in states.
    pub fn load_claim(&mut self, claim: Claim, id: Id) {
        self.claims.insert(claim, id);
    }

    /// Decides the command and applies its events: all of them, or none if it is refused. The positions of the events
    /// are 0 until the journal assigns them.
    ///
    /// # Errors
    /// Returns the rejection if the command is refused. Nothing has changed then.
    pub fn execute(
        &mut self,
        command: Command,
        expected_version: Option<u64>,
        now: Timestamp,
    ) -> Result<Vec<Recorded>, Rejection> {
        let events = self.decide(command, expected_version, now)?;
        Ok(self.record(events, now))
    }

    /// Decides the command without applying its events. Each event comes with the identifier of its aggregate.
    ///
    /// # Errors
    /// Returns the rejection if the command is refused.
    pub fn decide(
        &self,
        command: Command,
        expected_version: Option<u64>,
        now: Timestamp,
    ) -> Result<Vec<(Id, Event)>, Rejection> {
        let version = self.version(command.target());
        if let Some(expected) = expected_version.filter(|expected| *expected != version) {
            let message = format!("the aggregate is at version {version}, not {expected}");
            return Err(Rejection::conflict("version_conflict", message)
                .with("expected", expected)
                .with("actual", version));
        }
        command.decide(self, now)
    }

    /// Applies events that were decided. No other command may be executed between the two. The positions of the events
    /// are 0 until the journal assigns them.
    pub fn record(&mut self, events: Vec<(Id, Event)>, now: Timestamp) -> Vec<Recorded> {
        events.into_iter().map(|(id, event)| self.apply(id, event, now)).collect()
    }

    /// The aggregate's version; 0 if it has never existed.
    pub fn version(&self, id: Id) -> u64 {
        self.loaded.get(&id).map_or(0, |loaded| loaded.version)
    }

    /// Whether an aggregate of any kind has, or had, this identifier.
    pub fn exists(&self, id: Id) -> bool {
        self.loaded.contains_key(&id)
    }

    /// The aggregates that this one refers to ([`State::references`]).
    pub fn references(&self, id: Id) -> Vec<Id> {
        self.loaded.get(&id).map(|loaded| loaded.state.references()).unwrap_or_default()
    }

    /// The aggregate's state, if there is such an aggregate and it is of this kind.
    pub fn get<K: Kind>(&self, id: Id) -> Option<&K> {
        K::of(&self.loaded.get(&id)?.state)
    }

    /// The aggregate that holds the claim.
    pub fn holder(&self, claim: &Claim) -> Option<Id> {
        self.claims.get(claim).copied()
    }

    /// The aggregates that have to be stored, ordered by identifier: those that have changed or were folded anew.
    pub fn changed(&self) -> impl Iterator<Item = Changed<'_>> {
        self.changed.iter().filter_map(|id| {
            let Loaded { stored_version, version, ref state } = *self.loaded.get(id)?;
            Some(Changed { id: *id, stored_version, version, state })
        })
    }

    /// All aggregates, each with its version.
    pub fn into_states(self) -> impl Iterator<Item = (Id, u64, State)> {
        self.loaded.into_iter().map(|(id, Loaded { version, state, .. })| (id, version, state))
    }

    /// The claims that have to be released, in order, each with its former holder. An aggregate that only seemed to
    /// hold a claim has nothing to release: its stored state is older than the rule that gives it the same claim as
    /// another.
    pub fn released_claims(&self) -> impl Iterator<Item = (&Claim, Id)> {
        self.claims_changed.iter().filter_map(|(claim, change)| {
            let former = change.loaded_holder?;
            (self.holder(claim) != Some(former)).then_some((claim, former))
        })
    }

    /// The claims that have to be taken once those above are released, in order, each with its new holder.
    pub fn taken_claims(&self) -> impl Iterator<Item = (&Claim, Id)> {
        self.claims_changed.iter().filter_map(|(claim, change)| {
            let holder = self.holder(claim)?;
            (change.loaded_holder != Some(holder)).then_some((claim, holder))
        })
    }

    /// # Errors
    /// If an aggregate of any kind has, or had, this identifier.
    pub(crate) fn require_new(&self, id: Id) -> Result<(), Rejection> {
        if self.exists(id) {
            return Err(Rejection::conflict("id_taken", format!("there is, or was, something with the id {id}"))
                .with("id", id.to_string()));
        }
        Ok(())
    }

    fn apply(&mut self, id: Id, event: Event, now: Timestamp) -> Recorded {
        let before = self.loaded.remove(&id);
        let (stored_version, version, before) =
            before.map_or((0, 0, None), |loaded| (loaded.stored_version, loaded.version, Some(loaded.state)));
        let claims_before: BTreeSet<Claim> = before.iter().flat_map(State::claims).collect();
        let version = version + 1;
        if let Some(state) = State::evolve(before, &event) {
            let claims_after: BTreeSet<Claim> = state.claims().into_iter().collect();
            self.loaded.insert(id, Loaded { stored_version, version, state });
            self.changed.insert(id);
            let released = claims_before.difference(&claims_after).filter(|claim| self.holder(claim) == Some(id));
            for claim in released.collect::<Vec<_>>() {
                self.track_claim(claim);
                self.claims.remove(claim);
            }
            for claim in claims_after.difference(&claims_before) {
                self.track_claim(claim);
                self.claims.insert(claim.clone(), id);
            }
        }
        Recorded { position: 0, at: now, id, version, event }
    }

    fn track_claim(&mut self, claim: &Claim) {
        let loaded_holder = self.holder(claim);
        self.claims_changed.entry(claim.clone()).or_insert(ClaimChange { loaded_holder });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Email, Name, user};

    fn id(n: u128) -> Id {
        Id(uuid::Uuid::from_u128(n))
    }

    fn now() -> Timestamp {
        Timestamp::from_unix_millis(0).unwrap()
    }

    fn register(n: u128, email: &str) -> Command {
        Command::User(user::Command::Register(user::Register {
            id: id(n),
            email: Email::new(email).unwrap(),
            name: Name::new("Ada").unwrap(),
            country: None,
        }))
    }

    fn delete(n: u128) -> Command {
        Command::User(user::Command::Delete(user::Delete { id: id(n) }))
    }

    fn claim(value: &str) -> Claim {
        Claim { scope: "user.email", value: value.into() }
    }

    #[test]
    fn a_claim_that_one_aggregate_releases_and_another_takes_moves_to_the_new_holder() {
        let mut aggregates = Aggregates::default();
        aggregates.execute(register(1, "ada@example.com"), None, now()).unwrap();
        let mut stored = Aggregates::default();
        for changed in aggregates.changed() {
            stored.load(changed.id, changed.version, changed.state.clone());
        }

        stored.execute(delete(1), None, now()).unwrap();
        stored.execute(register(2, "ada@example.com"), None, now()).unwrap();

        assert_eq!(stored.released_claims().collect::<Vec<_>>(), [(&claim("ada@example.com"), id(1))]);
        assert_eq!(stored.taken_claims().collect::<Vec<_>>(), [(&claim("ada@example.com"), id(2))]);
    }

    /// Under an earlier rule of normalisation these were two different addresses.
    #[test]
    fn two_users_with_the_same_claim_by_a_newer_rule_can_both_change_and_release_only_their_own() {
        let state = |email: &str| {
            let json = format!(r#"{{"status":"living","email":"{email}","name":"Ada","country":null}}"#);
            State::decode("user", 1, json.as_bytes()).unwrap()
        };
        let rename = |n| {
            let name = Some(Name::new("Bob").unwrap());
            Command::User(user::Command::Update(user::Update { id: id(n), email: None, name, country: None }))
        };
        for order in [[1, 2], [2, 1]] {
            let mut stored = Aggregates::default();
            for n in order {
                stored.load(id(n), 1, state(if n == 1 { "straße@example.com" } else { "strasse@example.com" }));
            }
            stored.load_claim(claim("strasse@example.com"), id(1));
            for n in order {
                stored.execute(rename(n), None, now()).unwrap();
            }
            stored.execute(delete(2), None, now()).unwrap();
            assert_eq!(stored.released_claims().count(), 0);
            let third = stored.execute(register(3, "STRASSE@example.com"), None, now()).unwrap_err();
            assert_eq!(third.code, "email_taken");
            stored.execute(delete(1), None, now()).unwrap();
            assert_eq!(stored.released_claims().collect::<Vec<_>>(), [(&claim("strasse@example.com"), id(1))]);
            stored.execute(register(3, "STRASSE@example.com"), None, now()).unwrap();
        }
    }

    #[test]
    fn a_claim_that_is_taken_and_released_within_one_batch_is_not_stored() {
        let mut aggregates = Aggregates::default();
        aggregates.execute(register(1, "ada@example.com"), None, now()).unwrap();
        aggregates.execute(delete(1), None, now()).unwrap();
        assert_eq!(aggregates.released_claims().count(), 0);
        assert_eq!(aggregates.taken_claims().count(), 0);
        assert_eq!(aggregates.changed().map(|changed| (changed.stored_version, changed.version)).next(), Some((0, 2)));
    }

    #[test]
    fn a_claim_that_comes_back_to_its_holder_within_one_batch_is_not_stored() {
        let change = |email: &str| {
            Command::User(user::Command::Update(user::Update {
                id: id(1),
                email: Some(Email::new(email).unwrap()),
                name: None,
                country: None,
            }))
        };
        let mut aggregates = Aggregates::default();
        aggregates.execute(register(1, "ada@example.com"), None, now()).unwrap();
        let mut stored = Aggregates::default();
        for changed in aggregates.changed() {
            stored.load(changed.id, changed.version, changed.state.clone());
        }

        stored.execute(change("bob@example.com"), None, now()).unwrap();
        stored.execute(change("ada@example.com"), None, now()).unwrap();

        assert_eq!(stored.released_claims().count(), 0);
        assert_eq!(stored.taken_claims().count(), 0);
        assert_eq!(stored.changed().map(|changed| (changed.stored_version, changed.version)).next(), Some((1, 3)));
    }

    #[test]
    fn a_command_with_another_expected_version_is_refused() {
        let mut aggregates = Aggregates::default();
        let events = aggregates.execute(register(1, "ada@example.com"), Some(0), now()).unwrap();
        assert_eq!((events[0].version, events[0].position, events[0].at), (1, 0, now()));
        for expected in [0, 2, u64::MAX] {
            let rejection = aggregates.execute(delete(1), Some(expected), now()).unwrap_err();
            assert_eq!((rejection.kind, rejection.code), (crate::RejectionKind::Conflict, "version_conflict"));
            assert_eq!(serde_json::json!(rejection.details), serde_json::json!({ "expected": expected, "actual": 1 }));
        }
        aggregates.execute(delete(1), Some(1), now()).unwrap();
        assert_eq!(aggregates.version(id(1)), 2);
    }

    #[test]
    fn a_state_that_was_folded_anew_is_stored_at_its_version_even_if_nothing_changes_it() {
        let mut before = Aggregates::default();
        before.execute(register(1, "ada@example.com"), None, now()).unwrap();
        let (_, version, state) = before.into_states().next().unwrap();
        let mut aggregates = Aggregates::default();
        aggregates.load_folded(id(1), version, state.clone());
        let changed: Vec<_> = aggregates.changed().collect();
        assert_eq!((changed.len(), changed[0].stored_version, changed[0].version, changed[0].state), (1, 1, 1, &state));
        assert_eq!(aggregates.released_claims().chain(aggregates.taken_claims()).count(), 0);
        aggregates.execute(delete(1), None, now()).unwrap();
        assert_eq!(aggregates.changed().map(|changed| (changed.stored_version, changed.version)).next(), Some((1, 2)));
        assert_eq!(aggregates.released_claims().collect::<Vec<_>>(), [(&claim("ada@example.com"), id(1))]);
    }

    #[test]
    fn a_refused_command_changes_nothing() {
        let mut aggregates = Aggregates::default();
        let rejection = aggregates.execute(register(1, "ada@example.com"), Some(3), now()).unwrap_err();
        assert_eq!(rejection.code, "version_conflict");
        assert_eq!(aggregates.changed().count(), 0);
        assert!(!aggregates.exists(id(1)));
    }
}
