//! The language of the unit tests: *given* earlier commands, *when* a command is executed, *then* it leads to these
//! events or is refused with this code; and *given* an event as it was stored, *when* it is read, *then* it has this
//! payload. Tests are written in the names and JSON of the wire, so that they also pin those.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::{
    Aggregates, Changed, Claim, Command, Event, Id, Kind, Malformed, Recorded, Rejection, RejectionKind, State,
    Timestamp, Undecodable, commands, rejections,
};

/// The time at which all commands are executed: 2026-01-31T09:30:00.000Z.
pub(crate) fn now() -> Timestamp {
    "2026-01-31T09:30:00Z".parse().unwrap()
}

pub(crate) fn id(n: u128) -> Id {
    Id(uuid::Uuid::from_u128(n))
}

pub(crate) fn gbp(amount: i64) -> Value {
    json!({ "amount": amount, "currency": "GBP" })
}

/// Parses a request for `<aggregate>.<verb>`. A new aggregate without an identifier gets `id(99)`.
pub(crate) fn parse(command: &str, request: impl AsRef<[u8]>) -> Result<Command, Malformed> {
    let found = commands().find(|it| command == format!("{}.{}", it.aggregate, it.verb));
    (found.unwrap().parse)(request.as_ref(), id(99))
}

/// The command of a request for `<aggregate>.<verb>`.
///
/// # Panics
/// If the request is malformed.
pub(crate) fn command(command: &str, request: Value) -> Command {
    parse(command, request.to_string()).unwrap_or_else(|malformed| panic!("{command} {request}: {malformed}"))
}

/// A command with no field but the identifier of its aggregate.
pub(crate) fn bare(name: &str, n: u128) -> Command {
    command(name, json!({ "id": id(n) }))
}

pub(crate) fn register(n: u128, email: &str) -> Command {
    command("user.register", json!({ "id": id(n), "email": email, "name": "Ada" }))
}

/// Creates a product with this SKU at 2.50 pounds.
pub(crate) fn create_product(n: u128, sku: &str, stock: i64) -> Command {
    command("product.create", json!({ "id": id(n), "sku": sku, "name": "Lantern", "price": gbp(250), "stock": stock }))
}

pub(crate) fn restock(n: u128, quantity: i64) -> Command {
    command("product.restock", json!({ "id": id(n), "quantity": quantity }))
}

/// Creates an order by the user. Each line is a product and a quantity, at the product's price.
pub(crate) fn create_order(n: u128, user: u128, lines: &[(u128, i64)]) -> Command {
    let line = |(product, quantity): &(u128, i64)| json!({ "product": id(*product), "quantity": quantity });
    let lines: Vec<_> = lines.iter().map(line).collect();
    command("order.create", json!({ "id": id(n), "user": id(user), "lines": lines }))
}

/// The journal's tables, in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct InMemoryJournal {
    aggregates: BTreeMap<Id, (u64, &'static str, i16, Vec<u8>)>,
    claims: BTreeMap<Claim, Id>,
}

impl InMemoryJournal {
    /// Loads what the commands declare that they need and nothing else, as the command service does.
    pub(crate) fn load<'a>(&self, commands: impl Iterator<Item = &'a Command> + Clone) -> Aggregates {
        let mut loaded = Aggregates::default();
        let referrers: BTreeSet<Id> = commands.clone().filter_map(Command::touches_references_of).collect();
        let references = referrers.iter().filter_map(|id| Some(self.state(*id)?.1.references())).flatten();
        let touched: BTreeSet<Id> = commands.clone().flat_map(Command::touches).chain(references).collect();
        for id in touched {
            if let Some((version, state)) = self.state(id) {
                loaded.load(id, version, state);
            }
        }
        for claim in commands.flat_map(Command::claims) {
            if let Some(holder) = self.claims.get(&claim) {
                loaded.load_claim(claim, *holder);
            }
        }
        loaded
    }

    fn everything(&self) -> Aggregates {
        let mut loaded = Aggregates::default();
        self.states().into_iter().for_each(|(id, (version, state))| loaded.load(id, version, state));
        self.claims.iter().for_each(|(claim, holder)| loaded.load_claim(claim.clone(), *holder));
        loaded
    }

    pub(crate) fn state(&self, id: Id) -> Option<(u64, State)> {
        let (version, kind, form, json) = self.aggregates.get(&id)?;
        Some((*version, State::decode(kind, *form, json).unwrap()))
    }

    pub(crate) fn states(&self) -> BTreeMap<Id, (u64, State)> {
        self.aggregates.keys().map(|id| (*id, self.state(*id).unwrap())).collect()
    }

    pub(crate) fn claims(&self) -> &BTreeMap<Claim, Id> {
        &self.claims
    }

    pub(crate) fn store(&mut self, batch: &Aggregates) {
        for Changed { id, stored_version, version, state } in batch.changed() {
            let stored = (version, state.aggregate(), state.form(), state.encode().unwrap());
            let before = self.aggregates.insert(id, stored).map_or(0, |(version, ..)| version);
            assert_eq!(
                before, stored_version,
                "{id} was changed without being loaded: `needs` of the command must name it",
            );
            assert!(version > stored_version);
        }
        for (claim, id) in batch.released_claims() {
            assert_eq!(
                self.claims.remove(claim),
                Some(id),
                "{claim:?} was released, though the aggregate does not hold it"
            );
        }
        for (claim, id) in batch.taken_claims() {
            let before = self.claims.insert(claim.clone(), id);
            assert_eq!(
                before, None,
                "{claim:?} was taken, though another aggregate holds it: `needs` of the command must name it"
            );
        }
    }

    /// Executes the command on what it declares that it needs, and stores the changes.
    ///
    /// # Panics
    /// If the command reads or changes another aggregate, or takes a claim that it does not declare.
    pub(crate) fn execute(&mut self, command: Command) -> Result<Vec<Recorded>, Rejection> {
        let shown = format!("{command:?}");
        let claims = command.claims();
        let mut loaded = self.load([&command].into_iter());
        let on_everything = self.everything().execute(command.clone(), None, now());
        let result = loaded.execute(command, None, now());
        assert!(
            result == on_everything,
            "`needs` of the command must name all that `decide` reads: {shown} leads to {result:?} on what it names, \
                and to {on_everything:?} on everything",
        );
        for (claim, _) in loaded.taken_claims() {
            assert!(claims.contains(claim), "{shown} took {claim:?}: `needs` of the command must name it");
        }
        self.store(&loaded);
        result
    }
}

