//! A view in MongoDB: its documents and its checkpoint. The invariant: both are written in one transaction, which
//! demands that the stored checkpoint is the one that the batch began at, and that the stored term is that of the
//! writer's lease. So the effect of each event is stored exactly once, and a writer whose term has passed cannot write
//! at all.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::{Context, anyhow, bail, ensure};
use bson::{Document, RawArrayBuf, RawDocumentBuf, doc, raw::cstr, rawdoc};
use futures_util::{StreamExt, TryStreamExt};
use mongodb::{
    Client, ClientSession, Collection, Database, IndexModel,
    error::{Error, ErrorKind, TRANSIENT_TRANSACTION_ERROR},
    options::{ClientOptions, ReadConcern, ReadPreference, ReturnDocument, WriteConcern},
};
use runtime::{Monitor, mongodb_driver};
use tokio::time::sleep;
use views::{
    Digest, View,
    layout::{self, Checkpoint},
};
use wire::EventMark;

use crate::{
    document_write::{self, DocumentWrite},
    history::Standing,
};

const POOL_SIZE: u32 = 64;
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How often a generation is looked at, in case that somebody has dropped it or a part of it.
const LOOK_AFTER: Duration = Duration::from_secs(2);
/// The code of the server's error `NamespaceExists`.
const COLLECTION_EXISTS: i32 = 48;

/// How often a transaction is tried if the server aborts it. The server does so even where nobody else writes, when its
/// cache is full.
const MAX_ATTEMPTS: usize = 3;

/// A stored generation of a view.
pub struct Store {
    database: Database,
    documents: Collection<RawDocumentBuf>,
    checkpoints: Collection<Checkpoint>,
    pub generation: i32,
    version: i32,
    /// The identifier that the server has given to the collection. One that was dropped and made again has another.
    uuid: bson::Uuid,
    /// The names of the indexes that the queries need.
    indexes: Vec<String>,
}

