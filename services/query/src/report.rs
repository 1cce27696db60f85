//! A report is an aggregation over a bounded number of documents, which its view renders as one reply.

use bson::RawDocumentBuf;
use bytes::Bytes;
use futures_util::TryStreamExt;
use views::Report;
use wire::Failure;

use crate::{
    positions::ViewPosition,
    reply::{internal, nothing, too_large},
    store::{MAX_TIME, Store},
};

/// Documents in one batch of the server's cursor: usually all of them.
const BATCH: u32 = 10_000;

/// Reads a report and renders it.
///
/// # Errors
/// The failure to answer with, after it has been logged.
pub async fn read(
    store: &Store,
    view: &str,
    view_position: ViewPosition,
    report: Report,
    max_bytes: usize,
) -> Result<Bytes, Failure> {
    let Report { pipeline, render } = report;
    let _permit = store.read_permit().await;
    let collection = store.collection(view, view_position.generation);
    let aggregate = collection.aggregate(pipeline).batch_size(BATCH).max_time(MAX_TIME).batch();
    let _timer = store.time_read();
    let mut replies = store.read(view, aggregate).await?;
    let mut documents: Vec<RawDocumentBuf> = Vec::new();
    while let Some(reply) = store.read(view, replies.try_next()).await? {
        for document in store.documents(view, &reply)? {
            documents.push(document?.to_owned());
        }
    }
    let body = render(&documents)
        .map_err(|error| internal(view, error))?
        .ok_or_else(|| nothing(view, view_position.position))?;
    if body.len() > max_bytes { Err(too_large(max_bytes)) } else { Ok(body.into()) }
}
