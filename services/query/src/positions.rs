//! How far each view is, as this replica knows it: it hears the checkpoints that are announced, and looks them up in
//! MongoDB besides, since an announcement can be missed.
//!
//! A position is known only after its transaction was committed by a majority, and so never runs ahead of what a read
//! that starts afterwards shows. It does not go backward, except that another generation begins where its own
//! checkpoint is.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use async_nats::Subscriber;
use bson::Document;
use futures_util::{StreamExt, TryStreamExt};
use mongodb::{
    Collection,
    error::{Error, ErrorKind},
    options::ReadConcern,
};
use runtime::{Backoff, LogThrottle};
use serde::de::DeserializeOwned;
use tokio::{sync::watch, time::timeout};
use views::layout::{self, Checkpoint, Serving};
use wire::{Failure, Subjects};

use crate::{
    reply,
    store::{SELECTION, Store},
};

/// Between two looks at the checkpoints: how long an announcement that was missed delays a query.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// The generation of a view that serves queries, and how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewPosition {
    pub generation: i32,
    pub position: u64,
}

/// Nothing while the view has not been built.
pub type PositionReceiver = watch::Receiver<Option<ViewPosition>>;

/// The positions of all views.
#[derive(Clone, Default)]
pub struct Positions {
    views: BTreeMap<&'static str, Arc<watch::Sender<Option<ViewPosition>>>>,
}

impl Positions {
    /// Follows a view.
    pub fn of(&mut self, view: &'static str) -> PositionReceiver {
        self.views.entry(view).or_default().subscribe()
    }

    /// Hears announcements for as long as the subscription lasts.
    pub async fn listen(self, subjects: Subjects, mut announcements: Subscriber) {
        while let Some(message) = announcements.next().await {
            let position = std::str::from_utf8(&message.payload).ok().and_then(|text| text.parse().ok());
            if let (Some(view), Some(position)) = (subjects.parse_checkpoint(&message.subject), position) {
                self.announced(view, position);
            }
        }
    }

    /// Waits until the checkpoints can be read for the first time.
    pub async fn wait_for_first_poll(&self, store: &Store) {
        let (mut backoff, mut log_throttle) = (Backoff::default(), LogThrottle::default());
        while let Err(error) = self.poll(store).await {
            if log_throttle.is_due(kind_of(&error)) {
                let server = &*store.address;
                tracing::warn!(server, reason = %error.kind, "no connection to MongoDB (MONGODB_URL), trying again");
            }
            backoff.wait().await;
        }
        store.mark_up();
    }

    /// Looks at the checkpoints for ever. This is also what notices that MongoDB is back.
    pub async fn keep_polling(self, store: Store) {
        let mut changes = store.changes();
        loop {
            match self.poll(&store).await {
                Ok(()) => store.mark_up(),
                Err(error) => store.mark_down(&error),
            }
            changes.mark_unchanged();
            // A read that failed is a reason to look at once: it may have been its connection only.
            let _ = timeout(POLL_INTERVAL, changes.changed()).await;
        }
    }

    /// One look.
    async fn poll(&self, store: &Store) -> Result<(), Error> {
        let stored = async {
            let serving: Vec<Serving> = all(store.database().collection(layout::VIEWS)).await?;
            let checkpoints: Vec<Checkpoint> = all(store.database().collection(layout::CHECKPOINTS)).await?;
            Ok::<_, Error>((serving, checkpoints))
        };
        let (serving, checkpoints) = timeout(SELECTION, stored).await.map_err(|_| io::ErrorKind::TimedOut)??;
        for (view, current) in &self.views {
            let stored = serving
                .iter()
                .find(|serving| serving.view == *view)
                .map(|serving| serving_position(serving, &checkpoints));
            current.send_if_modified(|current| std::mem::replace(current, newer(*current, stored)) != *current);
        }
        Ok(())
    }

    fn announced(&self, view: &str, position: u64) {
        let Some(current) = self.views.get(view) else { return };
        current.send_if_modified(|current| match current {
            Some(current) if current.position < position => {
                current.position = position;
                true
            }
            // Which generation serves, only a look tells.
            Some(_) | None => false,
        });
    }
}

/// Waits until the view is at least at `min_position`, but not longer than `bound`.
///
/// # Errors
/// `view_behind` if it did not get there, `unavailable` if it has not been built.
pub async fn wait(
    view: &str,
    mut position: PositionReceiver,
    min_position: u64,
    bound: Duration,
) -> Result<ViewPosition, Failure> {
    // There is nothing to wait for where there is no view, nor once there is none any more.
    let done =
        |current: &Option<ViewPosition>| current.is_none_or(|view_position| view_position.position >= min_position);
    let in_time = timeout(bound, position.wait_for(done)).await.is_ok();
    let current = *position.borrow();
    match current {
        Some(view_position) if in_time => Ok(view_position),
        Some(view_position) => Err(reply::behind(view, view_position.position, min_position)),
        None => Err(reply::not_built(view)),
    }
}

