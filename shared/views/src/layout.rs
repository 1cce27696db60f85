//! The layout of views in MongoDB: the collections and records that the projection service writes and the query service
//! reads, besides the documents of the views.

use bson::DateTime;
use serde::{Deserialize, Serialize};

use crate::Digest;

/// The collection of the generations of each view, with one [`Generations`] per view.
pub const VIEWS: &str = "views";
/// The collection of the progress of each generation, with one [`Checkpoint`] per generation.
pub const CHECKPOINTS: &str = "checkpoints";
/// The collection of what was found when two generations of a view were compared, by the name of the newer one.
pub const COMPARISONS: &str = "comparisons";
/// The collection of the leases by which a replica leads a generation.
pub const LEASES: &str = "leases";

/// The name of the collection of a view's generation, such as `orders@3`. It is also the `_id` of the checkpoint.
pub fn collection(view: &str, generation: i32) -> String {
    format!("{view}@{generation}")
}

/// All generations of a view. Each belongs to one version of the view's code, which alone reads and writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generations {
    /// The name of the view.
    #[serde(rename = "_id")]
    pub view: String,
    /// The last number that was given to a generation. None is given twice.
    #[serde(default)]
    pub last: i32,
    /// Empty also in a record of a program of before, until the projection service has taken it over.
    #[serde(default)]
    pub generations: Vec<Generation>,
}

/// A generation of a view: its documents are in the collection of its number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generation {
    pub number: i32,
    /// The `VERSION` of the view's code that the generation belongs to.
    pub version: i32,
    pub state: State,
    /// When it came into this state.
    pub since: DateTime,
    /// It becomes the serving one even if its digest differs from that of the one before.
    #[serde(default, skip_serializing_if = "is_false")]
    pub force: bool,
    /// Whether a comparison with the serving one shows the values that differ.
    #[serde(default, skip_serializing_if = "is_false")]
    pub values: bool,
    /// It has served before, and is brought up to date to serve again.
    #[serde(default, skip_serializing_if = "is_false")]
    pub returns: bool,
    /// Why it must not be served, in words. Queries of its version are answered `unavailable`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Since when nobody has kept it up to date, while another version of the view serves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_since: Option<DateTime>,
}

/// What a generation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It is being built, and becomes the serving one of its version.
    Building,
    /// It is kept up to date, and queries of its version read it.
    Serving,
    /// It served before the one that serves now, and can become the serving one again.
    Previous,
    /// It is being built to be compared with the serving one.
    Verifying,
    /// It was compared with the serving one, and its documents are gone.
    Verified,
    /// It was built, and did not become the serving one, because its documents differ.
    Refused,
    /// Its documents are about to be dropped.
    Dropping,
}

impl State {
    /// Whether a replica has to write it.
    pub fn is_led(self) -> bool {
        match self {
            Self::Building | Self::Serving | Self::Verifying => true,
            Self::Previous | Self::Verified | Self::Refused | Self::Dropping => false,
        }
    }
}

impl Generations {
    /// The generation of this version that serves queries.
    pub fn serving(&self, version: i32) -> Option<&Generation> {
        self.of(version).find(|generation| generation.state == State::Serving)
    }

    /// The generations of this version.
    pub fn of(&self, version: i32) -> impl Iterator<Item = &Generation> {
        self.generations.iter().filter(move |generation| generation.version == version)
    }

    pub fn find(&self, number: i32) -> Option<&Generation> {
        self.generations.iter().find(|generation| generation.number == number)
    }
}

/// The progress of a generation. It is written in the same transaction as the documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The name of the generation's collection.
    #[serde(rename = "_id")]
    pub collection: String,
    /// The position of the last event whose effect is in the documents.
    pub position: i64,
    /// The view's `VERSION` when the generation was created.
    pub version: i32,
    /// The lease term of the writer. A writer with an earlier term can no longer write.
    pub term: i64,
    /// The identity of the journal that the events are from; absent until it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal: Option<String>,
    /// How many events per second it was built at; absent unless it is being built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<f64>,
    /// The digest of the generation's documents; absent if it is unknown, because a program that computed no digests
    /// has written some of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// The branch of the journal that the last event is from; absent as long as `event` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The event at the position; absent at position 0, and in checkpoints of an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event: Option<EventMark>,
}

/// Tells an event from another at the same position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventMark {
    /// The identifier of its aggregate.
    pub aggregate: String,
    /// The version of its aggregate.
    pub version: i64,
    /// When it was recorded, in RFC 3339.
    pub recorded_at: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde demands a reference")]
fn is_false(value: &bool) -> bool {
    !value
}
