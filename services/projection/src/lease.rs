//! Who leads each view: leases in MongoDB, by its clock. The invariant: whoever is given a view's lease gets a higher
//! term than all before. That only one writes follows from the term in the checkpoint; a lease says who should try.
//!
//! A lease is `{_id: view, holder, term, expires, session}`. A replica has an entry of its own,
//! `{_id: "replica/…", holder, expires}`, so that all know how many live. A holder is a replica's name and, since somebody
//! may give two of them the same, an identifier of the process.

use std::time::Duration;

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::{Collection, Database, error::Error, options::ReturnDocument};
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;
use views::layout::LEASES;

const REPLICA: &str = "replica/";
/// Between a replica's name and the identifier of its process. No name has it.
const SEPARATOR: char = '/';
/// Entries of replicas that have been dead for this long are cleared away.
const FORGOTTEN_AFTER_MS: i64 = 3_600_000;

/// This replica's hand on the leases.
#[derive(Clone)]
pub struct Leases {
    table: Collection<Document>,
    replica: String,
    duration: Duration,
}

/// The lease of a view, as this replica was given it.
pub struct Lease {
    pub view: &'static str,
    pub term: i64,
    /// By this process's clock, and earlier than by the server's.
    pub valid_until: watch::Receiver<Instant>,
}

/// The entries as they were a moment ago.
pub struct Seen(Vec<Entry>);

#[derive(Debug, Deserialize)]
pub struct Entry {
    #[serde(rename = "_id")]
    id: String,
    holder: Option<String>,
    #[serde(default)]
    term: i64,
    /// It has not expired.
    live: bool,
}

impl Leases {
    /// `name` is the replica's.
    pub fn new(database: &Database, name: &str, duration: Duration) -> Self {
        let replica = format!("{name}{SEPARATOR}{}", Uuid::now_v7());
        Self { table: database.collection(LEASES), replica, duration }
    }

    pub fn duration(&self) -> Duration {
        self.duration
    }

    pub fn replica(&self) -> &str {
        &self.replica
    }

    /// Says that this replica lives, and renews all that it holds.
    pub async fn renew(&self) -> Result<(), Error> {
        let renewal = doc! { "$set": { "holder": &self.replica, "expires": self.expiry() } };
        let entry = format!("{REPLICA}{}", self.replica);
        let told = self.table.update_one(doc! { "_id": entry }, vec![renewal.clone()]).upsert(true).await?;
        if told.upserted_id.is_some() {
            self.clear().await?;
        }
        self.table.update_many(doc! { "holder": &self.replica }, vec![renewal]).await?;
        Ok(())
    }

    /// What all hold.
    pub async fn look(&self) -> Result<Seen, Error> {
        let live = doc! { "$gt": ["$expires", "$$NOW"] };
        let wanted = doc! { "holder": 1, "term": 1, "live": live };
        let entries = self.table.clone_with_type().find(doc! {}).projection(wanted).await?;
        Ok(Seen(entries.try_collect().await?))
    }

    /// Takes the lease of a view if it is free, and says its new term.
    pub async fn acquire(&self, view: &str) -> Result<Option<i64>, Error> {
        self.table.update_one(doc! { "_id": view }, doc! { "$setOnInsert": { "term": 0_i64 } }).upsert(true).await?;
        // What this replica holds without knowing it, for an answer was lost, is free for it.
        let mine = doc! { "$eq": ["$holder", &self.replica] };
        let free = doc! { "$or": [mine, { "$lte": ["$expires", "$$NOW"] }] };
        let given = doc! { "holder": &self.replica, "term": { "$add": ["$term", 1] }, "expires": self.expiry() };
        let lease = self
            .table
            .clone_with_type::<Taken>()
            .find_one_and_update(doc! { "_id": view, "$expr": free }, vec![doc! { "$set": given }])
            .projection(doc! { "term": 1 })
            .return_document(ReturnDocument::After)
            .await?;
        Ok(lease.map(|lease| lease.term))
    }

