//! A view in MongoDB: its documents and its checkpoint. The invariant: both are written in one transaction, which
//! demands the checkpoint that the batch began at and the term of the writer's lease. So each event's effect is there
//! exactly once, and a writer whose term has passed cannot write at all.

use std::{collections::HashSet, sync::Arc, time::Duration};

use anyhow::{Context, bail, ensure};
use bson::{Document, RawArrayBuf, RawDocumentBuf, doc, raw::cstr, rawdoc};
use futures_util::StreamExt;
use mongodb::{
    Client, ClientSession, Collection, Database, IndexModel,
    error::{Error, ErrorKind, TRANSIENT_TRANSACTION_ERROR},
    options::{ClientOptions, ReadConcern, ReadPreference, ReturnDocument, WriteConcern},
};
use uuid::Uuid;
use views::{
    View,
    layout::{self, Checkpoint, Serving},
};

use crate::write::{self, Write};

const POOL: u32 = 64;
const SERVER_SELECTION: Duration = Duration::from_secs(3);
const HEARTBEAT: Duration = Duration::from_secs(5);
/// The server's `NamespaceExists`.
const COLLECTION_EXISTS: i32 = 48;

/// How often a transaction is tried that the server breaks off. It does so also where nobody else writes, when it lacks
/// room in its cache.
const TRIES: usize = 3;

/// The stored generation of one view.
pub struct Store {
    database: Database,
    documents: Collection<RawDocumentBuf>,
    checkpoints: Collection<Checkpoint>,
    version: i32,
}

/// What is done to one view in a transaction.
pub struct Batch {
    pub store: Arc<Store>,
    /// The checkpoint before it.
    pub from: u64,
    /// The checkpoint after it.
    pub to: u64,
    /// The writer's.
    pub term: i64,
    /// The journal whose events these are.
    pub journal: Option<Uuid>,
    pub writes: Vec<Write>,
}

/// The view has been written under a later term.
#[derive(Debug, thiserror::Error)]
#[error("the view has been written under the later term {term}")]
pub struct Superseded {
    pub term: i64,
}

/// The database of the views, and where its servers are, for the log. Nothing is sent yet.
///
/// # Errors
/// If the URL cannot be read.
pub async fn connect(url: &str, database: &str) -> anyhow::Result<(Database, String)> {
    let mut options = ClientOptions::parse(url)
        .await
        // The library's error may quote the URL, and with it the password.
        .map_err(|_| anyhow::anyhow!("cannot read MONGODB_URL: see the manual on connection strings"))?;
    let address = options.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    options.app_name = Some("watershed projection".to_owned());
    options.max_pool_size = Some(POOL);
    options.server_selection_timeout = Some(SERVER_SELECTION);
    options.connect_timeout = Some(SERVER_SELECTION);
    options.heartbeat_freq = Some(HEARTBEAT);
    // A document must not be older than the checkpoint: the majority's view may be, on a primary just elected. What is
    // read and then undone by a failover does no harm, since its checkpoint is undone with it.
    options.selection_criteria = Some(ReadPreference::Primary.into());
    options.read_concern = Some(ReadConcern::local());
    options.write_concern = Some(WriteConcern::majority());
    Ok((Client::with_options(options).context("cannot use MONGODB_URL")?.database(database), address))
}

impl Store {
    /// The generation of the view that serves queries. What is missing of it is made: collection, indexes, checkpoint.
    /// Several may do so at once.
    ///
    /// # Errors
    /// If MongoDB is away or refuses.
    pub async fn open<V: View>(database: &Database) -> Result<Self, Error> {
        let Serving { generation, .. } = database
            .collection::<Serving>(layout::VIEWS)
            .find_one_and_update(doc! { "_id": V::NAME }, doc! { "$setOnInsert": { "generation": 1 } })
            .upsert(true)
            .return_document(ReturnDocument::After)
            .await?
            .ok_or_else(|| Error::custom("the server made no document"))?;
        let name = layout::collection(V::NAME, generation);
        let store = Self {
            database: database.clone(),
            documents: database.collection(&name),
            checkpoints: database.collection(layout::CHECKPOINTS),
            version: V::VERSION,
        };
        match database.create_collection(&name).await {
            Err(error) if matches!(&*error.kind, ErrorKind::Command(reason) if reason.code == COLLECTION_EXISTS) => {}
            made => made?,
        }
        let indexes: Vec<_> = V::indexes().into_iter().map(|keys| IndexModel::builder().keys(keys).build()).collect();
        if !indexes.is_empty() {
            store.documents.create_indexes(indexes).await?;
        }
        store
            .checkpoints
            .update_one(
                doc! { "_id": &name },
                doc! { "$setOnInsert": { "position": 0_i64, "version": V::VERSION, "term": 0_i64 } },
            )
            .upsert(true)
            .await?;
        Ok(store)
    }

