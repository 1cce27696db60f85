//! The replies to `$SRV.STATS`, read so that those of another version count as far as they go: whatever is absent has a
//! default, and what is unknown is ignored.

use std::collections::BTreeMap;

use domain::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The reply of one replica.
#[derive(Clone, Debug, Deserialize)]
pub struct Reply {
    /// `command`, `projection` or `query`.
    pub name: String,
    /// The replica's name.
    pub id: String,
    #[serde(default)]
    pub version: String,
    #[serde(default)]
    pub started: Option<Timestamp>,
    #[serde(default)]
    pub metadata: Metadata,
    /// The replica's figures as they came.
    #[serde(default)]
    pub data: Value,
}

/// Several installations may share a NATS server, and the metadata tell which one a replica belongs to. They are absent
/// in replies of programs other than Watershed's.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    pub revision: String,
    pub stream: Option<String>,
    pub prefix: Option<String>,
}

/// A replica's figures. Each service tells only some of them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Figures {
    pub ready: Option<bool>,
    /// What the replica itself finds wrong, in words.
    pub problems: Vec<String>,
    /// The servers that it needs, by name.
    pub servers: BTreeMap<String, Server>,
    pub queue: Option<Queue>,
    pub batches: Option<Batches>,
    pub known_aggregates: Option<u64>,
    /// Whether it runs the relay.
    pub relay: bool,
    pub journal: Position,
    pub stream: Position,
    /// Of a projection replica: those that it leads.
    pub views: Vec<View>,
    /// Of a projection replica: the generations that it builds.
    pub builds: Vec<Build>,
    pub in_flight: Option<u64>,
    pub max_in_flight: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Server {
    pub up: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Queue {
    pub commands: u64,
    pub bytes: u64,
    pub max_commands: u64,
    pub max_bytes: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Batches {
    pub last: u64,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Position {
    /// `None` while unknown.
    pub position: Option<u64>,
}

/// A view, as a projection replica that leads it sees it, or as a query replica does, which tells only its position.
#[derive(Clone, Debug, Deserialize)]
pub struct View {
    pub view: String,
    /// `None` or 0 if the replica has not read it yet, or no generation serves queries of the replica's version.
    #[serde(default)]
    pub generation: Option<u64>,
    #[serde(default)]
    pub version: Option<u64>,
    #[serde(default)]
    pub term: Option<u64>,
    /// `None` if there is no such view yet.
    #[serde(default)]
    pub position: Option<u64>,
    /// The age of the oldest event that is not yet visible.
    #[serde(default)]
    pub lag_seconds: Option<f64>,
    #[serde(default)]
    pub events_per_second: Option<f64>,
    #[serde(default)]
    pub state: State,
    /// Why it stands still, or cannot be read.
    #[serde(default)]
    pub reason: Option<String>,
}

/// A generation that a projection replica builds.
#[derive(Clone, Debug, Deserialize)]
pub struct Build {
    pub view: String,
    pub generation: u64,
    /// `building`, or `verifying` if it will not serve.
    pub state: String,
    #[serde(default)]
    pub position: Option<u64>,
    #[serde(default)]
    pub events_per_second: Option<f64>,
    /// Why it does not go on.
    #[serde(default)]
    pub reason: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    #[default]
    Live,
    CatchingUp,
    Failing,
    /// No generation serves queries. This is a conclusion; no reply says so.
    #[serde(skip_deserializing)]
    Unserved,
    /// No replica leads the view. This is a conclusion; no reply says so.
    #[serde(skip_deserializing)]
    Abandoned,
    /// One of another version.
    #[serde(other)]
    Unknown,
}
