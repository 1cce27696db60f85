//! Writes the batches of the views that this replica leads, one transaction after the other, with group commit: the
//! batches that are ready when a transaction ends share the next one, since a transaction costs the server about as
//! much for one view as for three. Views with a batch window have large batches; the other views have a writer of their
//! own, and wait for none of those. The invariant: a batch that cannot be written does not make the others fail.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, anyhow};
use mongodb::{ClientSession, Database, error::Error};
use runtime::Histogram;
use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use views::View;

use crate::{
    retry_state::describe,
    store::{self, Batch, is_server_unavailable},
};

/// All writers of a replica.
pub struct Writers {
    immediate: Writer,
    windowed: Writer,
}

impl Writers {
    /// # Errors
    /// If MongoDB is unavailable.
    pub async fn start(database: &Database, durations: &Histogram) -> Result<Self, Error> {
        Ok(Self {
            immediate: Writer::start(database, durations).await?,
            windowed: Writer::start(database, durations).await?,
        })
    }

    /// The writer of a view.
    pub fn of<V: View>(&self) -> &Writer {
        if V::BATCH_WINDOW.is_zero() { &self.immediate } else { &self.windowed }
    }
}

/// Grants permits to write, and writes the batches that are submitted with them.
pub struct Writer {
    session: Arc<Mutex<ClientSession>>,
    requests: mpsc::UnboundedSender<PermitRequest>,
    _task: AbortOnDropHandle<()>,
}

type PermitRequest = oneshot::Sender<WritePermit>;

/// Permission to submit one batch to the next transaction, which begins when all permits for it have been used or
/// dropped.
pub struct WritePermit(mpsc::UnboundedSender<Submitted>);

/// A batch that waits for its transaction.
struct Submitted {
    batch: Batch,
    written: oneshot::Sender<anyhow::Result<()>>,
}

impl Writer {
    async fn start(database: &Database, durations: &Histogram) -> Result<Self, Error> {
        let session = Arc::new(Mutex::new(database.client().start_session().await?));
        let (requests, received) = mpsc::unbounded_channel();
        let task = AbortOnDropHandle::new(tokio::spawn(run(Arc::clone(&session), received, durations.clone())));
        Ok(Self { session, requests, _task: task })
    }

    /// The session of all transactions. Each transaction ends the one before it, should that still be open. Nothing is
    /// written while the caller holds the session.
    pub async fn session(&self) -> MutexGuard<'_, ClientSession> {
        self.session.lock().await
    }

    /// Requests a permit for the next transaction, and waits for it. Dropping the future or the permit gives it up.
    pub fn permit(&self) -> impl Future<Output = anyhow::Result<WritePermit>> + Send + use<> {
        let (grant, granted) = oneshot::channel();
        let requested = self.requests.send(grant);
        async move {
            requested.context("the writer has ended")?;
            granted.await.context("the writer has ended")
        }
    }
}

impl WritePermit {
    /// Submits a batch, and waits until it is written.
    ///
    /// # Errors
    /// If the batch was not written, or if the outcome is unknown.
    pub fn write(self, batch: Batch) -> impl Future<Output = anyhow::Result<()>> + Send + use<> {
        let (written, result) = oneshot::channel();
        let submitted = self.0.send(Submitted { batch, written });
        async move {
            submitted.ok().context("the writer has ended")?;
            result.await.context("the writer has ended")?
        }
    }
}

async fn run(
    session: Arc<Mutex<ClientSession>>,
    mut requests: mpsc::UnboundedReceiver<PermitRequest>,
    durations: Histogram,
) {
    let mut waiting = Vec::new();
    while requests.recv_many(&mut waiting, usize::MAX).await > 0 {
        let mut submitted = Vec::new();
        while !waiting.is_empty() {
            submitted.extend(collect(waiting.drain(..)).await);
            // The views of the last transaction have only just heard that it ended, and may have their next batch
            // ready.
            tokio::task::yield_now().await;
            while let Ok(request) = requests.try_recv() {
                waiting.push(request);
            }
        }
        let mut session = session.lock().await;
        // A view that has restarted meanwhile goes on from the stored checkpoint, and does not want this batch any
        // more.
        submitted.retain(|submitted| !submitted.written.is_closed());
        let (batches, written): (Vec<_>, Vec<_>) =
            submitted.into_iter().map(|Submitted { batch, written }| (batch, written)).unzip();
        let started = Instant::now();
        let results = write(&mut session, &batches).await;
        if results.iter().any(Result::is_ok) {
            durations.observe(started.elapsed().as_secs_f64());
        }
        drop(session);
        for (written, result) in written.into_iter().zip(results) {
            let _ = written.send(result);
        }
    }
}

/// Grants a permit to each request, and returns the batches that are submitted with them.
async fn collect(waiting: impl Iterator<Item = PermitRequest>) -> Vec<Submitted> {
    let (submit, mut submitted) = mpsc::unbounded_channel();
    for request in waiting {
        let _ = request.send(WritePermit(submit.clone()));
    }
    drop(submit);
    let mut all = Vec::new();
    while let Some(batch) = submitted.recv().await {
        all.push(batch);
    }
    all
}

/// Writes all batches in one transaction. If that fails and a batch may be the reason, writes each in its own.
async fn write(session: &mut ClientSession, batches: &[Batch]) -> Vec<anyhow::Result<()>> {
    let error = match store::commit(session, batches).await {
        Ok(()) => return batches.iter().map(|_| Ok(())).collect(),
        Err(error) => error,
    };
    if batches.len() == 1 {
        return vec![Err(error)];
    }
    if is_server_unavailable(&error) {
        let reason = describe(&error);
        return batches.iter().map(|_| Err(anyhow!(reason.clone()))).collect();
    }
    let mut results = Vec::new();
    for batch in batches {
        results.push(store::commit(session, std::slice::from_ref(batch)).await);
    }
    results
}
