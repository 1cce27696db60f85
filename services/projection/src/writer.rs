//! Writes the batches of the views that this replica leads, one transaction after the other: what is ready when one ends
//! shares the next, since a transaction costs the server much the same for one view as for three. Views that gather have
//! large batches, so that those that do not have a writer of their own, and wait for none of them. The invariant: a batch
//! that cannot be written takes no other with it.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use mongodb::{ClientSession, Database, error::Error};
use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use views::View;

use crate::{
    store::{self, Batch, is_of_server},
    trouble::plain,
};

/// All writers of a replica.
pub struct Writers {
    prompt: Writer,
    gathering: Writer,
}

impl Writers {
    /// # Errors
    /// If MongoDB is away.
    pub async fn start(database: &Database) -> Result<Self, Error> {
        Ok(Self { prompt: Writer::start(database).await?, gathering: Writer::start(database).await? })
    }

    /// Who writes a view.
    pub fn of<V: View>(&self) -> &Writer {
        if V::BATCH_WINDOW.is_zero() { &self.prompt } else { &self.gathering }
    }
}

/// Where views get their turns to write.
pub struct Writer {
    session: Arc<Mutex<ClientSession>>,
    waiting: mpsc::UnboundedSender<oneshot::Sender<Turn>>,
    _task: AbortOnDropHandle<()>,
}

/// Leave to hand over a batch. The transaction begins when all that were given leave together have done so, or have
/// dropped it.
pub struct Turn(mpsc::UnboundedSender<Given>);

/// A batch that was handed over.
struct Given {
    batch: Batch,
    written: oneshot::Sender<anyhow::Result<()>>,
}

impl Writer {
    async fn start(database: &Database) -> Result<Self, Error> {
        let session = Arc::new(Mutex::new(database.client().start_session().await?));
        let (waiting, requests) = mpsc::unbounded_channel();
        let task = AbortOnDropHandle::new(tokio::spawn(run(Arc::clone(&session), requests)));
        Ok(Self { session, waiting, _task: task })
    }

    /// The session of all transactions, each of which ends the one before it, should that be open still. While it is
    /// held, nothing is written.
    pub async fn session(&self) -> MutexGuard<'_, ClientSession> {
        self.session.lock().await
    }

    /// Waits for the next transaction. Who does not want it any more, drops this, or what comes of it.
    pub fn turn(&self) -> impl Future<Output = anyhow::Result<Turn>> + Send + use<> {
        let (give, given) = oneshot::channel();
        let asked = self.waiting.send(give);
        async move {
            asked.context("the writer has ended")?;
            given.await.context("the writer has ended")
        }
    }
}

impl Turn {
    /// Hands a batch over, and waits until it is written.
    ///
    /// # Errors
    /// If it was not written, or that is not known.
    pub fn write(self, batch: Batch) -> impl Future<Output = anyhow::Result<()>> + Send + use<> {
        let (written, answer) = oneshot::channel();
        let given = self.0.send(Given { batch, written });
        async move {
            given.ok().context("the writer has ended")?;
            answer.await.context("the writer has ended")?
        }
    }
}

async fn run(session: Arc<Mutex<ClientSession>>, mut requests: mpsc::UnboundedReceiver<oneshot::Sender<Turn>>) {
    let mut waiting = Vec::new();
    while requests.recv_many(&mut waiting, usize::MAX).await > 0 {
        let mut all = Vec::new();
        while !waiting.is_empty() {
            all.extend(collect(waiting.drain(..)).await);
            // Those whose batches were in the last transaction have just heard of it: they may have the next one ready.
            tokio::task::yield_now().await;
            while let Ok(wanted) = requests.try_recv() {
                waiting.push(wanted);
            }
        }
        let mut session = session.lock().await;
        // Whose view begins anew meanwhile goes on from what is stored.
        all.retain(|given| !given.written.is_closed());
        let (batches, written): (Vec<_>, Vec<_>) =
            all.into_iter().map(|Given { batch, written }| (batch, written)).unzip();
        let results = write(&mut session, &batches).await;
        drop(session);
        for (answer, result) in written.into_iter().zip(results) {
            let _ = answer.send(result);
        }
    }
}

/// Lets all who wait hand over their batches.
async fn collect(waiting: impl Iterator<Item = oneshot::Sender<Turn>>) -> Vec<Given> {
    let (give, mut given) = mpsc::unbounded_channel();
    for wanted in waiting {
        let _ = wanted.send(Turn(give.clone()));
    }
    drop(give);
    let mut all = Vec::new();
    while let Some(batch) = given.recv().await {
        all.push(batch);
    }
    all
}

/// Writes all in one transaction; each by itself if one of them may be to blame that it failed.
async fn write(session: &mut ClientSession, batches: &[Batch]) -> Vec<anyhow::Result<()>> {
    let failed = match store::commit(session, batches).await {
        Ok(()) => return batches.iter().map(|_| Ok(())).collect(),
        Err(error) => error,
    };
    if batches.len() == 1 {
        return vec![Err(failed)];
    }
    if is_of_server(&failed) {
        let reason = plain(&failed);
        return batches.iter().map(|_| Err(anyhow!(reason.clone()))).collect();
    }
    let mut results = Vec::new();
    for batch in batches {
        results.push(store::commit(session, std::slice::from_ref(batch)).await);
    }
    results
}
