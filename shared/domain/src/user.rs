//! Users, who place orders. No two users have the same e-mail address, in whatever letter case and spelling, unless one
//! of them is deleted.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Aggregate, Aggregates, Claim, Country, Email, Id, Name, Needs, Rejection, Sample, Timestamp, strict};

commands! {
    User {
        Register("register", creates, "Registers a user; the e-mail address must be free")
        Update("update", "Changes the e-mail address, name or country of a user")
        Delete("delete", "Deletes a user and frees the e-mail address; orders stay")
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Register {
    /// Made by the service if absent; UUID version 7 recommended.
    #[serde(default, deserialize_with = "strict::or_default")]
    #[schemars(with = "Option<Id>", skip_serializing_if = "Id::is_none")]
    pub id: Id,
    #[serde(deserialize_with = "Email::requested")]
    pub email: Email,
    #[serde(deserialize_with = "Name::requested")]
    pub name: Name,
    #[serde(default, deserialize_with = "Country::requested_if_any")]
    pub country: Option<Country>,
}

/// What is absent stays as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Update {
    pub id: Id,
    #[serde(default, deserialize_with = "Email::requested_if_any")]
    pub email: Option<Email>,
    #[serde(default, deserialize_with = "Name::requested_if_any")]
    pub name: Option<Name>,
    #[serde(default, deserialize_with = "Country::requested_if_any")]
    pub country: Option<Country>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Delete {
    pub id: Id,
}

events! {
    Registered("registered", 1)
    Updated("updated", 1)
    Deleted("deleted", 1)
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Registered {
    pub email: Email,
    pub name: Name,
    pub country: Option<Country>,
}

/// The user after the change, not only the fields that changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Updated {
    pub email: Email,
    pub name: Name,
    pub country: Option<Country>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deleted {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "snake_case")]
pub enum User {
    Living(Living),
    Deleted,
}

/// A user who can place orders.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Living {
    pub email: Email,
    pub name: Name,
    pub country: Option<Country>,
}

impl Aggregate for User {
    const KIND: &'static str = "user";

    const REJECTIONS: &'static [(&'static str, &'static str)] = &[
        ("user_not_found", "the command names a user who does not exist, or not any more"),
        (
            "email_taken",
            "another user has this e-mail address, in whatever letter case and spelling; `details.id` is the user's",
        ),
    ];

    const SAMPLES: &'static [Sample] = &[
        Sample::accepted(
            "register",
            r#"{"id":"00000000-0000-0000-0000-000000000001","email":"ada@example.com","name":"Ada","country":"Malta"}"#,
        ),
        Sample::refused(
            "register",
            r#"{"id":"00000000-0000-0000-0000-000000000002","email":"ADA@example.com","name":"Grace"}"#,
            "email_taken",
        ),
        Sample::accepted(
            "update",
            r#"{"id":"00000000-0000-0000-0000-000000000001","email":"lovelace@example.com","name":"Ada Lovelace",
                "country":"United Kingdom"}"#,
        ),
        Sample::accepted(
            "register",
            r#"{"id":"00000000-0000-0000-0000-000000000002","email":"grace@example.com","name":"Grace"}"#,
        ),
        Sample::accepted("delete", r#"{"id":"00000000-0000-0000-0000-000000000002"}"#),
        Sample::refused("delete", r#"{"id":"00000000-0000-0000-0000-000000000002"}"#, "user_not_found"),
    ];

    type Command = Command;
    type Event = Event;

    fn needs(command: &Command) -> Needs {
        let claims = match command {
            Command::Register(Register { email, .. }) | Command::Update(Update { email: Some(email), .. }) => {
                vec![claim(email)]
            }
            Command::Update(Update { email: None, .. }) | Command::Delete(_) => vec![],
        };
        Needs { claims, ..Needs::default() }
    }

    fn decide(
        command: Command,
        aggregates: &Aggregates,
        _now: Timestamp,
    ) -> Result<Vec<(Id, crate::Event)>, Rejection> {
        let id = command.target();
        let event = match command {
            Command::Register(command) => command.decide(aggregates).map(Some),
            Command::Update(command) => command.decide(aggregates),
            Command::Delete(command) => command.decide(aggregates).map(Some),
        }?;
        Ok(event.into_iter().map(|event| (id, event.into())).collect())
    }

    fn evolve(before: Option<Self>, event: &Event) -> Option<Self> {
        match (before, event) {
            (None, Event::Registered(Registered { email, name, country }))
            | (Some(Self::Living(_)), Event::Updated(Updated { email, name, country })) => {
                Some(Self::Living(Living { email: email.clone(), name: name.clone(), country: country.clone() }))
            }
            (Some(Self::Living(_)), Event::Deleted(Deleted {})) => Some(Self::Deleted),
            (before, Event::Registered(_) | Event::Updated(_) | Event::Deleted(_)) => before,
        }
    }

    fn claims(&self) -> Vec<Claim> {
        match self {
            Self::Living(user) => vec![claim(&user.email)],
            Self::Deleted => vec![],
        }
    }
}

