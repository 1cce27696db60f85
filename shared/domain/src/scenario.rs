//! The language of the unit tests: *given* what was commanded before, *when* a command comes, *then* there are these
//! events, or it is refused with this code. All in the words and JSON of the wire, so that the tests also pin those.

use serde_json::{Value, json};

use crate::{
    Aggregates, Changed, Command, Id, Kind, Malformed, Recorded, Rejection, RejectionKind, State, Timestamp, commands,
};

/// The moment at which everything happens: 2026-01-31T09:30:00.000Z.
pub(crate) fn now() -> Timestamp {
    "2026-01-31T09:30:00Z".parse().unwrap()
}

pub(crate) fn id(n: u128) -> Id {
    Id(uuid::Uuid::from_u128(n))
}

pub(crate) fn gbp(amount: i64) -> Value {
    json!({ "amount": amount, "currency": "GBP" })
}

/// Reads a request for `<aggregate>.<verb>`; if it makes an aggregate and names no identifier, that is `id(99)`.
pub(crate) fn parse(command: &str, request: impl AsRef<[u8]>) -> Result<Command, Malformed> {
    let found = commands().find(|known| command == format!("{}.{}", known.aggregate, known.verb));
    (found.unwrap().parse)(request.as_ref(), id(99))
}

/// A command that can be read.
pub(crate) fn command(command: &str, request: Value) -> Command {
    parse(command, request.to_string()).unwrap_or_else(|malformed| panic!("{command} {request}: {malformed}"))
}

/// A command with nothing but the aggregate that it is for.
pub(crate) fn bare(name: &str, n: u128) -> Command {
    command(name, json!({ "id": id(n) }))
}

pub(crate) fn register(n: u128, email: &str) -> Command {
    command("user.register", json!({ "id": id(n), "email": email, "name": "Ada" }))
}

/// A product with this SKU at 2.50 pounds.
pub(crate) fn create_product(n: u128, sku: &str, stock: i64) -> Command {
    command("product.create", json!({ "id": id(n), "sku": sku, "name": "Lantern", "price": gbp(250), "stock": stock }))
}

pub(crate) fn restock(n: u128, quantity: i64) -> Command {
    command("product.restock", json!({ "id": id(n), "quantity": quantity }))
}

/// An order by the user, of products and quantities at the products' prices.
pub(crate) fn create_order(n: u128, user: u128, lines: &[(u128, i64)]) -> Command {
    let line = |(product, quantity): &(u128, i64)| json!({ "product": id(*product), "quantity": quantity });
    let lines: Vec<_> = lines.iter().map(line).collect();
    command("order.create", json!({ "id": id(n), "user": id(user), "lines": lines }))
}

/// What came of the commands before, as it would be stored and loaded again.
pub(crate) struct Given {
    aggregates: Aggregates,
}

/// # Panics
/// If one of the commands is refused.
pub(crate) fn given(commands: impl IntoIterator<Item = Command>) -> Given {
    let mut aggregates = Aggregates::default();
    for command in commands {
        let shown = format!("{command:?}");
        aggregates.execute(command, None, now()).unwrap_or_else(|rejection| panic!("{shown}: {rejection:?}"));
    }
    Given { aggregates: stored_and_loaded(&aggregates) }
}

impl Given {
    pub(crate) fn state<K: Kind + Clone>(&self, n: u128) -> Option<K> {
        self.aggregates.get(id(n)).cloned()
    }

    pub(crate) fn when(self, command: Command) -> Outcome {
        let mut after = self.aggregates.clone();
        let result = after.execute(command, None, now());
        Outcome { before: self.aggregates, after, result }
    }
}

pub(crate) struct Outcome {
    before: Aggregates,
    after: Aggregates,
    result: Result<Vec<Recorded>, Rejection>,
}

impl Outcome {
    /// Exactly these events, in this order: `<aggregate>.<event>`, the aggregate, the payload.
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

    /// Accepted, whatever the events.
    pub(crate) fn then_accepted(self) {
        self.result.unwrap();
    }

    /// Refused with this code and exactly these details, and nothing has changed.
    pub(crate) fn then_refused(self, kind: RejectionKind, code: &str, details: Value) {
        let rejection = self.result.unwrap_err();
        assert_eq!((rejection.kind, rejection.code), (kind, code));
        assert_eq!(Value::Object(rejection.details), details);
        assert!(!rejection.message.is_empty());
        assert_eq!(self.after, self.before);
    }
}

/// What has changed, encoded as the service stores it and decoded again.
pub(crate) fn stored_and_loaded(aggregates: &Aggregates) -> Aggregates {
    let mut loaded = Aggregates::default();
    for Changed { id, version, state, .. } in aggregates.changed() {
        let stored = state.encode().unwrap();
        loaded.load(id, version, State::decode(state.aggregate(), &stored).unwrap());
    }
    loaded
}
