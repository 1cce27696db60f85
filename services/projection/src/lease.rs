//! Leases in MongoDB, by its clock, say which replica leads each generation of a view. The invariant: whoever acquires
//! the lease of a generation gets a higher term than every holder before. A lease only says who should try to write; that nobody else can
//! follows from the term in the checkpoint.
//!
//! A lease is `{_id: "orders@3", holder, term, expires, session}`. Each replica also has an entry of its own, `{_id:
//! "replica/…", holder, expires, versions}`, so that all replicas know how many of them are live, and which versions of
//! the views each can lead. A holder is the name of a replica and an identifier of its process, since somebody may give
//! two replicas the same name.

use std::{collections::BTreeMap, time::Duration};

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::{Collection, Database, error::Error, options::ReturnDocument};
use serde::Deserialize;
use tokio::{sync::watch, time::Instant};
use uuid::Uuid;
use views::layout::LEASES;

const REPLICA: &str = "replica/";
/// Separates a replica's name from the identifier of its process. Names cannot contain it.
const SEPARATOR: char = '/';
/// The entry of a replica is deleted when it expired this long ago.
const DEAD_REPLICA_RETENTION_MS: i64 = 3_600_000;

/// Access to the leases on behalf of this replica.
#[derive(Clone)]
pub struct Leases {
    entries: Collection<Document>,
    replica: String,
    duration: Duration,
}

/// The lease of a generation that this replica has acquired.
pub struct Lease {
    /// The generation's collection.
    pub collection: String,
    pub term: i64,
    /// When the lease expires by the clock of this process, which is sooner than it does by that of the server.
    pub valid_until: watch::Receiver<Instant>,
}

/// All entries as they were a moment ago.
pub struct Snapshot(Vec<Entry>);

#[derive(Debug, Deserialize)]
pub struct Entry {
    #[serde(rename = "_id")]
    id: String,
    holder: Option<String>,
    #[serde(default)]
    term: i64,
    /// Why it was taken from the holder before; `None` if it was free.
    reason: Option<String>,
    /// Of a replica: its version of each view.
    #[serde(default)]
    versions: BTreeMap<String, i32>,
    /// Whether the entry had not expired.
    live: bool,
}

/// Another replica.
pub struct Other<'a> {
    /// How many leases it holds.
    pub load: usize,
    /// Its version of each view.
    pub versions: &'a BTreeMap<String, i32>,
}

impl Leases {
    /// `name` is the name of the replica.
    pub fn new(database: &Database, name: &str, duration: Duration) -> Self {
        let replica = format!("{name}{SEPARATOR}{}", Uuid::now_v7());
        Self { entries: database.collection(LEASES), replica, duration }
    }

    pub fn duration(&self) -> Duration {
        self.duration
    }

    pub fn replica(&self) -> &str {
        &self.replica
    }

    /// Renews this replica's entry, and all leases that it holds.
    pub async fn renew(&self) -> Result<(), Error> {
        let renewal = doc! { "$set": { "holder": &self.replica, "expires": self.expiry() } };
        let entry = doc! { "_id": format!("{REPLICA}{}", self.replica) };
        let versions: Document =
            views::versions().into_iter().map(|(view, version)| (view.to_owned(), version.into())).collect();
        let with_versions = vec![renewal.clone(), doc! { "$set": { "versions": versions } }];
        let renewed = self.entries.update_one(entry, with_versions).upsert(true).await?;
        if renewed.upserted_id.is_some() {
            self.delete_dead_replicas().await?;
        }
        self.entries.update_many(doc! { "holder": &self.replica }, vec![renewal]).await?;
        Ok(())
    }

    /// Reads all entries.
    pub async fn snapshot(&self) -> Result<Snapshot, Error> {
        let live = doc! { "$gt": ["$expires", "$$NOW"] };
        let fields = doc! { "holder": 1, "term": 1, "reason": 1, "versions": 1, "live": live };
        let entries = self.entries.clone_with_type().find(doc! {}).projection(fields).await?;
        Ok(Snapshot(entries.try_collect().await?))
    }