    /// Gives a lease back, at once free for others. The next one's term will be higher than this one's and `above`.
    pub async fn release(&self, lease: &Lease, above: i64) -> Result<(), Error> {
        let free = doc! { "$set": { "term": lease.term.max(above) }, "$unset": { "holder": "", "expires": "", "session": "" } };
        self.table.update_one(self.held(lease), free).await.map(drop)
    }

    /// Says that this replica is gone, and gives back what it may still hold.
    pub async fn leave(&self) -> Result<(), Error> {
        self.table.delete_one(doc! { "_id": format!("{REPLICA}{}", self.replica) }).await?;
        let free = doc! { "$unset": { "holder": "", "expires": "" } };
        self.table.update_many(doc! { "holder": &self.replica }, free).await.map(drop)
    }

    /// The session that was noted with a lease; `None` if the lease has gone to somebody else.
    pub async fn session(&self, lease: &Lease) -> Result<Option<Noted>, Error> {
        self.table.clone_with_type().find_one(self.held(lease)).projection(doc! { "_id": 0, "session": 1 }).await
    }

    /// Notes the session in which the holder of a lease writes, for those who come after it. Says whether the lease is
    /// still held.
    pub async fn note_session(&self, lease: &Lease, session: &Document) -> Result<bool, Error> {
        let noted = self.table.update_one(self.held(lease), doc! { "$set": { "session": session } }).await?;
        Ok(noted.matched_count == 1)
    }

    fn held(&self, lease: &Lease) -> Document {
        doc! { "_id": lease.view, "holder": &self.replica, "term": lease.term }
    }

    fn expiry(&self) -> Document {
        doc! { "$add": ["$$NOW", i64::try_from(self.duration.as_millis()).unwrap_or(i64::MAX)] }
    }

    async fn clear(&self) -> Result<(), Error> {
        let dead = doc! { "$lt": ["$expires", { "$subtract": ["$$NOW", FORGOTTEN_AFTER_MS] }] };
        let replicas = doc! { "$regex": format!("^{REPLICA}") };
        self.table.delete_many(doc! { "_id": replicas, "$expr": dead }).await.map(drop)
    }
}

#[derive(Deserialize)]
struct Taken {
    term: i64,
}

/// What was noted with a lease.
#[derive(Deserialize)]
pub struct Noted {
    pub session: Option<Document>,
}

impl Lease {
    /// Waits until the lease has expired without being renewed.
    pub async fn expired(&self) {
        let mut valid_until = self.valid_until.clone();
        loop {
            let until = *valid_until.borrow_and_update();
            tokio::select! {
                () = tokio::time::sleep_until(until) => return,
                // Nobody is left to renew it.
                changed = valid_until.changed() => if changed.is_err() { return },
            }
        }
    }
}

impl Seen {
    /// Whether the replica holds the lease under this term.
    pub fn is_held(&self, replica: &str, view: &str, term: i64) -> bool {
        self.0.iter().any(|entry| {
            entry.id == view && entry.live && entry.holder.as_deref() == Some(replica) && entry.term == term
        })
    }

    /// Whether no other replica holds the lease.
    pub fn is_free(&self, replica: &str, view: &str) -> bool {
        !self.0.iter().any(|entry| entry.id == view && entry.live && entry.holder.as_deref() != Some(replica))
    }

    /// Whether there is another replica of the same name.
    pub fn has_namesake(&self, replica: &str) -> bool {
        let name = |holder: &str| holder.rsplit_once(SEPARATOR).map(|(name, _)| name.to_owned());
        self.0
            .iter()
            .filter(|entry| entry.live && entry.id.starts_with(REPLICA))
            .any(|entry| entry.holder.as_deref().is_some_and(|other| other != replica && name(other) == name(replica)))
    }

    /// How many leases each of the other replicas that live holds.
    pub fn loads_besides(&self, replica: &str) -> Vec<usize> {
        let live = || self.0.iter().filter(|entry| entry.live);
        live()
            .filter(|entry| entry.id.starts_with(REPLICA) && entry.holder.as_deref() != Some(replica))
            .map(|other| live().filter(|entry| entry.holder == other.holder).count() - 1)
            .collect()
    }
}
