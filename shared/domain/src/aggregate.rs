//! The contract of an aggregate: what its file says to the rest of the system. `docs/extending.md` walks through one.

use serde::{Serialize, de::DeserializeOwned};

use crate::{Aggregates, Claim, Id, Rejection, Timestamp};

/// A kind of aggregate, and at the same time the state of one. It is stored as JSON after every command and read back
/// before the next, so what was ever stored must be read for ever.
///
/// Beside this, its file declares its commands and its events (the macros `commands!` and `events!`), and `lib.rs`
/// names it in one list. Endpoints, schemas, subjects and tests all follow from these.
pub trait Aggregate: Serialize + DeserializeOwned + Sized {
    /// Its name in subjects: `cmd.<KIND>.<verb>` and `evt.<KIND>.<event>`. Never changes once an event is stored.
    const KIND: &'static str;

    /// The codes with which its commands are refused, each with its meaning, for whoever calls them.
    const REJECTIONS: &'static [(&'static str, &'static str)] = &[];

    /// Requests in an order in which they can be sent, where the samples of the aggregates above it in the list were
    /// sent before. Tests of all aggregates and of all views run on them: every command must be accepted once with
    /// every field that it may have, every event must come of them, and every code of [`Self::REJECTIONS`].
    const SAMPLES: &'static [Sample];

    /// The enum that `commands!` declares.
    type Command;

    /// The enum that `events!` declares.
    type Event;

    /// What the command needs to be decided, besides the aggregate that it is for. The command service loads and locks
    /// exactly this: anything else is absent from the [`Aggregates`] that [`Self::decide`] sees.
    fn needs(_command: &Self::Command) -> Needs {
        Needs::default()
    }

    /// The events that the command leads to, each with the aggregate that it happens to. No event means that the
    /// command changes nothing, which is a success.
    ///
    /// # Errors
    /// Why the command is refused. Nothing has changed then.
    fn decide(
        command: Self::Command,
        aggregates: &Aggregates,
        now: Timestamp,
    ) -> Result<Vec<(Id, crate::Event)>, Rejection>;

    /// The state after the event; `before` is `None` for the aggregate's first event. An event that [`Self::decide`]
    /// never emits in this state changes nothing: a state that is there stays, and `None` stays `None`.
    fn evolve(before: Option<Self>, event: &Self::Event) -> Option<Self>;

    /// The unique values that the aggregate holds in this state.
    fn claims(&self) -> Vec<Claim> {
        vec![]
    }

    /// The aggregates that this one refers to, repetitions allowed, for commands that ask for them by
    /// [`Needs::references`]. They are read without a lock, so they must be the same in every state that has any.
    fn references(&self) -> Vec<Id> {
        vec![]
    }
}

/// What a command needs to be decided, besides the aggregate that it is for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    /// The other aggregates that it names, and reads or changes. Repetitions are allowed.
    pub aggregates: Vec<Id>,
    /// The unique values that it may take.
    pub claims: Vec<Claim>,
    /// Whether it also needs the aggregates that the one it is for refers to ([`Aggregate::references`]).
    pub references: bool,
}

/// A request that shows what a command does.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub verb: &'static str,
    /// In JSON.
    pub request: &'static str,
    /// The code with which it is refused; `None` if it is accepted.
    pub refused: Option<&'static str>,
}

impl Sample {
    pub const fn accepted(verb: &'static str, request: &'static str) -> Self {
        Self { verb, request, refused: None }
    }

    pub const fn refused(verb: &'static str, request: &'static str, code: &'static str) -> Self {
        Self { verb, request, refused: Some(code) }
    }
}