    /// Takes the view over for a writer of this term, and says from which position it goes on, and of which journal it is, if
    /// that is known. Writers of earlier terms cannot write from then on.
    ///
    /// # Errors
    /// [`Superseded`] if a later writer has done so; others if the documents were made by another version of the view, or
    /// MongoDB is away.
    pub async fn take_over(&self, session: &mut ClientSession, term: i64) -> anyhow::Result<(u64, Option<Uuid>)> {
        // Of an attempt that was broken off. If the server does not hear of it, it ends with the next use of the session.
        let _ = session.abort_transaction().await;
        let name = self.documents.name();
        let taken = self
            .checkpoints
            .find_one_and_update(
                doc! { "_id": name, "term": { "$lte": term }, "version": self.version },
                doc! { "$set": { "term": term } },
            )
            .return_document(ReturnDocument::After)
            .session(session)
            .await?;
        if let Some(checkpoint) = taken {
            let journal = checkpoint.journal.map(|journal| journal.parse()).transpose()?;
            return Ok((u64::try_from(checkpoint.position)?, journal));
        }
        let found = self.checkpoints.find_one(doc! { "_id": name }).await?.context("the checkpoint is gone")?;
        ensure!(
            found.version == self.version,
            "{name} was built by version {} of the view, this program has {}: it must be rebuilt",
            found.version,
            self.version
        );
        bail!(Superseded { term: found.term })
    }

    /// Reads documents.
    ///
    /// # Errors
    /// If MongoDB is away.
    pub async fn load(&self, ids: HashSet<&str>) -> Result<Vec<RawDocumentBuf>, Error> {
        // Otherwise the first reply holds 101.
        let all = u32::try_from(ids.len()).unwrap_or(u32::MAX);
        let ids: Vec<_> = ids.into_iter().collect();
        let mut replies = self.documents.find(doc! { "_id": { "$in": ids } }).batch_size(all).batch().await?;
        let mut documents = Vec::new();
        while let Some(reply) = replies.next().await {
            for document in reply?.doc_slices()? {
                let document = document?.as_document().ok_or_else(|| Error::custom("the server sent no document"))?;
                documents.push(document.to_owned());
            }
        }
        Ok(documents)
    }
}

/// Writes batches of different views in one transaction, all or nothing.
///
/// # Errors
/// If MongoDB is away, or another writer has moved one of the checkpoints. Whether the batches were written is then not
/// known, and does not matter: go on from what [`Store::take_over`] says.
pub async fn commit(session: &mut ClientSession, batches: &[Batch]) -> anyhow::Result<()> {
    if batches.is_empty() {
        return Ok(());
    }
    let mut tries = 0;
    loop {
        tries += 1;
        session.start_transaction().write_concern(WriteConcern::majority()).await?;
        let Err(error) = write(session, batches).await else { return Ok(session.commit_transaction().await?) };
        // If the server does not hear of this either, the transaction ends with the next use of the session.
        let _ = session.abort_transaction().await;
        if tries == TRIES || !is_transient(&error) {
            return Err(error);
        }
    }
}

async fn write(session: &mut ClientSession, batches: &[Batch]) -> anyhow::Result<()> {
    let mut moves = RawArrayBuf::new();
    for Batch { store, from, to, term, journal, .. } in batches {
        let (from, to) = (i64::try_from(*from)?, i64::try_from(*to)?);
        let mut checkpoint = rawdoc! { "position": to };
        if let Some(journal) = journal {
            checkpoint.append(cstr!("journal"), journal.to_string());
        }
        moves.push(rawdoc! {
            "q": { "_id": store.documents.name(), "position": from, "term": *term },
            "u": { "$set": checkpoint },
        });
    }
    let command = rawdoc! { "update": layout::CHECKPOINTS, "updates": moves };
    let reply = batches[0].store.database.run_raw_command(command).session(&mut *session).await?;
    write::check(&reply, batches.len()).context("another writer has moved a checkpoint")?;
    for Batch { store, writes, .. } in batches {
        for command in write::commands(store.documents.name(), writes) {
            let reply = store.database.run_raw_command(command.body).session(&mut *session).await?;
            write::check(&reply, command.documents)?;
        }
    }
    Ok(())
}

/// Whether the server is away, and no batch to blame.
pub fn is_of_server(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<Error>().map(|error| &*error.kind);
    error.is_some_and(|kind| {
        matches!(kind, ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. } | ErrorKind::ServerSelection { .. })
    })
}

/// Whether the server asks for the transaction to be tried again, and has done nothing of it.
fn is_transient(error: &anyhow::Error) -> bool {
    error.downcast_ref::<Error>().is_some_and(|error| error.contains_label(TRANSIENT_TRANSACTION_ERROR))
}

/// Ends the transaction that is open in a session, of whichever process.
///
/// # Errors
/// If MongoDB is away or does not allow it.
pub async fn end_session(database: &Database, session: Document) -> Result<(), Error> {
    database.run_command(doc! { "killSessions": [session] }).await.map(drop)
}