impl Register {
    fn decide(self, aggregates: &Aggregates) -> Result<Event, Rejection> {
        let Self { id, email, name, country } = self;
        aggregates.require_new(id)?;
        require_free(aggregates, id, &email)?;
        Ok(Event::Registered(Registered { email, name, country }))
    }
}

impl Update {
    fn decide(self, aggregates: &Aggregates) -> Result<Option<Event>, Rejection> {
        let Living { email, name, country } = living(aggregates, self.id)?;
        let updated = Updated {
            email: self.email.unwrap_or_else(|| email.clone()),
            name: self.name.unwrap_or_else(|| name.clone()),
            country: self.country.or_else(|| country.clone()),
        };
        if (&updated.email, &updated.name, &updated.country) == (email, name, country) {
            return Ok(None);
        }
        if claim(&updated.email) != claim(email) {
            require_free(aggregates, self.id, &updated.email)?;
        }
        Ok(Some(Event::Updated(updated)))
    }
}

impl Delete {
    fn decide(self, aggregates: &Aggregates) -> Result<Event, Rejection> {
        living(aggregates, self.id)?;
        Ok(Event::Deleted(Deleted {}))
    }
}

/// The user, who must exist.
///
/// # Errors
/// If there is no such user, or they are deleted.
pub(crate) fn living(aggregates: &Aggregates, id: Id) -> Result<&Living, Rejection> {
    match aggregates.get::<User>(id) {
        Some(User::Living(user)) => Ok(user),
        Some(User::Deleted) | None => {
            Err(Rejection::not_found("user_not_found", format!("there is no user {id}")).with("user", id.to_string()))
        }
    }
}

fn require_free(aggregates: &Aggregates, id: Id, email: &Email) -> Result<(), Rejection> {
    match aggregates.holder(&claim(email)) {
        Some(holder) if holder != id => Err(Rejection::conflict("email_taken", "another user has this e-mail address")
            .with("email", &**email)
            .with("id", holder.to_string())),
        Some(_) | None => Ok(()),
    }
}

