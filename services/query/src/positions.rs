//! The positions of the views as this replica knows them. It subscribes to the announced checkpoints, and also reads
//! the stored ones periodically, since an announcement can be missed.
//!
//! A position becomes known only after a majority has committed its transaction, so it never runs ahead of what a read
//! that starts afterwards shows. Within a generation it never goes backwards; a new generation starts at its own
//! checkpoint.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use async_nats::Subscriber;
use bson::Document;
use futures_util::{StreamExt, TryStreamExt};
use mongodb::{
    Collection,
    error::{Error, ErrorKind},
    options::ReadConcern,
};
use runtime::{Backoff, LogThrottle, Monitor, Problem, Pulse, mongodb_driver};
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::{sync::watch, time::timeout};
use views::layout::{self, Checkpoint, Serving};
use wire::{Failure, Subjects};

use crate::{
    reply,
    store::{SELECTION, Store},
};

/// How often the stored checkpoints are read, which is how long a missed announcement can delay a query.
const REFRESH_INTERVAL: Duration = Duration::from_millis(500);

/// The generation of a view that serves queries, and the position that it has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewPosition {
    pub generation: i32,
    pub position: u64,
}

/// The position of one view; `None` until the view has been built.
pub type PositionReceiver = watch::Receiver<Option<ViewPosition>>;

/// The positions of all views.
#[derive(Clone, Default)]
pub struct Positions {
    views: BTreeMap<&'static str, Arc<watch::Sender<Option<ViewPosition>>>>,
}

impl Positions {
    /// A receiver of the view's position.
    pub fn of(&mut self, view: &'static str) -> PositionReceiver {
        self.views.entry(view).or_default().subscribe()
    }

    /// Shows the positions of all views.
    pub fn show(&self, monitor: &Monitor) {
        let views: Vec<_> = self.views.iter().map(|(view, sender)| (*view, sender.subscribe())).collect();
        let figures = views.clone();
        monitor.add_figures(move |it| {
            for (view, position) in &figures {
                let Some(ViewPosition { position, .. }) = *position.borrow() else { continue };
                let help = "The position up to which queries see the view";
                it.gauge("watershed_view_position", help, &[("view", view)], position as f64);
            }
        });
        let data = views.clone();
        monitor.add_data(move |it| {
            let views = data.iter().map(|(view, position)| {
                let (generation, position) = position.borrow().map(|at| (at.generation, at.position)).unzip();
                json!({ "view": view, "generation": generation, "position": position })
            });
            it.insert("views".into(), views.collect());
        });
        monitor.add_check(move || {
            let is_unbuilt = |position: &PositionReceiver| position.borrow().is_none();
            let unbuilt: Vec<_> = views.iter().filter(|(_, position)| is_unbuilt(position)).collect();
            // While one view is being built, the others are served.
            let is_blocking = unbuilt.len() == views.len();
            let text = |view| format!("the view {view} has not been built yet");
            unbuilt.iter().map(|(view, _)| Problem { text: text(view), is_blocking }).collect()
        });
    }

    /// Applies announced checkpoints for as long as the subscription lasts.
    pub async fn listen(self, subjects: Subjects, mut announcements: Subscriber) {
        while let Some(message) = announcements.next().await {
            let position = std::str::from_utf8(&message.payload).ok().and_then(|text| text.parse().ok());
            if let (Some(view), Some(position)) = (subjects.parse_checkpoint(&message.subject), position) {
                self.advance(view, position);
            }
        }
    }

    /// Waits until the stored checkpoints have been read for the first time.
    pub async fn wait_for_first_refresh(&self, store: &Store) {
        let (mut backoff, mut log_throttle) = (Backoff::default(), LogThrottle::default());
        while let Err(error) = self.refresh(store).await {
            if log_throttle.is_due(kind_of(&error)) {
                let server = &*store.address;
                tracing::warn!(
                    server,
                    reason = mongodb_driver::describe(&error),
                    "cannot connect to MongoDB (MONGODB_URL), retrying"
                );
            }
            backoff.wait().await;
        }
        store.mark_up();
    }

