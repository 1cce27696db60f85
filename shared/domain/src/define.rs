//! The macros that declare an aggregate. With them the name of each command and each event is written once, so that its
//! type, its subject, its encoding and its decoding cannot disagree.

/// Declares an aggregate's `Command` enum and its `COMMANDS`, the endpoints of the command service:
///
/// ```text
/// commands! {
///     Review {
///         Write("write", creates, "Writes a review of a product")
///         Delete("delete", "Deletes a review")
///     }
/// }
/// ```
///
/// Each variant holds a struct of the same name, which derives `Serialize`, `Deserialize` (with `deny_unknown_fields`)
/// and `JsonSchema` and has an `id: Id`, the identifier of the command's own aggregate. A command marked `creates` is
/// refused if the identifier is in use ([`crate::Aggregates::require_new`]); its `id` may be absent, and the service
/// then makes one. Every other command is refused if there is no such aggregate. Each struct becomes a
/// [`crate::CommandRequest`], so that clients can send it.
macro_rules! commands {
    ($kind:ident { $($variant:ident($verb:literal, $($creates:ident,)? $description:literal))* }) => {
        #[derive(Clone, Debug, PartialEq)]
        pub enum Command {
            $($variant($variant)),*
        }

        impl Command {
            /// The identifier of the command's own aggregate.
            pub fn target(&self) -> $crate::Id {
                match self { $(Self::$variant(command) => command.id),* }
            }

            pub(crate) fn creates(&self) -> bool {
                match self { $(Self::$variant(_) => creates!($($creates)?)),* }
            }

            pub(crate) fn to_json(&self) -> serde_json::Result<serde_json::Value> {
                match self { $(Self::$variant(command) => $crate::CommandRequest::to_json(command)),* }
            }
        }

        $(impl $crate::CommandRequest for $variant {
            const AGGREGATE: &'static str = KIND;
            const VERB: &'static str = $verb;

            fn to_json(&self) -> serde_json::Result<serde_json::Value> {
                let mut json = serde_json::to_value(self)?;
                if let Some(fields) = json.as_object_mut().filter(|_| self.id.is_none()) {
                    fields.remove("id");
                }
                Ok(json)
            }
        })*

        /// The kind of aggregate, as it appears in subjects.
        pub const KIND: &str = <$kind as $crate::Aggregate>::KIND;

        /// The commands that the command service serves.
        pub const COMMANDS: &[$crate::CommandType] = &[$($crate::CommandType {
            aggregate: KIND,
            verb: <$variant as $crate::CommandRequest>::VERB,
            description: $description,
            schema: || schemars::schema_for!($variant),
            parse: |body, id| {
                let mut command: $variant = $crate::parse(body)?;
                if command.id.is_none() {
                    command.id = id;
                }
                Ok($crate::Command::$kind(Command::$variant(command)))
            },
        }),*];
    };
}

macro_rules! creates {
    () => {
        false
    };
    (creates) => {
        true
    };
}

/// Declares an aggregate's `Event` enum. Each variant holds a struct of the same name, whose JSON is the payload. The
/// number is the version of the payload's schema. It is raised when the struct changes; the event then names a type for
/// each older schema, from 1 on:
///
/// ```text
/// events! {
///     Written("written", 3, from WrittenV1, WrittenV2)
///     Deleted("deleted", 1)
/// }
/// ```
///
/// An older type derives `Deserialize` with `deny_unknown_fields`. A step from one schema to the next is a `From`:
/// here, `From<WrittenV1> for WrittenV2` and `From<WrittenV2> for Written`. It is pure, and has only the payload to go
/// by.
macro_rules! events {
    ($($variant:ident($name:literal, $schema:literal $(, from $($older:ident),+)?))*) => {
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event {
            $($variant($variant)),*
        }

        /// The name of each event and the version of its schema.
        pub const EVENTS: &[(&str, i16)] = &[$(($name, $schema)),*];

        impl Event {
            /// The last word of the event's subject.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name),* }
            }

            /// The version of the payload's schema.
            pub fn schema(&self) -> i16 {
                match self { $(Self::$variant(_) => $schema),* }
            }

            pub(crate) fn encode(&self) -> serde_json::Result<Vec<u8>> {
                match self { $(Self::$variant(event) => serde_json::to_vec(event)),* }
            }

            pub(crate) fn decode(name: &str, schema: i16, payload: &[u8]) -> Result<Self, $crate::Undecodable> {
                match name {
                    $($name => {
                        const OLDER: &[$crate::decode::ReadOlder<$variant>] =
                            older_schemas!($variant [] $($($older)+)?);
                        const _: () = assert!(
                            OLDER.len() + 1 == $schema,
                            "the event must name one type for each schema before the present one: `from V1, V2, …`"
                        );
                        let event = $crate::decode::decode_event((KIND, $name, $schema), OLDER, schema, payload)?;
                        Ok(Self::$variant(event))
                    })*
                    _ => Err($crate::Undecodable::Unknown),
                }
            }
        }
    };
}