fn claim(email: &Email) -> Claim {
    Claim { scope: "user.email", value: email.normalized() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::{
        RejectionKind::{Conflict, NotFound},
        scenario::{bare, command, create_product, given, id, register},
    };

    const ADA: &str = "ada@example.com";
    const BOB: &str = "bob@example.com";

    #[test]
    fn a_user_is_registered() {
        let request = json!({ "id": id(1), "email": ADA, "name": " Ada ", "country": "United Kingdom" });
        given([]).when(command("user.register", request)).then([(
            "user.registered",
            1,
            json!({ "email": ADA, "name": "Ada", "country": "United Kingdom" }),
        )]);
    }

    #[test]
    fn the_country_is_optional_and_the_service_makes_an_identifier_if_the_client_does_not() {
        let request = json!({ "email": ADA, "name": "Ada", "country": null });
        given([]).when(command("user.register", request)).then([(
            "user.registered",
            99,
            json!({ "email": ADA, "name": "Ada", "country": null }),
        )]);
    }

    #[test]
    fn an_identifier_cannot_be_used_again_after_a_deletion_or_for_another_kind() {
        let taken = json!({ "id": id(1) });
        let pasts = [
            vec![register(1, ADA)],
            vec![register(1, ADA), bare("user.delete", 1)],
            vec![create_product(1, "LANTERN", 5)],
        ];
        for past in pasts {
            given(past).when(register(1, BOB)).then_refused(Conflict, "id_taken", taken.clone());
        }
    }

    #[test]
    fn an_email_is_unique_whatever_its_letter_case() {
        given([register(1, ADA)]).when(register(2, "Ada@EXAMPLE.com")).then_refused(
            Conflict,
            "email_taken",
            json!({ "email": "Ada@EXAMPLE.com", "id": id(1) }),
        );
    }

    #[test]
    fn an_email_is_unique_whatever_its_spelling() {
        for (one, other) in [
            ("amélie@example.com", "AME\u{301}LIE@example.com"),
            ("ﬁona@example.com", "fiona@example.com"),
            ("ada@münchen.de", "ada@xn--mnchen-3ya.de"),
        ] {
            for (one, other) in [(one, other), (other, one)] {
                // The service normalises addresses to NFC.
                let shown = other.replace("E\u{301}", "É");
                given([register(1, one)]).when(register(2, other)).then_refused(
                    Conflict,
                    "email_taken",
                    json!({ "email": shown, "id": id(1) }),
                );
                given([register(1, one), bare("user.delete", 1)]).when(register(2, other)).then_accepted();
            }
        }
    }

    #[test]
    fn an_email_cannot_be_changed_to_that_of_another_user() {
        let update = command("user.update", json!({ "id": id(2), "email": "ADA@example.com" }));
        given([register(1, ADA), register(2, BOB)]).when(update).then_refused(
            Conflict,
            "email_taken",
            json!({ "email": "ADA@example.com", "id": id(1) }),
        );
    }

    #[test]
    fn an_email_is_free_again_after_a_deletion_and_after_a_change() {
        let change = command("user.update", json!({ "id": id(1), "email": BOB }));
        for past in [bare("user.delete", 1), change] {
            given([register(1, ADA), past]).when(register(2, ADA)).then([(
                "user.registered",
                2,
                json!({ "email": ADA, "name": "Ada", "country": null }),
            )]);
        }
    }

    #[test]
    fn an_email_is_taken_by_a_change_to_it() {
        let change = command("user.update", json!({ "id": id(1), "email": BOB }));
        given([register(1, ADA), change]).when(register(2, BOB)).then_refused(
            Conflict,
            "email_taken",
            json!({ "email": BOB, "id": id(1) }),
        );
    }

    #[test]
    fn an_update_changes_the_fields_that_it_has_and_keeps_the_rest() {
        let past = json!({ "id": id(1), "email": ADA, "name": "Ada", "country": "France" });
        let cases = [
            (json!({ "id": id(1), "email": BOB }), json!({ "email": BOB, "name": "Ada", "country": "France" })),
            (json!({ "id": id(1), "name": "Bob" }), json!({ "email": ADA, "name": "Bob", "country": "France" })),
            (json!({ "id": id(1), "country": "Malta" }), json!({ "email": ADA, "name": "Ada", "country": "Malta" })),
            (
                json!({ "id": id(1), "email": BOB, "name": "Bob", "country": "Malta" }),
                json!({ "email": BOB, "name": "Bob", "country": "Malta" }),
            ),
        ];
        for (request, event) in cases {
            let past = command("user.register", past.clone());
            given([past]).when(command("user.update", request)).then([("user.updated", 1, event)]);
        }
    }

    #[test]
    fn the_letter_case_of_ones_own_email_can_be_changed() {
        let update = command("user.update", json!({ "id": id(1), "email": "Ada@Example.com" }));
        given([register(1, ADA)]).when(update).then([(
            "user.updated",
            1,
            json!({ "email": "Ada@Example.com", "name": "Ada", "country": null }),
        )]);
    }

    #[test]
    fn an_update_that_changes_nothing_has_no_event() {
        for request in [
            json!({ "id": id(1) }),
            json!({ "id": id(1), "email": ADA, "name": "Ada" }),
            json!({ "id": id(1), "email": null, "name": null, "country": null }),
        ] {
            given([register(1, ADA)]).when(command("user.update", request)).then([]);
        }
    }

    #[test]
    fn a_user_is_deleted() {
        given([register(1, ADA)]).when(bare("user.delete", 1)).then([("user.deleted", 1, json!({}))]);
    }

    #[test]
    fn a_user_who_does_not_exist_or_is_deleted_can_be_neither_updated_nor_deleted() {
        for past in [vec![], vec![register(1, ADA), bare("user.delete", 1)], vec![create_product(1, "LANTERN", 5)]] {
            for command in [
                bare("user.update", 1),
                command("user.update", json!({ "id": id(1), "name": "Bob" })),
                bare("user.delete", 1),
            ] {
                given(past.clone()).when(command).then_refused(NotFound, "user_not_found", json!({ "user": id(1) }));
            }
        }
    }
}