    /// Acquires the lease of a generation, if it is free, and returns its new term.
    pub async fn acquire(&self, collection: &str) -> Result<Option<i64>, Error> {
        let new = doc! { "$setOnInsert": { "term": 0_i64 } };
        self.entries.update_one(doc! { "_id": collection }, new).upsert(true).await?;
        // If the reply was lost, this replica holds the lease without knowing it, and may acquire it again.
        let mine = doc! { "$eq": ["$holder", &self.replica] };
        let free = doc! { "$or": [mine, { "$lte": ["$expires", "$$NOW"] }] };
        let term = doc! { "$add": ["$term", 1] };
        let acquired = doc! { "holder": &self.replica, "term": term, "expires": self.expiry(), "reason": "$$REMOVE" };
        let lease = self
            .entries
            .clone_with_type::<Acquired>()
            .find_one_and_update(doc! { "_id": collection, "$expr": free }, vec![doc! { "$set": acquired }])
            .projection(doc! { "term": 1 })
            .return_document(ReturnDocument::After)
            .await?;
        Ok(lease.map(|lease| lease.term))
    }

    /// Takes the lease of a generation from whoever holds it, and returns its new term. The reason is shown to the
    /// holder.
    pub async fn seize(&self, collection: &str, reason: &str) -> Result<i64, Error> {
        let term = doc! { "$add": [{ "$ifNull": ["$term", 0_i64] }, 1] };
        let seized = doc! { "holder": &self.replica, "term": term, "expires": self.expiry(), "reason": reason };
        let lease = self
            .entries
            .clone_with_type::<Acquired>()
            .find_one_and_update(doc! { "_id": collection }, vec![doc! { "$set": seized }])
            .upsert(true)
            .projection(doc! { "term": 1 })
            .return_document(ReturnDocument::After)
            .await?;
        Ok(lease.ok_or_else(|| Error::custom("MongoDB returned no document for an upsert"))?.term)
    }

    /// Releases a lease that was seized under this term. The reason stays, for the holder before, until somebody
    /// acquires the lease.
    pub async fn release_seized(&self, collection: &str, term: i64) -> Result<(), Error> {
        let held = doc! { "_id": collection, "holder": &self.replica, "term": term };
        let free = doc! { "$unset": { "holder": "", "expires": "", "session": "" } };
        self.entries.update_one(held, free).await.map(drop)
    }

    /// Releases a lease, so that others can acquire it at once. The next term will be higher than this lease's and
    /// `above`.
    pub async fn release(&self, lease: &Lease, above: i64) -> Result<(), Error> {
        let free = doc! { "$set": { "term": lease.term.max(above) }, "$unset": { "holder": "", "expires": "", "session": "" } };
        self.entries.update_one(self.held(lease), free).await.map(drop)
    }

    /// Deletes this replica's entry, and releases the leases that it may still hold.
    pub async fn leave(&self) -> Result<(), Error> {
        self.entries.delete_one(doc! { "_id": format!("{REPLICA}{}", self.replica) }).await?;
        let free = doc! { "$unset": { "holder": "", "expires": "" } };
        self.entries.update_many(doc! { "holder": &self.replica }, free).await.map(drop)
    }

    /// The session that was recorded with a lease; `None` if this replica does not hold the lease any more.
    pub async fn recorded_session(&self, lease: &Lease) -> Result<Option<RecordedSession>, Error> {
        self.entries.clone_with_type().find_one(self.held(lease)).projection(doc! { "_id": 0, "session": 1 }).await
    }

    /// Records the session in which the holder of a lease writes, so that the next holder can end it. Returns whether
    /// this replica still holds the lease.
    pub async fn record_session(&self, lease: &Lease, session: &Document) -> Result<bool, Error> {
        let updated = self.entries.update_one(self.held(lease), doc! { "$set": { "session": session } }).await?;
        Ok(updated.matched_count == 1)
    }

