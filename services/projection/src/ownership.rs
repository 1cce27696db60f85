//! Whether the views in the database are those of the stream's journal. The invariant: a replica that was started with
//! another installation's database or stream leads no view, and leaves the views to the replicas that are right.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use async_nats::jetstream::{self, ErrorCode, context::GetStreamErrorKind};
use bson::doc;
use futures_util::TryStreamExt;
use mongodb::Database;
use runtime::{Monitor, Nats, Problem};
use uuid::Uuid;
use views::layout::{self, Checkpoint};
use wire::Lineage;

use crate::{generations::Catalog, history::other_journal, lease::Leases, retry_state::RetryState};

/// Waits until the views come from the stream's journal, or have not been begun.
pub async fn wait(nats: &Nats, stream: &str, database: &Database, leases: &Leases, monitor: &Monitor) {
    let mut retry = RetryState::default();
    let reason = Arc::new(Mutex::new(None::<String>));
    let shown = Arc::clone(&reason);
    monitor.add_check(move || {
        let reason = shown.lock().unwrap_or_else(PoisonError::into_inner);
        reason.iter().map(|reason| Problem::blocking(reason.clone())).collect()
    });
    let set = |text: Option<String>| *reason.lock().unwrap_or_else(PoisonError::into_inner) = text;
    loop {
        match foreign_views(nats, stream, database).await {
            Ok(None) => return set(None),
            Ok(Some(ForeignViews { views, reason })) => {
                if let Some(reason) = retry.log_once(&anyhow::anyhow!(reason.clone())) {
                    tracing::error!(
                        reason,
                        "the views are of another journal than the stream, this replica leads none"
                    );
                }
                // While others lead them, the views are theirs. Otherwise they are left over from before.
                let is_led = leases.snapshot().await.is_ok_and(|found| !found.others(leases.replica()).is_empty());
                if !is_led {
                    let catalog = Catalog::new(database);
                    for (view, generation) in views {
                        // It is tried again with the next turn.
                        let _ = catalog.set_problem(&view, generation, Some(&reason)).await;
                    }
                }
                set(Some(reason));
            }
            Err(error) => {
                if let Some(reason) = retry.log_once(&error) {
                    tracing::warn!(reason, "cannot compare the views with the stream, trying again");
                }
            }
        }
        retry.wait().await;
    }
}

struct ForeignViews {
    /// The generations that have been begun, each by its view and number.
    views: Vec<(String, i32)>,
    reason: String,
}

/// The views, if all that have been begun are of another journal than the stream.
async fn foreign_views(nats: &Nats, stream: &str, database: &Database) -> anyhow::Result<Option<ForeignViews>> {
    let checkpoints: Vec<Checkpoint> =
        database.collection(layout::CHECKPOINTS).find(doc! {}).await?.try_collect().await?;
    let begun = checkpoints.iter().filter_map(|checkpoint| checkpoint.journal.as_ref().map(|it| (checkpoint, it)));
    let begun: Vec<_> = begun.collect();
    let Some((_, journal)) = begun.first() else { return Ok(None) };
    nats.up().await;
    let found = match jetstream::new(nats.client.clone()).get_stream(stream).await {
        Ok(found) => found,
        Err(error) => match error.kind() {
            GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                anyhow::bail!("there is no stream {stream} yet")
            }
            _ => return Err(error).context("NATS does not tell of the stream"),
        },
    };
    let Some(lineage) = Lineage::from_metadata(&found.cached_info().config.metadata)? else { return Ok(None) };
    let theirs = lineage.journal().to_string();
    if begun.iter().any(|(_, journal)| **journal == theirs) {
        return Ok(None);
    }
    let ours: Uuid = journal.parse()?;
    let views = begun.iter().filter_map(|(checkpoint, _)| checkpoint.collection.split_once('@'));
    let views = views.filter_map(|(view, number)| Some((view.to_owned(), number.parse().ok()?))).collect();
    let reason = format!(
        "the database {} is not this stream's: {}; MONGODB_DATABASE, MONGODB_URL, STREAM or NATS_URL may name another \
         installation's",
        database.name(),
        other_journal(stream, ours, lineage.journal())
    );
    Ok(Some(ForeignViews { views, reason }))
}
