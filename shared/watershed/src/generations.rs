//! Views and their generations as `ops.view.*` describe them, read so that replies of another version count as far as
//! they go.

use domain::Timestamp;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{Failure, operator::Operator, words::percent};

/// One view.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct View {
    pub view: String,
    /// The version of the view's code in the replica that has answered.
    pub version: Option<u64>,
    pub problem: Option<String>,
    pub generations: Vec<Generation>,
}

/// One generation of a view.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Generation {
    #[serde(rename = "generation")]
    pub number: u64,
    pub version: Option<u64>,
    pub state: State,
    /// When it came into this state.
    pub since: Option<Timestamp>,
    /// Whether it has served before, and is brought up to date to serve again.
    pub returns: bool,
    pub position: Option<u64>,
    /// How many events the stream has after the position.
    pub events_left: Option<u64>,
    pub events_per_second: Option<f64>,
    pub seconds_left: Option<f64>,
    pub leader: Option<String>,
    pub documents: Option<u64>,
    pub bytes: Option<u64>,
    pub problem: Option<String>,
    /// What was found when it was compared with the serving one.
    pub comparison: Option<Value>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Building,
    Serving,
    Previous,
    Verifying,
    Verified,
    Refused,
    Dropping,
    /// One of another version.
    #[default]
    #[serde(other)]
    Unknown,
}

impl View {
    /// # Errors
    /// If it is no description of a view.
    pub fn read(reply: &Value) -> Result<Self, Failure> {
        Self::deserialize(reply).map_err(unreadable)
    }

    pub fn find(&self, number: u64) -> Option<&Generation> {
        self.generations.iter().find(|generation| generation.number == number)
    }

    pub fn serving(&self, version: Option<u64>) -> Option<&Generation> {
        self.generations.iter().find(|it| it.state == State::Serving && (version.is_none() || it.version == version))
    }
}

impl View {
    /// The generation that a return leads to: the one that is on its way back, or else the last one that served.
    pub fn to_return_to(&self) -> Option<u64> {
        let own = || self.generations.iter().filter(|it| it.version == self.version);
        let returning = own().find(|it| it.state == State::Building && it.returns);
        let previous = || own().filter(|it| it.state == State::Previous).max_by_key(|it| it.since);
        returning.or_else(previous).map(|generation| generation.number)
    }
}

impl Generation {
    /// How many events there are up to the end of the stream.
    pub fn total(&self) -> Option<u64> {
        Some(self.position? + self.events_left?)
    }

    pub fn percent(&self) -> Option<String> {
        Some(percent(self.position?, self.total()?))
    }
}

impl State {
    pub fn words(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Serving => "serving",
            Self::Previous => "previous",
            Self::Verifying => "verifying",
            Self::Verified => "verified",
            Self::Refused => "refused",
            Self::Dropping => "dropping",
            Self::Unknown => "?",
        }
    }
}

/// All views.
///
/// # Errors
/// As [`Operator::ask`].
pub async fn list(operator: &Operator) -> Result<(Value, Vec<View>), Failure> {
    let reply = operator.ask("view.list", &json!({})).await?;
    let views = Vec::<View>::deserialize(&reply["views"]).map_err(unreadable)?;
    Ok((reply, views))
}

/// One view.
///
/// # Errors
/// As [`Operator::ask`].
pub async fn show(operator: &Operator, view: &str) -> Result<(Value, View), Failure> {
    let reply = operator.ask("view.show", &json!({ "view": view })).await?;
    let view = View::read(&reply)?;
    Ok((reply, view))
}

pub fn unreadable(error: serde_json::Error) -> Failure {
    Failure::Refused(format!("the reply cannot be read by this version of `watershed`: {error}"))
}