/// The functions that read the older schemas of an event, each followed by the steps to the present schema.
macro_rules! older_schemas {
    ($present:ident [$($read:expr)*]) => {
        &[$($read),*]
    };
    ($present:ident [$($read:expr)*] $oldest:ident $($newer:ident)*) => {
        older_schemas!(
            $present
            [$($read)* |payload| {
                $crate::decode_payload::<$oldest>(payload).map(|old| upcast!(old, $($newer)* $present))
            }]
            $($newer)*
        )
    };
}

/// Turns a payload into that of the next schema, and so on to the last.
macro_rules! upcast {
    ($payload:expr,) => {
        $payload
    };
    ($payload:expr, $next:ident $($later:ident)*) => {
        upcast!(<$next>::from($payload), $($later)*)
    };
}

/// Declares the modules of all aggregates, and the enums that combine their commands, events and states, from the one
/// list in `lib.rs`.
macro_rules! aggregates {
    ($($variant:ident($module:ident))*) => {
        $(pub mod $module;)*

        /// A command to any kind of aggregate. Its fields are valid; the rules of the business are yet to be checked.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Command {
            $($variant($module::Command)),*
        }

        /// An event of any kind of aggregate.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event {
            $($variant($module::Event)),*
        }

        /// The current state of any kind of aggregate.
        #[derive(Clone, Debug, PartialEq)]
        pub enum State {
            $($variant($module::$variant)),*
        }

        /// All commands of all aggregates.
        pub fn commands() -> impl Iterator<Item = &'static CommandType> {
            [$($module::COMMANDS),*].into_iter().flatten()
        }

        /// All codes with which commands are refused, each with the kind of aggregate that declares it and its meaning.
        /// The kind is empty for the codes that all aggregates share.
        pub fn rejections() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
            [("", aggregates::REJECTIONS) $(, ($module::KIND, $module::$variant::REJECTIONS))*]
                .into_iter()
                .flat_map(|(kind, codes)| codes.iter().map(move |(code, meaning)| (kind, *code, *meaning)))
        }

        fn sample_lists() -> Vec<(&'static str, &'static [Sample])> {
            vec![$(($module::KIND, $module::$variant::SAMPLES)),*]
        }

        /// All events of all aggregates, each as its kind, its name and the version of its schema.
        pub fn events() -> Vec<(&'static str, &'static str, i16)> {
            let mut events = Vec::new();
            $(events.extend($module::EVENTS.iter().map(|(name, schema)| {
                ($module::KIND, *name, *schema)
            }));)*
            events
        }

        impl Command {
            /// The identifier of the command's own aggregate. `Expected-Version` refers to its version, and the reply
            /// gives its new one.
            pub fn target(&self) -> Id {
                match self { $(Self::$variant(command) => command.target()),* }
            }

            /// The command as JSON. Requests that mean the same command give the same JSON, however they are written.
            ///
            /// # Errors
            /// Never for the commands of this crate, whose types all have a JSON form.
            pub fn to_json(&self) -> serde_json::Result<serde_json::Value> {
                match self { $(Self::$variant(command) => command.to_json()),* }
            }

            /// Whether the command creates its target, and so is refused if the identifier is in use.
            pub fn creates(&self) -> bool {
                match self { $(Self::$variant(command) => command.creates()),* }
            }

            fn needs(&self) -> Needs {
                match self { $(Self::$variant(command) => <$module::$variant as Aggregate>::needs(command)),* }
            }

            /// The aggregates that the command reads or changes, its target first, possibly with repetitions. Those
            /// that are known only from the state of the target are not included ([`Self::touches_references_of`]).
            pub fn touches(&self) -> Vec<Id> {
                let mut touched = vec![self.target()];
                touched.append(&mut self.needs().aggregates);
                touched
            }

            /// The target, if the command also touches the aggregates that the target refers to
            /// ([`State::references`]).
            pub fn touches_references_of(&self) -> Option<Id> {
                self.needs().references.then(|| self.target())
            }

            /// The unique values that the command may take.
            pub fn claims(&self) -> Vec<Claim> {
                self.needs().claims
            }

            /// The events that the command leads to, or the reason why it is refused.
            pub(crate) fn decide(self, aggregates: &Aggregates, now: Timestamp) -> Result<Vec<(Id, Event)>, Rejection> {
                match self {
                    $(Self::$variant(command) => <$module::$variant as Aggregate>::decide(command, aggregates, now)),*
                }
            }
        }

        $(impl From<$module::Event> for Event {
            fn from(event: $module::Event) -> Self {
                Self::$variant(event)
            }
        })*

        impl Event {
            /// The kind of the aggregate, which is the middle word of the event's subject.
            pub fn aggregate(&self) -> &'static str {
                match self { $(Self::$variant(_) => $module::KIND),* }
            }

            /// The event's own name, which is the last word of its subject.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(event) => event.name()),* }
            }

            /// The version of the payload's schema.
            pub fn schema(&self) -> i16 {
                match self { $(Self::$variant(event) => event.schema()),* }
            }

            /// The payload, as JSON.
            ///
            /// # Errors
            /// Never for the events of this crate, whose types all have a JSON form.
            pub fn encode(&self) -> serde_json::Result<Vec<u8>> {
                match self { $(Self::$variant(event) => event.encode()),* }
            }

            /// Decodes a stored event. A payload of an older schema is turned into the present one.
            ///
            /// # Errors
            /// If the kind, name or schema is unknown, the schema is newer than this program knows, or the payload does
            /// not have it.
            pub fn decode(aggregate: &str, name: &str, schema: i16, payload: &[u8]) -> Result<Self, Undecodable> {
                match aggregate {
                    $($module::KIND => {
                        $module::Event::decode(name, schema, payload).map(Self::$variant)
                    })*
                    _ => Err(Undecodable::Unknown),
                }
            }
        }

        impl State {
            /// The kind of the aggregate.
            pub fn aggregate(&self) -> &'static str {
                match self { $(Self::$variant(_) => $module::KIND),* }
            }

            /// The version of the state's form ([`Aggregate::FORM`]).
            pub fn form(&self) -> i16 {
                match self { $(Self::$variant(_) => <$module::$variant as Aggregate>::FORM),* }
            }

            /// The state as JSON, as [`State::decode`] reads it.
            ///
            /// # Errors
            /// Never for the states of this crate, whose types all have a JSON form.
            pub fn encode(&self) -> serde_json::Result<Vec<u8>> {
                match self { $(Self::$variant(state) => serde_json::to_vec(state)),* }
            }

            /// Decodes a stored state. One that cannot be decoded can be folded anew from the aggregate's events.
            ///
            /// # Errors
            /// If the kind is unknown, the form is not the present one, or the JSON does not have it.
            pub fn decode(aggregate: &str, form: i16, json: &[u8]) -> Result<Self, Undecodable> {
                match aggregate {
                    $($module::KIND => match <$module::$variant as Aggregate>::FORM {
                        known if known == form => Ok(Self::$variant(decode_payload(json)?)),
                        known => Err(Undecodable::Form { form, known }),
                    })*
                    _ => Err(Undecodable::Unknown),
                }
            }

            /// The aggregates that this one refers to ([`Aggregate::references`]).
            pub fn references(&self) -> Vec<Id> {
                match self { $(Self::$variant(state) => Aggregate::references(state)),* }
            }

            /// The unique values that the aggregate holds in this state.
            pub fn claims(&self) -> Vec<Claim> {
                match self { $(Self::$variant(state) => Aggregate::claims(state)),* }
            }

            /// The state after the event. An event that no `decide` emits in this state, such as one of another kind,
            /// leaves it unchanged. So if there is a state before the event, there is one after it. The state of an
            /// aggregate is that after all of its events, in the order of their versions, and nothing else.
            pub fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
                match (before, event) {
                    $(
                        (None, Event::$variant(event)) => {
                            <$module::$variant as Aggregate>::evolve(None, event).map(Self::$variant)
                        }
                        (Some(Self::$variant(state)), Event::$variant(event)) => {
                            <$module::$variant as Aggregate>::evolve(Some(state), event).map(Self::$variant)
                        }
                    )*
                    (before, _) => before,
                }
            }
        }

        $(impl Kind for $module::$variant {
            fn of(state: &State) -> Option<&Self> {
                match state {
                    State::$variant(state) => Some(state),
                    #[allow(unreachable_patterns, reason = "unreachable while there is one aggregate")]
                    _ => None,
                }
            }
        })*
    };
}