    /// Reads the stored checkpoints for ever. This is also how the service notices that MongoDB is back.
    pub async fn keep_refreshing(self, store: Store, pulse: Pulse) {
        loop {
            pulse.beat();
            match self.refresh(&store).await {
                Ok(()) => store.mark_up(),
                Err(error) => store.mark_down(&error),
            }
            // A read that failed is a reason to refresh at once: perhaps only its own connection was broken.
            let _ = timeout(REFRESH_INTERVAL, store.status.changed()).await;
        }
    }

    /// Reads the stored checkpoints once.
    async fn refresh(&self, store: &Store) -> Result<(), Error> {
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

    fn advance(&self, view: &str, position: u64) {
        let Some(current) = self.views.get(view) else { return };
        current.send_if_modified(|current| match current {
            Some(current) if current.position < position => {
                current.position = position;
                true
            }
            // An announcement does not say which generation serves; only the stored checkpoints do.
            Some(_) | None => false,
        });
    }
}

/// Waits until the view has reached `min_position`, for `bound` at most.
///
/// # Errors
/// `view_behind` if the view did not get there in time, `unavailable` if it has not been built.
pub async fn wait(
    view: &str,
    mut position: PositionReceiver,
    min_position: u64,
    bound: Duration,
) -> Result<ViewPosition, Failure> {
    // There is nothing to wait for while the view has not been built, nor once it has been dropped.
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

/// All documents of a small collection with read concern "majority", so that none of them can be rolled back.
async fn all<T: DeserializeOwned + Send + Sync>(collection: Collection<T>) -> Result<Vec<T>, Error> {
    collection.find(Document::new()).read_concern(ReadConcern::majority()).await?.try_collect().await
}

/// What tells two failures apart for the log: the texts of the same failure may differ each time.
fn kind_of(error: &Error) -> &'static str {
    match &*error.kind {
        ErrorKind::Authentication { .. } => "authentication",
        ErrorKind::Command(_) => "command",
        // The enum is the driver's and non-exhaustive.
        _ => "connection",
    }
}

/// The position of the serving generation. One without a checkpoint has only just been started, and is at position 0.
fn serving_position(serving: &Serving, checkpoints: &[Checkpoint]) -> ViewPosition {
    let collection = layout::collection(&serving.view, serving.generation);
    let checkpoint = checkpoints.iter().find(|checkpoint| checkpoint.collection == collection);
    let position = checkpoint.map_or(0, |checkpoint| u64::try_from(checkpoint.position).unwrap_or(0));
    ViewPosition { generation: serving.generation, position }
}

/// The position that is known after a refresh. An announced position may be ahead of the stored one, since a checkpoint
/// that changed no document is stored later.
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
        positions.advance("orders", 12);
        positions.advance("orders", 11);
        positions.advance("unheard-of", 99);
        assert_eq!(*orders.borrow(), at(1, 12));
        assert_eq!(newer(at(1, 12), at(1, 11)), at(1, 12));
        assert_eq!(newer(at(1, 12), at(1, 13)), at(1, 13));
    }

    #[test]
    fn a_new_generation_starts_at_its_own_position() {
        assert_eq!(newer(at(1, 12), at(2, 11)), at(2, 11));
        assert_eq!(newer(at(1, 12), None), None);
        assert_eq!(newer(None, at(1, 0)), at(1, 0));
    }

    #[test]
    fn an_announcement_of_a_view_that_was_not_built_is_ignored() {
        let (positions, orders) = positions(None);
        positions.advance("orders", 12);
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
    async fn an_announcement_wakes_a_waiting_query() {
        let (positions, orders) = positions(at(1, 10));
        let waiting = tokio::spawn(wait("orders", orders, 12, Duration::from_secs(30)));
        positions.advance("orders", 11);
        positions.advance("orders", 12);
        assert_eq!(waiting.await.unwrap(), Ok(ViewPosition { generation: 1, position: 12 }));
    }

    #[tokio::test]
    async fn a_query_that_waits_in_vain_is_told_the_position() {
        let (_positions, orders) = positions(at(1, 10));
        let failure = wait("orders", orders, 12, Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(failure.code, "view_behind");
        assert_eq!(failure.details["position"], 10);
        assert_eq!(failure.details["min_position"], 12);
        let (_positions, orders) = positions(None);
        assert_eq!(wait("orders", orders, 0, Duration::from_millis(1)).await.unwrap_err().code, "unavailable");
    }
}
