//! The macros that an aggregate is declared with. They are macros so that the name of each command and each event is
//! written once: its type, its subject, its encoding and its decoding cannot disagree.

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
/// and `JsonSchema` and has an `id: Id`: the aggregate that the command is for. One that `creates` is refused where
/// there is an aggregate with that identifier ([`crate::Aggregates::require_new`]); its `id` has a default, for the
/// service to fill. Every other command is refused where there is none.
macro_rules! commands {
    ($kind:ident { $($variant:ident($verb:literal, $($creates:ident,)? $description:literal))* }) => {
        #[derive(Clone, Debug, PartialEq)]
        pub enum Command {
            $($variant($variant)),*
        }

        impl Command {
            /// The aggregate that the command is for.
            pub fn target(&self) -> $crate::Id {
                match self { $(Self::$variant(command) => command.id),* }
            }

            pub(crate) fn creates(&self) -> bool {
                match self { $(Self::$variant(_) => creates!($($creates)?)),* }
            }

            pub(crate) fn to_json(&self) -> serde_json::Result<serde_json::Value> {
                match self { $(Self::$variant(command) => serde_json::to_value(command)),* }
            }
        }

        /// The kind of aggregate, as subjects name it.
        pub const KIND: &str = <$kind as $crate::Aggregate>::KIND;

        /// The commands, as the command service serves them.
        pub const COMMANDS: &[$crate::CommandType] = &[$($crate::CommandType {
            aggregate: KIND,
            verb: $verb,
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

/// Declares an aggregate's `Event` enum. Each variant holds a struct of the same name; the number is the version of
/// its schema, to be raised, with the old one still decoded, when the struct changes in a way that old payloads do not
/// satisfy.
macro_rules! events {
    ($($variant:ident($name:literal, $schema:literal))*) => {
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event {
            $($variant($variant)),*
        }

        /// The name and the version of the schema of each event.
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
                match (name, schema) {
                    $(($name, $schema) => Ok(Self::$variant($crate::decode_payload(payload)?)),)*
                    _ => Err($crate::Undecodable::Unknown),
                }
            }
        }
    };
}

/// Declares the modules of all aggregates and the enums over them from the one list of them in `lib.rs`, with the
/// matches that hand each to its module.
macro_rules! aggregates {
    ($($variant:ident($module:ident))*) => {
        $(pub mod $module;)*

        /// A command to any kind of aggregate, parsed and valid in itself.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Command {
            $($variant($module::Command)),*
        }

        /// What happened to an aggregate of any kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Event {
            $($variant($module::Event)),*
        }

        /// The present state of an aggregate of any kind.
        #[derive(Clone, Debug, PartialEq)]
        pub enum State {
            $($variant($module::$variant)),*
        }

        /// All commands of all aggregates.
        pub fn commands() -> impl Iterator<Item = &'static CommandType> {
            [$($module::COMMANDS),*].into_iter().flatten()
        }

        /// All codes with which commands are refused, each with the kind of the aggregate that has it and its meaning.
        /// The kind is empty for those that every aggregate has.
        pub fn rejections() -> impl Iterator<Item = (&'static str, &'static str, &'static str)> {
            [("", aggregates::REJECTIONS) $(, ($module::KIND, $module::$variant::REJECTIONS))*]
                .into_iter()
                .flat_map(|(kind, codes)| codes.iter().map(move |(code, meaning)| (kind, *code, *meaning)))
        }

        fn sample_lists() -> Vec<(&'static str, &'static [Sample])> {
            vec![$(($module::KIND, $module::$variant::SAMPLES)),*]
        }

        /// All events of all aggregates: kind, name, version of the schema.
        pub fn events() -> Vec<(&'static str, &'static str, i16)> {
            let mut events = Vec::new();
            $(events.extend($module::EVENTS.iter().map(|(name, schema)| {
                ($module::KIND, *name, *schema)
            }));)*
            events
        }

        impl Command {
            /// The aggregate that the command is for, which `Expected-Version` speaks of and whose version the reply
            /// tells.
            pub fn target(&self) -> Id {
                match self { $(Self::$variant(command) => command.target()),* }
            }

            /// The command as JSON, the same for all requests that mean it, however they are written.
            ///
            /// # Errors
            /// Never for the commands of this crate, whose types all have a JSON form.
            pub fn to_json(&self) -> serde_json::Result<serde_json::Value> {
                match self { $(Self::$variant(command) => command.to_json()),* }
            }

            /// Whether the command makes its target, and is refused where there is one.
            pub fn creates(&self) -> bool {
                match self { $(Self::$variant(command) => command.creates()),* }
            }

            fn needs(&self) -> Needs {
                match self { $(Self::$variant(command) => <$module::$variant as Aggregate>::needs(command)),* }
            }

            /// Every aggregate that the command reads or changes, its target first, repetitions allowed, but for those
            /// that only the state of its target names ([`Self::touches_references_of`]).
            pub fn touches(&self) -> Vec<Id> {
                let mut touched = vec![self.target()];
                touched.append(&mut self.needs().aggregates);
                touched
            }

            /// The aggregate whose own references ([`State::references`]) the command touches too: its target, or none.
            pub fn touches_references_of(&self) -> Option<Id> {
                self.needs().references.then(|| self.target())
            }

            /// The unique values that the command may take.
            pub fn claims(&self) -> Vec<Claim> {
                self.needs().claims
            }

            /// The events that the command leads to, or why it is refused.
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
            /// The kind of the aggregate: the middle word of the event's subject.
            pub fn aggregate(&self) -> &'static str {
                match self { $(Self::$variant(_) => $module::KIND),* }
            }

            /// The event's own name: the last word of its subject.
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

            /// # Errors
            /// If the kind, name or schema is not known, or the payload is not of that schema.
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

            /// The state as JSON, to be read again by [`State::decode`].
            ///
            /// # Errors
            /// Never for the states of this crate, whose types all have a JSON form.
            pub fn encode(&self) -> serde_json::Result<Vec<u8>> {
                match self { $(Self::$variant(state) => serde_json::to_vec(state)),* }
            }

            /// # Errors
            /// If the kind is not known or the JSON is not of its state.
            pub fn decode(aggregate: &str, json: &[u8]) -> Result<Self, Undecodable> {
                match aggregate {
                    $($module::KIND => Ok(Self::$variant(decode_payload(json)?)),)*
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
            /// changes nothing, so there is a state after every event if there was one before.
            pub(crate) fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
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