/// All documents of a small collection, as a majority has them: what might be rolled back is not known yet.
async fn all<T: DeserializeOwned + Send + Sync>(collection: Collection<T>) -> Result<Vec<T>, Error> {
    collection.find(Document::new()).read_concern(ReadConcern::majority()).await?.try_collect().await
}

/// By which two failures are told apart: their texts may differ each time.
fn kind_of(error: &Error) -> &'static str {
    match &*error.kind {
        ErrorKind::Authentication { .. } => "authentication",
        ErrorKind::Command(_) => "command",
        // The driver's enum, which may grow.
        _ => "connection",
    }
}

/// A generation without a checkpoint has been begun, and is at the beginning.
fn serving_position(serving: &Serving, checkpoints: &[Checkpoint]) -> ViewPosition {
    let collection = layout::collection(&serving.view, serving.generation);
    let checkpoint = checkpoints.iter().find(|checkpoint| checkpoint.collection == collection);
    let position = checkpoint.map_or(0, |checkpoint| u64::try_from(checkpoint.position).unwrap_or(0));
    ViewPosition { generation: serving.generation, position }
}

/// What is known after a look. A checkpoint that was announced may be stored later, if it changed no document.
fn newer(current: Option<ViewPosition>, stored: Option<ViewPosition>) -> Option<ViewPosition> {
    match (current, stored) {
        (Some(current), Some(stored)) if current.generation == stored.generation => {
            Some(if current.position > stored.position { current } else { stored })
        }
        (Some(_) | None, stored) => stored,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(generation: i32, position: u64) -> Option<ViewPosition> {
        Some(ViewPosition { generation, position })
    }

    fn positions(current: Option<ViewPosition>) -> (Positions, PositionReceiver) {
        let mut positions = Positions::default();
        let orders = positions.of("orders");
        positions.views["orders"].send_replace(current);
        (positions, orders)
    }

    #[test]
    fn a_position_goes_forward_only() {
        let (positions, orders) = positions(at(1, 10));
        positions.announced("orders", 12);
        positions.announced("orders", 11);
        positions.announced("unheard-of", 99);
        assert_eq!(*orders.borrow(), at(1, 12));
        assert_eq!(newer(at(1, 12), at(1, 11)), at(1, 12));
        assert_eq!(newer(at(1, 12), at(1, 13)), at(1, 13));
    }

    #[test]
    fn another_generation_begins_where_it_is() {
        assert_eq!(newer(at(1, 12), at(2, 11)), at(2, 11));
        assert_eq!(newer(at(1, 12), None), None);
        assert_eq!(newer(None, at(1, 0)), at(1, 0));
    }

    #[test]
    fn an_announcement_does_not_tell_of_a_view_that_was_not_built() {
        let (positions, orders) = positions(None);
        positions.announced("orders", 12);
        assert_eq!(*orders.borrow(), None);
    }

    #[test]
    fn the_checkpoint_is_that_of_the_serving_generation() {
        let checkpoint = |collection: &str, position| Checkpoint {
            collection: collection.to_owned(),
            position,
            version: 1,
            term: 1,
            journal: None,
        };
        let checkpoints = [checkpoint("orders@1", 9), checkpoint("orders@2", 7), checkpoint("users@2", 8)];
        let serving = |generation| Serving { view: "orders".to_owned(), generation };
        assert_eq!(serving_position(&serving(2), &checkpoints), ViewPosition { generation: 2, position: 7 });
        assert_eq!(serving_position(&serving(3), &checkpoints), ViewPosition { generation: 3, position: 0 });
    }

    #[tokio::test]
    async fn who_waits_is_woken_by_an_announcement() {
        let (positions, orders) = positions(at(1, 10));
        let waiting = tokio::spawn(wait("orders", orders, 12, Duration::from_secs(30)));
        positions.announced("orders", 11);
        positions.announced("orders", 12);
        assert_eq!(waiting.await.unwrap(), Ok(ViewPosition { generation: 1, position: 12 }));
    }

    #[tokio::test]
    async fn who_waits_in_vain_is_told_where_the_view_is() {
        let (_positions, orders) = positions(at(1, 10));
        let failure = wait("orders", orders, 12, Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(failure.code, "view_behind");
        assert_eq!(failure.details["position"], 10);
        assert_eq!(failure.details["min_position"], 12);
        let (_positions, orders) = positions(None);
        assert_eq!(wait("orders", orders, 0, Duration::from_millis(1)).await.unwrap_err().code, "unavailable");
    }
}
