//! All subjects, each written here and nowhere else. A prefix of one token may precede all of them, so that tests and
//! tenants can share a server.

use std::{fmt, str::FromStr};

/// A token that precedes every subject, for a tenant or a test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl FromStr for Prefix {
    type Err = InvalidPrefix;

    fn from_str(text: &str) -> Result<Self, InvalidPrefix> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if (1..=64).contains(&text.len()) && text.chars().all(plain) {
            return Ok(Self(text.to_owned()));
        }
        Err(InvalidPrefix)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Debug, thiserror::Error)]
#[error("expected one token of 1 to 64 letters, digits, '-' or '_'")]
pub struct InvalidPrefix;

/// All subjects of one installation.
#[derive(Clone, Debug, Default)]
pub struct Subjects {
    /// Empty, or the prefix followed by a dot.
    prefix: String,
}

impl Subjects {
    pub fn new(prefix: Option<&Prefix>) -> Self {
        Self { prefix: prefix.map(|prefix| format!("{prefix}.")).unwrap_or_default() }
    }

    /// `cmd.<aggregate>.<verb>`
    pub fn command(&self, aggregate: &str, verb: &str) -> String {
        format!("{}cmd.{aggregate}.{verb}", self.prefix)
    }

    /// `qry.<noun>.<verb>`
    pub fn query(&self, noun: &str, verb: &str) -> String {
        format!("{}qry.{noun}.{verb}", self.prefix)
    }

    /// `ops.<noun>.<verb>`
    pub fn operation(&self, noun: &str, verb: &str) -> String {
        format!("{}ops.{noun}.{verb}", self.prefix)
    }

    /// The subject with this name, such as `cmd.order.create`. A subject that has the prefix already stays as it is.
    pub fn named(&self, name: &str) -> String {
        if name.starts_with(&self.prefix) { name.to_owned() } else { format!("{}{name}", self.prefix) }
    }

    /// The name of a subject: the subject without its prefix.
    pub fn name<'a>(&self, subject: &'a str) -> &'a str {
        subject.strip_prefix(&self.prefix).unwrap_or(subject)
    }

    /// `evt.<aggregate>.<event>`
    pub fn event(&self, aggregate: &str, event: &str) -> String {
        format!("{}evt.{aggregate}.{event}", self.prefix)
    }

    /// The subjects that the stream stores.
    pub fn events(&self) -> String {
        format!("{}evt.>", self.prefix)
    }

    /// The aggregate and the event in an event's subject.
    pub fn parse_event<'a>(&self, subject: &'a str) -> Option<(&'a str, &'a str)> {
        subject.strip_prefix(&self.prefix)?.strip_prefix("evt.")?.split_once('.')
    }

    /// `view.<view>.checkpoint`
    pub fn checkpoint(&self, view: &str) -> String {
        format!("{}view.{view}.checkpoint", self.prefix)
    }

    /// The subject that matches the checkpoints of all views.
    pub fn checkpoints(&self) -> String {
        self.checkpoint("*")
    }

    /// The view in a checkpoint's subject.
    pub fn parse_checkpoint<'a>(&self, subject: &'a str) -> Option<&'a str> {
        subject.strip_prefix(&self.prefix)?.strip_prefix("view.")?.strip_suffix(".checkpoint")
    }

    /// `journal.committed`, by which one replica of the command service wakes the relay in another.
    pub fn committed(&self) -> String {
        format!("{}journal.committed", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_parsed_as_it_was_built() {
        for prefix in [None, Some("t1".parse().unwrap())] {
            let subjects = Subjects::new(prefix.as_ref());
            assert_eq!(subjects.parse_event(&subjects.event("order", "placed")), Some(("order", "placed")));
            assert_eq!(subjects.parse_checkpoint(&subjects.checkpoint("orders")), Some("orders"));
            let subject = subjects.named("cmd.order.create");
            assert_eq!(subject, subjects.command("order", "create"));
            assert_eq!((subjects.named(&subject), subjects.name(&subject)), (subject.clone(), "cmd.order.create"));
        }
        assert_eq!(Subjects::new(Some(&"t1".parse().unwrap())).events(), "t1.evt.>");
    }

    #[test]
    fn a_prefix_is_one_token() {
        for bad in ["", "a.b", "a*", ">", "a b", "é"] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }
}
