//! TODO: what __name__s are, and what always holds of them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Aggregate, Aggregates, Id, Name, Needs, Rejection, Sample, Timestamp, strict};

commands! {
    __Type__ {
        Create("create", creates, "Creates a __name__")
        Rename("rename", "Changes the name of a __name__")
        Delete("delete", "Deletes a __name__")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Create {
    /// Made by the service if absent; UUID version 7 recommended.
    #[serde(default, deserialize_with = "strict::or_default")]
    #[schemars(with = "Option<Id>", skip_serializing_if = "Id::is_none")]
    pub id: Id,
    #[serde(deserialize_with = "Name::requested")]
    pub name: Name,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rename {
    pub id: Id,
    #[serde(deserialize_with = "Name::requested")]
    pub name: Name,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    pub id: Id,
}

events! {
    Created("created", 1)
    Renamed("renamed", 1)
    Deleted("deleted", 1)
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Created {
    pub name: Name,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Renamed {
    pub name: Name,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deleted {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum __Type__ {
    Living { name: Name },
    Deleted,
}

impl Aggregate for __Type__ {
    const KIND: &'static str = "__name__";

    const REJECTIONS: &'static [(&'static str, &'static str)] =
        &[("__name___not_found", "the command names a __name__ that does not exist, or not any more")];

    const SAMPLES: &'static [Sample] = &[
        Sample::accepted("create", r#"{"id":"__first_id__","name":"First"}"#),
        Sample::accepted("rename", r#"{"id":"__first_id__","name":"Renamed"}"#),
        Sample::accepted("create", r#"{"id":"__second_id__","name":"Second"}"#),
        Sample::accepted("delete", r#"{"id":"__second_id__"}"#),
        Sample::refused("delete", r#"{"id":"__second_id__"}"#, "__name___not_found"),
    ];

    type Command = Command;
    type Event = Event;

    /// TODO: other aggregates that a command reads or changes, and unique values that it may take.
    fn needs(_command: &Command) -> Needs {
        Needs::default()
    }

    fn decide(
        command: Command,
        aggregates: &Aggregates,
        _now: Timestamp,
    ) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        let id = command.target();
        let event = match command {
            Command::Create(Create { name, .. }) => {
                aggregates.require_new(id)?;
                Some(Event::Created(Created { name }))
            }
            Command::Rename(Rename { name, .. }) => {
                let is_changed = *living(aggregates, id)? != name;
                is_changed.then_some(Event::Renamed(Renamed { name }))
            }
            Command::Delete(_) => {
                living(aggregates, id)?;
                Some(Event::Deleted(Deleted {}))
            }
        };
        Ok(event.into_iter().map(|event| (id, event.into())).collect())
    }

    fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
        match (before, event) {
            (None, Event::Created(Created { name })) | (Some(Self::Living { .. }), Event::Renamed(Renamed { name })) => {
                Some(Self::Living { name: name.clone() })
            }
            (Some(Self::Living { .. }), Event::Deleted(Deleted {})) => Some(Self::Deleted),
            (before, Event::Created(_) | Event::Renamed(_) | Event::Deleted(_)) => before,
        }
    }
}

/// The name of the __name__, which must be there.
///
/// # Errors
/// If there is no such __name__, or not any more.
fn living(aggregates: &Aggregates, id: Id) -> Result<&Name, Rejection> {
    match aggregates.get::<__Type__>(id) {
        Some(__Type__::Living { name }) => Ok(name),
        Some(__Type__::Deleted) | None => {
            Err(Rejection::not_found("__name___not_found", format!("there is no __name__ {id}")).with("__name__", id.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{
        Command,
        RejectionKind::NotFound,
        scenario::{bare, command, given, id},
    };

    fn create(n: u128) -> Command {
        command("__name__.create", json!({ "id": id(n), "name": "First" }))
    }

    fn rename(n: u128, name: &str) -> Command {
        command("__name__.rename", json!({ "id": id(n), "name": name }))
    }

    #[test]
    fn one_is_created_renamed_and_deleted() {
        given([]).when(create(1)).then([("__name__.created", 1, json!({ "name": "First" }))]);
        given([create(1)]).when(rename(1, "Second")).then([("__name__.renamed", 1, json!({ "name": "Second" }))]);
        given([create(1)]).when(rename(1, "First")).then([]);
        given([create(1)]).when(bare("__name__.delete", 1)).then([("__name__.deleted", 1, json!({}))]);
    }

    #[test]
    fn one_that_is_not_there_cannot_be_changed() {
        for past in [vec![], vec![create(1), bare("__name__.delete", 1)]] {
            for command in [rename(1, "Second"), bare("__name__.delete", 1)] {
                given(past.clone()).when(command).then_refused(NotFound, "__name___not_found", json!({ "__name__": id(1) }));
            }
        }
    }
}