/// Something that belongs to a generation is not there any more: nobody can tell what its documents are worth.
#[derive(Debug, thiserror::Error)]
#[error("{0}. The view must be rebuilt: watershed rebuild {1}")]
pub struct Damaged(String, &'static str);

/// The part of a transaction that concerns one view.
pub struct Batch {
    pub store: Arc<Store>,
    /// The checkpoint before the batch.
    pub from: u64,
    /// The checkpoint after the batch.
    pub to: u64,
    /// The term of the writer's lease.
    pub term: i64,
    /// The last event of the batch.
    pub standing: Standing,
    /// Events per second, of a generation that is being built.
    pub rate: Option<f64>,
    /// The digest after the batch; `None` if it is unknown.
    pub digest: Option<Digest>,
    pub writes: Vec<DocumentWrite>,
}

/// Where a writer goes on.
pub struct TakenOver {
    /// The last event in the stored documents.
    pub standing: Standing,
    /// The digest of the stored documents; `None` if it is unknown.
    pub digest: Option<Digest>,
}

/// Another replica has taken the view over under a later term.
#[derive(Debug, thiserror::Error)]
#[error("another replica has taken the view over under the later term {term}")]
pub struct Superseded {
    pub term: i64,
}

/// The database of the views, and the addresses of its servers, for the log. Does not connect yet.
///
/// # Errors
/// If the URL is not a connection string.
pub async fn connect(url: &str, database: &str, monitor: &Monitor) -> anyhow::Result<(Database, String)> {
    let mut options = ClientOptions::parse(url)
        .await
        // The driver's error may quote the URL, and with it the password.
        .map_err(|_| anyhow::anyhow!("MONGODB_URL is not a valid connection string: see MongoDB's manual"))?;
    let address = options.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    options.app_name = Some("watershed projection".to_owned());
    options.max_pool_size = Some(POOL_SIZE);
    options.cmap_event_handler = Some(mongodb_driver::observe_pool(monitor, POOL_SIZE));
    options.server_selection_timeout = Some(SERVER_TIMEOUT);
    options.connect_timeout = Some(SERVER_TIMEOUT);
    options.heartbeat_freq = Some(HEARTBEAT);
    // A document must not be older than the checkpoint. With read concern `majority` it may be, on a primary that has
    // just been elected. A document that is read and then rolled back in a failover does no harm, since the checkpoint
    // is rolled back with it.
    options.selection_criteria = Some(ReadPreference::Primary.into());
    options.read_concern = Some(ReadConcern::local());
    options.write_concern = Some(WriteConcern::majority());
    Ok((Client::with_options(options).context("cannot use MONGODB_URL")?.database(database), address))
}

impl Store {
    /// Opens a generation of the view. Creates its collection, indexes and checkpoint, unless it `serves` or has been begun.
    ///
    /// # Errors
    /// [`Damaged`] if it has been begun, and its collection or checkpoint is missing or another one; others if MongoDB is
    /// unavailable or refuses.
    pub async fn open<V: View>(database: &Database, generation: i32, serves: bool) -> anyhow::Result<Self> {
        let name = layout::collection(V::NAME, generation);
        let documents: Collection<RawDocumentBuf> = database.collection(&name);
        let checkpoints = database.collection::<Checkpoint>(layout::CHECKPOINTS);
        let damaged = |what: String| Damaged(what, V::NAME);
        let begun = checkpoints.find_one(doc! { "_id": &name }).await?;
        let uuid = match (uuid(database, &name).await?, &begun) {
            (None, _) if serves || begun.is_some() => {
                return Err(damaged(format!("the collection {name} was dropped")).into());
            }
            (Some(_), None) if serves || documents.find_one(doc! {}).await?.is_some() => {
                return Err(damaged(format!("the checkpoint of {name} was deleted")).into());
            }
            (Some(found), _) => found,
            (None, _) => {
                match database.create_collection(&name).await {
                    Err(error) if matches!(&*error.kind, ErrorKind::Command(reason) if reason.code == COLLECTION_EXISTS) =>
                        {}
                    created => created?,
                }
                uuid(database, &name).await?.with_context(|| format!("the collection {name} cannot be created"))?
            }
        };
        let mut store = Self {
            database: database.clone(),
            documents,
            checkpoints,
            generation,
            version: V::VERSION,
            uuid,
            indexes: Vec::new(),
        };
        let indexes: Vec<_> = V::indexes().into_iter().map(|keys| IndexModel::builder().keys(keys).build()).collect();
        if !indexes.is_empty() {
            let before = store.documents.list_index_names().await?;
            store.indexes = store.documents.create_indexes(indexes).await?.index_names;
            if begun.as_ref().is_some_and(|begun| begun.position > 0) {
                for index in store.indexes.iter().filter(|index| !before.contains(index)) {
                    tracing::warn!(view = V::NAME, generation, index, "an index was missing, and was created again");
                }
            }
        }
        let digest = Digest::default().to_string();
        let new = doc! { "position": 0_i64, "version": V::VERSION, "term": 0_i64, "digest": digest };
        store.checkpoints.update_one(doc! { "_id": &name }, doc! { "$setOnInsert": new }).upsert(true).await?;
        Ok(store)
    }

    /// Looks every few seconds whether all that belongs to the generation is still there; returns what is not.
    pub async fn damage<V: View>(&self) -> anyhow::Error {
        let name = self.documents.name();
        loop {
            sleep(LOOK_AFTER).await;
            // What cannot be looked at is left to those who need it.
            let Ok(found) = uuid(&self.database, name).await else { continue };
            if found != Some(self.uuid) {
                return Damaged(format!("the collection {name} was dropped"), V::NAME).into();
            }
            let Ok(checkpoint) = self.checkpoints.find_one(doc! { "_id": name }).await else { continue };
            if checkpoint.is_none() {
                return Damaged(format!("the checkpoint of {name} was deleted"), V::NAME).into();
            }
            let Ok(indexes) = self.documents.list_index_names().await else { continue };
            if let Some(missing) = self.indexes.iter().find(|index| !indexes.contains(index)) {
                return anyhow!("the index {missing} of {name} was dropped");
            }
        }
    }

    /// Takes the generation over for a writer of this term. Returns where it goes on. Writers of earlier terms cannot
    /// write from then on.
    ///
    /// # Errors
    /// [`Superseded`] if a writer of a later term has taken the view over; others if the documents were built by
    /// another version of the view, or if MongoDB is unavailable.
    pub async fn take_over(&self, session: &mut ClientSession, term: i64) -> anyhow::Result<TakenOver> {
        // An earlier attempt may have left a transaction open. If the server does not receive this, the transaction
        // ends with the next use of the session.
        let _ = session.abort_transaction().await;
        let name = self.documents.name();
        let taken_over = self
            .checkpoints
            .find_one_and_update(
                doc! { "_id": name, "term": { "$lte": term }, "version": self.version },
                doc! { "$set": { "term": term } },
            )
            .return_document(ReturnDocument::After)
            .session(session)
            .await?;
        if let Some(checkpoint) = taken_over {
            // A program that computed no digests may have begun the generation, but without an event there is no
            // document.
            let digest = checkpoint.digest.or_else(|| (checkpoint.position == 0).then(Digest::default));
            return Ok(TakenOver { standing: standing(&checkpoint)?, digest });
        }
        let found =
            self.checkpoints.find_one(doc! { "_id": name }).await?.context("the checkpoint has been deleted")?;
        ensure!(
            found.version == self.version,
            "{name} was built by version {} of the view, but this program has version {}",
            found.version,
            self.version
        );
        bail!(Superseded { term: found.term })
    }

    /// Reads documents by their identifiers. Those that do not exist are left out.
    ///
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn load(&self, ids: HashSet<&str>) -> Result<Vec<RawDocumentBuf>, Error> {
        // By default the first reply holds 101 documents at most.
        let all = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        let ids: Vec<_> = ids.into_iter().collect();
        let mut replies = self.documents.find(doc! { "_id": { "$in": ids } }).batch_size(all).batch().await?;
        let mut documents = Vec::new();
        while let Some(reply) = replies.next().await {
            for document in reply?.doc_slices()? {
                let document = document?
                    .as_document()
                    .ok_or_else(|| Error::custom("MongoDB sent something other than a document"))?;
                documents.push(document.to_owned());
            }
        }
        Ok(documents)
    }
}

/// Writes batches of different views in one transaction.
///
/// # Errors
/// If MongoDB is unavailable, or another writer has moved one of the checkpoints. It is then unknown whether the
/// batches were written. The caller need not know: it goes on from the position that [`Store::take_over`] returns.
pub async fn commit(session: &mut ClientSession, batches: &[Batch]) -> anyhow::Result<()> {
    if batches.is_empty() {
        return Ok(());
    }
    let mut attempts = 0;
    loop {
        attempts += 1;
        session.start_transaction().write_concern(WriteConcern::majority()).await?;
        let Err(error) = write(session, batches).await else { return Ok(session.commit_transaction().await?) };
        // If the server does not receive this either, the transaction ends with the next use of the session.
        let _ = session.abort_transaction().await;
        if attempts == MAX_ATTEMPTS || !is_transient(&error) {
            return Err(error);
        }
    }
}

async fn write(session: &mut ClientSession, batches: &[Batch]) -> anyhow::Result<()> {
    let mut checkpoint_updates = RawArrayBuf::new();
    for Batch { store, from, to, term, standing, rate, digest, .. } in batches {
        let (from, to) = (i64::try_from(*from)?, i64::try_from(*to)?);
        let mut checkpoint = rawdoc! { "position": to };
        if let Some(journal) = standing.journal {
            checkpoint.append(cstr!("journal"), journal.to_string());
        }
        if let Some(rate) = rate {
            checkpoint.append(cstr!("rate"), *rate);
        }
        if let Some(digest) = digest {
            checkpoint.append(cstr!("digest"), digest.to_string());
        }
        let mut update = RawDocumentBuf::new();
        if let Some(EventMark { aggregate, version, at, branch }) = standing.mark {
            checkpoint.append(cstr!("branch"), branch.to_string());
            let (aggregate, at) = (aggregate.to_string(), at.to_string());
            let event = rawdoc! { "aggregate": aggregate, "version": i64::try_from(version)?, "recorded_at": at };
            checkpoint.append(cstr!("event"), event);
        } else {
            update.append(cstr!("$unset"), rawdoc! { "branch": "", "event": "" });
        }
        update.append(cstr!("$set"), checkpoint);
        checkpoint_updates.push(rawdoc! {
            "q": { "_id": store.documents.name(), "position": from, "term": *term },
            "u": update,
        });
    }
    let command = rawdoc! { "update": layout::CHECKPOINTS, "updates": checkpoint_updates };
    let reply = batches[0].store.database.run_raw_command(command).session(&mut *session).await?;
    document_write::check(&reply, batches.len()).context("another writer has moved a checkpoint")?;
    for Batch { store, writes, .. } in batches {
        for command in document_write::commands(store.documents.name(), writes) {
            let reply = store.database.run_raw_command(command.body).session(&mut *session).await?;
            document_write::check(&reply, command.documents)?;
        }
    }
    Ok(())
}

/// The last event in a view.
fn standing(checkpoint: &Checkpoint) -> anyhow::Result<Standing> {
    let Checkpoint { position, journal, branch, event, .. } = checkpoint;
    let mark = match event.as_ref().zip(branch.as_ref()) {
        Some((layout::EventMark { aggregate, version, recorded_at }, branch)) => Some(EventMark {
            aggregate: aggregate.parse()?,
            version: u64::try_from(*version)?,
            at: recorded_at.parse()?,
            branch: branch.parse()?,
        }),
        None => None,
    };
    let journal = journal.as_ref().map(|journal| journal.parse()).transpose()?;
    Ok(Standing { position: u64::try_from(*position)?, journal, mark })
}

/// Whether the error means that MongoDB is unavailable, so that no batch is to blame.
pub fn is_server_unavailable(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<Error>().map(|error| &*error.kind);
    error.is_some_and(|kind| {
        matches!(kind, ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. } | ErrorKind::ServerSelection { .. })
    })
}

/// Whether the server has aborted the transaction without any effect, and asks for it to be tried again.
fn is_transient(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.contains_label(TRANSIENT_TRANSACTION_ERROR))
}

/// The identifier of a collection; `None` if there is no such collection.
async fn uuid(database: &Database, name: &str) -> anyhow::Result<Option<bson::Uuid>> {
    let found = database.list_collections().filter(doc! { "name": name }).await?.try_next().await?;
    let Some(uuid) = found.map(|found| found.info.uuid) else { return Ok(None) };
    let uuid = uuid.context("MongoDB does not tell the identifier of a collection")?;
    Ok(Some(uuid.to_uuid()?))
}

/// Ends a session of any process, and aborts the transaction that may be open in it.
///
/// # Errors
/// If MongoDB is unavailable or does not allow it.
pub async fn kill_session(database: &Database, session: Document) -> Result<(), Error> {
    database.run_command(doc! { "killSessions": [session] }).await.map(drop)
}
