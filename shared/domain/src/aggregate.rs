//! The contract between an aggregate and the rest of the system. `docs/extending.md` walks through an example.

use serde::{Serialize, de::DeserializeOwned};

use crate::{Aggregates, Claim, Id, Rejection, Timestamp};

/// A kind of aggregate, implemented by the type of its state. The state is stored as JSON after every command and read
/// back before the next, in the form that the program knows; a state of another form is folded anew from the events.
///
/// The aggregate's file also declares its commands and its events (the macros `commands!` and `events!`), and the list
/// in `lib.rs` names it. Endpoints, schemas, subjects and tests are all derived from these.
pub trait Aggregate: Serialize + DeserializeOwned + Sized {
    /// The aggregate's name in subjects: `cmd.<KIND>.<verb>` and `evt.<KIND>.<event>`. It must not change once an event
    /// is stored.
    const KIND: &'static str;

    /// The version of the form of the stored states. It has to be raised when the JSON of a state changes, or what
    /// [`Self::evolve`] makes of events that are stored.
    const FORM: i16 = 1;

    /// The codes with which the aggregate's commands are refused, each with an explanation for the authors of clients.
    const REJECTIONS: &'static [(&'static str, &'static str)] = &[];

    /// Requests in an order in which they can be sent, after the samples of the aggregates further up in the list. The
    /// tests that cover all aggregates and all views run on them. Together they must show every command accepted with
    /// all of its fields, every event, and every code of [`Self::REJECTIONS`].
    const SAMPLES: &'static [Sample];

    /// The enum that `commands!` declares.
    type Command;

    /// The enum that `events!` declares.
    type Event;

    /// What must be loaded to decide the command, besides its own aggregate. The command service loads and locks
    /// exactly this, so nothing else is in the [`Aggregates`] that [`Self::decide`] is given.
    fn needs(_command: &Self::Command) -> Needs {
        Needs::default()
    }

    /// The events that the command leads to, each with the identifier of the aggregate that it changes. A command that
    /// would change nothing succeeds without an event.
    ///
    /// # Errors
    /// Returns the reason if the command is refused.
    fn decide(
        command: Self::Command,
        aggregates: &Aggregates,
        now: Timestamp,
    ) -> Result<Vec<(Id, crate::Event)>, Rejection>;

    /// The state after the event; `before` is `None` for the aggregate's first event. An event that [`Self::decide`]
    /// never emits in this state must leave it unchanged, `None` included.
    fn evolve(before: Option<Self>, event: &Self::Event) -> Option<Self>;

    /// The unique values that the aggregate holds in this state.
    fn claims(&self) -> Vec<Claim> {
        vec![]
    }

    /// The aggregates that this one refers to, for commands that ask for them by [`Needs::references`]. The list may
    /// contain repetitions. It is read before the aggregate is locked, so it must be the same in every state in which
    /// it is not empty.
    fn references(&self) -> Vec<Id> {
        vec![]
    }
}

/// What must be loaded to decide a command, besides its own aggregate.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    /// The other aggregates that the command names and then reads or changes. Repetitions are allowed.
    pub aggregates: Vec<Id>,
    /// The unique values that the command may take.
    pub claims: Vec<Claim>,
    /// Whether the command also needs the aggregates that its own aggregate refers to ([`Aggregate::references`]).
    pub references: bool,
}

/// An example of a request, with its outcome.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub verb: &'static str,
    /// The body of the request, in JSON.
    pub request: &'static str,
    /// The code with which the request is refused; `None` if it is accepted.
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