    /// The session in which the last holder of a generation's lease wrote, whoever holds it now.
    pub async fn last_session(&self, collection: &str) -> Result<Option<Document>, Error> {
        let recorded: Option<RecordedSession> = self
            .entries
            .clone_with_type()
            .find_one(doc! { "_id": collection })
            .projection(doc! { "_id": 0, "session": 1 })
            .await?;
        Ok(recorded.and_then(|recorded| recorded.session))
    }

    /// The same as [`Self::record_session`] for a lease that was seized under this term.
    pub async fn record_session_of_seized(
        &self,
        collection: &str,
        term: i64,
        session: &Document,
    ) -> Result<bool, Error> {
        let held = doc! { "_id": collection, "holder": &self.replica, "term": term };
        let updated = self.entries.update_one(held, doc! { "$set": { "session": session } }).await?;
        Ok(updated.matched_count == 1)
    }

    fn held(&self, lease: &Lease) -> Document {
        doc! { "_id": &lease.collection, "holder": &self.replica, "term": lease.term }
    }

    fn expiry(&self) -> Document {
        doc! { "$add": ["$$NOW", i64::try_from(self.duration.as_millis()).unwrap_or(i64::MAX)] }
    }

    async fn delete_dead_replicas(&self) -> Result<(), Error> {
        let dead = doc! { "$lt": ["$expires", { "$subtract": ["$$NOW", DEAD_REPLICA_RETENTION_MS] }] };
        let replicas = doc! { "$regex": format!("^{REPLICA}") };
        self.entries.delete_many(doc! { "_id": replicas, "$expr": dead }).await.map(drop)
    }
}

#[derive(Deserialize)]
struct Acquired {
    term: i64,
}

/// The session in which the last holder of a lease wrote, if it has recorded one.
#[derive(Deserialize)]
pub struct RecordedSession {
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
                // Nobody is left to renew the lease.
                changed = valid_until.changed() => if changed.is_err() { return },
            }
        }
    }
}

impl Snapshot {
    /// Whether the replica holds the generation's lease under this term.
    pub fn is_held(&self, replica: &str, collection: &str, term: i64) -> bool {
        self.0.iter().any(|entry| {
            entry.id == collection && entry.live && entry.holder.as_deref() == Some(replica) && entry.term == term
        })
    }

    /// Why the generation's lease was taken from its holder; `None` if it was not.
    pub fn reason(&self, collection: &str) -> Option<&str> {
        self.0.iter().find(|entry| entry.id == collection)?.reason.as_deref()
    }

    /// The name of the live replica that holds the generation's lease, and the term.
    pub fn holder(&self, collection: &str) -> Option<(&str, i64)> {
        let lease = self.0.iter().find(|entry| entry.id == collection && entry.live)?;
        let (name, _) = lease.holder.as_deref()?.rsplit_once(SEPARATOR)?;
        Some((name, lease.term))
    }

    /// Whether no other replica holds the generation's lease.
    pub fn is_free(&self, replica: &str, collection: &str) -> bool {
        !self.0.iter().any(|entry| entry.id == collection && entry.live && entry.holder.as_deref() != Some(replica))
    }

    /// Whether there is another live replica of the same name.
    pub fn has_namesake(&self, replica: &str) -> bool {
        let name = |holder: &str| holder.rsplit_once(SEPARATOR).map(|(name, _)| name.to_owned());
        self.0
            .iter()
            .filter(|entry| entry.live && entry.id.starts_with(REPLICA))
            .any(|entry| entry.holder.as_deref().is_some_and(|other| other != replica && name(other) == name(replica)))
    }

    /// The other live replicas.
    pub fn others(&self, replica: &str) -> Vec<Other<'_>> {
        let live = || self.0.iter().filter(|entry| entry.live);
        live()
            .filter(|entry| entry.id.starts_with(REPLICA) && entry.holder.as_deref() != Some(replica))
            .map(|other| {
                let load = live().filter(|entry| entry.holder == other.holder).count() - 1;
                Other { load, versions: &other.versions }
            })
            .collect()
    }
}