/// The journal after earlier commands.
pub(crate) struct Given {
    stored: InMemoryJournal,
}

/// Executes commands to start a test from.
///
/// # Panics
/// If one of the commands is refused.
pub(crate) fn given(commands: impl IntoIterator<Item = Command>) -> Given {
    let mut stored = InMemoryJournal::default();
    for command in commands {
        let shown = format!("{command:?}");
        stored.execute(command).unwrap_or_else(|rejection| panic!("{shown}: {rejection:?}"));
    }
    Given { stored }
}

impl Given {
    pub(crate) fn state<K: Kind + Clone>(&self, n: u128) -> Option<K> {
        self.stored.state(id(n)).and_then(|(_, state)| K::of(&state).cloned())
    }

    /// Executes the command. It sees what it declares that it needs, and nothing else.
    pub(crate) fn when(self, command: Command) -> Outcome {
        let mut after = self.stored.clone();
        let result = after.execute(command);
        Outcome { before: self.stored, after, result }
    }
}

pub(crate) struct Outcome {
    before: InMemoryJournal,
    after: InMemoryJournal,
    result: Result<Vec<Recorded>, Rejection>,
}

impl Outcome {
    /// Expects exactly these events, in this order: `<aggregate>.<event>`, the aggregate and the payload.
    pub(crate) fn then<const N: usize>(self, expected: [(&str, u128, Value); N]) {
        let recorded = self.result.unwrap();
        let events: Vec<_> = recorded
            .iter()
            .map(|Recorded { id, event, .. }| {
                let payload: Value = serde_json::from_slice(&event.encode().unwrap()).unwrap();
                (format!("{}.{}", event.aggregate(), event.name()), *id, payload)
            })
            .collect();
        let expected: Vec<_> =
            expected.into_iter().map(|(name, n, payload)| (name.to_owned(), id(n), payload)).collect();
        assert_eq!(events, expected);
        if recorded.is_empty() {
            assert_eq!(self.after, self.before);
        }
    }

    /// Expects that the command is accepted, whatever its events.
    pub(crate) fn then_accepted(self) {
        self.result.unwrap();
    }

    /// Expects that the command is refused with this code and exactly these details, and that nothing has changed.
    pub(crate) fn then_refused(self, kind: RejectionKind, code: &str, details: Value) {
        let rejection = self.result.unwrap_err();
        assert_eq!((rejection.kind, rejection.code), (kind, code));
        assert_declared(rejection.code);
        assert_eq!(Value::Object(rejection.details), details);
        assert!(!rejection.message.is_empty());
        assert_eq!(self.after, self.before);
    }
}

/// An event as it was stored, perhaps under an older schema.
pub(crate) struct GivenStored {
    name: &'static str,
    schema: i16,
    payload: Value,
}

/// An event `<aggregate>.<event>` as it was stored under this schema.
pub(crate) fn given_stored(name: &'static str, schema: i16, payload: Value) -> GivenStored {
    GivenStored { name, schema, payload }
}

impl GivenStored {
    pub(crate) fn when_read(self) -> Read {
        let (kind, name) = self.name.split_once('.').unwrap();
        Read(Event::decode(kind, name, self.schema, self.payload.to_string().as_bytes()))
    }
}

pub(crate) struct Read(Result<Event, Undecodable>);

impl Read {
    /// Expects exactly this payload of the present schema.
    pub(crate) fn then(self, expected: Value) {
        assert_eq!(serde_json::from_slice::<Value>(&self.0.unwrap().encode().unwrap()).unwrap(), expected);
    }

    /// Expects that the payload does not have the schema under which it was stored.
    pub(crate) fn then_undecodable(self) {
        assert!(matches!(self.0, Err(Undecodable::Payload(_))), "{:?}", self.0);
    }
}

/// Checks that the code is documented.
///
/// # Panics
/// If no aggregate declares the code in its `REJECTIONS`.
pub(crate) fn assert_declared(code: &str) {
    assert!(
        rejections().any(|(_, declared, _)| declared == code),
        "a command is refused with `{code}`, which is not documented: add it to REJECTIONS of its aggregate",
    );
}
