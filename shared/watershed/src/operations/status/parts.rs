//! What is shown of each part of an installation.

use std::time::Duration;

use domain::Timestamp;
use serde::Serialize;
use serde_json::Value;

use super::{
    observer::{Movement, Seen},
    replies::{Figures, State},
};

#[derive(Debug, Serialize)]
pub struct JournalStatus {
    /// The highest position that anybody has seen. Without a replica of the command service, there may be higher ones.
    pub position: Option<u64>,
    /// Whether a replica of the command service has told the position.
    pub is_known: bool,
    pub events_per_second: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct RelayStatus {
    /// The replicas that say that they run the relay: one, but for moments.
    pub replicas: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct StreamStatus {
    pub name: String,
    pub prefix: String,
    pub position: Option<u64>,
    /// How many events it is behind the journal.
    pub lag_events: Option<u64>,
    pub events_per_second: Option<f64>,
}

#[derive(Debug, Serialize)]
pub struct ViewStatus {
    pub view: String,
    /// 0 if none is known to serve.
    pub generation: u64,
    pub version: Option<u64>,
    pub position: Option<u64>,
    /// How many events it is behind the journal.
    pub lag_events: Option<u64>,
    /// The age of the oldest event that is not yet visible; `None` if nobody can tell.
    pub lag_seconds: Option<f64>,
    pub events_per_second: Option<f64>,
    /// The replica that leads the view.
    pub leader: Option<String>,
    pub term: Option<u64>,
    pub state: State,
    pub reason: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct BuildStatus {
    pub view: String,
    pub generation: u64,
    /// `building`, or `verifying` if it will not serve.
    pub state: String,
    pub position: Option<u64>,
    /// How many events it is behind the stream.
    pub events_left: Option<u64>,
    pub events_per_second: Option<f64>,
    pub seconds_left: Option<f64>,
    /// The replica that builds it.
    pub leader: String,
    /// Why it does not go on.
    pub reason: Option<String>,
}

#[derive(Debug, Serialize)]
pub struct ReplicaStatus {
    pub service: String,
    pub replica: String,
    pub version: String,
    pub revision: String,
    pub up_seconds: Option<u64>,
    /// How long ago it answered; 0 if it has just answered.
    pub silent_seconds: f64,
    pub ready: Option<bool>,
    /// Its figures, as it tells them.
    pub data: Value,
    #[serde(skip)]
    pub figures: Figures,
    /// Why its figures cannot be read.
    #[serde(skip)]
    pub unreadable: Option<String>,
}

/// A view, and what is known of it besides.
pub struct ObservedView {
    pub status: ViewStatus,
    pub movement: Movement,
    /// All replicas that say that they lead it, and for how long there have been several.
    pub leaders: Vec<String>,
    pub contested: Option<Duration>,
}

impl ViewStatus {
    /// The view's name, with the generation unless it is the first.
    pub fn title(&self) -> String {
        match self.generation {
            0 | 1 => self.view.clone(),
            generation => format!("{}@{generation}", self.view),
        }
    }
}

impl ReplicaStatus {
    pub fn new(Seen { reply, silent, .. }: &Seen, at: Timestamp) -> Self {
        let read: Result<Option<Figures>, _> = serde_json::from_value(reply.data.clone());
        let (figures, unreadable) = match read {
            Ok(figures) => (figures.unwrap_or_default(), None),
            Err(error) => (Figures::default(), Some(error.to_string())),
        };
        let up_millis = reply.started.map(|started| at.unix_millis().saturating_sub(started.unix_millis()));
        Self {
            service: reply.name.clone(),
            replica: reply.id.clone(),
            version: reply.version.clone(),
            revision: reply.metadata.revision.clone(),
            up_seconds: up_millis.map(|millis| u64::try_from(millis / 1000).unwrap_or_default()),
            silent_seconds: silent.as_secs_f64(),
            ready: figures.ready,
            data: reply.data.clone(),
            figures,
            unreadable,
        }
    }

    /// Whether it has answered just now.
    pub fn answers(&self) -> bool {
        self.silent_seconds == 0.0
    }
}
