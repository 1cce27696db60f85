//! The positions of the views as this replica knows them. It subscribes to the announced checkpoints, and also reads
//! the stored ones periodically, since an announcement can be missed.
//!
//! A position becomes known only after a majority has committed its transaction, so it never runs ahead of what a read
//! that starts afterwards shows. Within a generation it never goes backwards. A generation takes the place of another at
//! the same position, so that the view's position does not go backwards either.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_nats::Subscriber;
use bson::Document;
use futures_util::{StreamExt, TryStreamExt};
use mongodb::{
    Collection,
    error::{Error, ErrorKind},
    options::ReadConcern,
};
use runtime::{Backoff, LogThrottle, Monitor, Problem, Pulse, locked, mongodb_driver};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::json;
use tokio::{
    sync::{Notify, watch},
    time::{sleep, timeout},
};
use views::layout::{self, Checkpoint, Generations, State};
use wire::{Failure, Subjects, generation_of};

use crate::{
    reply,
    store::{SELECTION, Store},
};

/// How often the stored checkpoints are read, which is how long a missed announcement can delay a query.
const REFRESH_INTERVAL: Duration = Duration::from_millis(500);

/// The shortest time between two such reads, however often the announcements ask for one.
const MIN_REFRESH_INTERVAL: Duration = Duration::from_millis(5);

/// The generation of a view that serves queries, and the position that it has reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ViewPosition {
    pub generation: i32,
    pub position: u64,
    /// Nobody keeps the generation up to date, while another version of the view serves.
    pub is_idle: bool,
}

/// The position of one view, or why the view cannot be read.
pub type PositionReceiver = watch::Receiver<Result<ViewPosition, Unserved>>;

/// Why a view cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unserved {
    /// In words.
    pub reason: Arc<str>,
    /// Whether there is no generation that this program could read.
    pub is_unbuilt: bool,
}

/// How well a replica can answer queries of a view; the best is last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rank {
    /// It can only say why it cannot.
    None,
    /// From a generation that nobody keeps up to date.
    Stale,
    /// From one that is kept up to date.
    Live,
}

/// The positions of all views.
#[derive(Clone, Default)]
pub struct Positions {
    views: BTreeMap<&'static str, Arc<View>>,
    /// Notified when an announcement tells of a generation that is not known to serve.
    news: Arc<Notify>,
    /// Notified when the rank of a view has changed.
    ranked: Arc<Notify>,
}

struct View {
    /// The `VERSION` of the view's code.
    version: i32,
    position: watch::Sender<Result<ViewPosition, Unserved>>,
    /// The numbers of the generations of other versions, which do not concern this program.
    others: Mutex<BTreeSet<i32>>,
}

impl Positions {
    pub fn new() -> Self {
        let of = |(view, version)| {
            let unread = Unserved { reason: "its checkpoint has not been read yet".into(), is_unbuilt: true };
            (view, Arc::new(View { version, position: watch::Sender::new(Err(unread)), others: Mutex::default() }))
        };
        Self { views: views::versions().into_iter().map(of).collect(), news: Arc::default(), ranked: Arc::default() }
    }

    /// A receiver of the view's position.
    ///
    /// # Panics
    /// If there is no such view.
    pub fn of(&self, view: &'static str) -> PositionReceiver {
        self.views[view].position.subscribe()
    }

    /// How well this replica can answer queries of each view.
    pub fn ranks(&self) -> impl Iterator<Item = (&'static str, Rank)> {
        self.views.iter().map(|(name, view)| (*name, Rank::of(&view.position.borrow())))
    }

    /// Waits until the rank of a view has changed since this was awaited last.
    pub async fn rank_changed(&self) {
        self.ranked.notified().await;
    }

    /// Shows the positions of all views.
    pub fn show(&self, monitor: &Monitor) {
        let views: Vec<_> = self.views.iter().map(|(name, view)| (*name, view.position.subscribe())).collect();
        let figures = views.clone();
        monitor.add_figures(move |it| {
            for (view, position) in &figures {
                let Ok(ViewPosition { position, .. }) = *position.borrow() else { continue };
                let help = "The position up to which queries see the view";
                it.gauge("watershed_view_position", help, &[("view", view)], position as f64);
            }
        });
        let data = views.clone();
        monitor.add_data(move |it| {
            let views = data.iter().map(|(view, position)| {
                let position = position.borrow();
                let rank = Rank::of(&position);
                match &*position {
                    Ok(ViewPosition { generation, position, .. }) => {
                        json!({ "view": view, "generation": generation, "position": position, "rank": rank })
                    }
                    Err(Unserved { reason, .. }) => {
                        json!({ "view": view, "generation": null, "position": null, "rank": rank, "reason": &**reason })
                    }
                }
            });
            it.insert("views".into(), views.collect());
        });
        monitor.add_check(move || {
            let unserved = views.iter().filter_map(|(view, position)| Some((view, position.borrow().clone().err()?)));
            // A replica whose generations have not been built yet must not take the place of one that can answer.
            let problem = |(view, Unserved { reason, is_unbuilt }): (&&str, Unserved)| Problem {
                text: format!("the view {view} cannot be read: {reason}"),
                is_blocking: is_unbuilt,
            };
            unserved.map(problem).collect()
        });
    }

    /// Applies announced checkpoints for as long as the subscription lasts.
    pub async fn listen(self, subjects: Subjects, mut announcements: Subscriber) {
        while let Some(message) = announcements.next().await {
            let position = std::str::from_utf8(&message.payload).ok().and_then(|text| text.parse().ok());
            let generation = generation_of(message.headers.as_ref());
            if let (Some(view), Some(generation), Some(position)) =
                (subjects.parse_checkpoint(&message.subject), generation, position)
            {
                self.advance(view, generation, position);
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
            sleep(MIN_REFRESH_INTERVAL).await;
            tokio::select! {
                () = sleep(REFRESH_INTERVAL) => {}
                () = self.news.notified() => {}
                // A read that failed is a reason to refresh at once: perhaps only its own connection was broken.
                () = store.status.changed() => {}
            }
        }
    }

    /// Reads the stored checkpoints once.
    async fn refresh(&self, store: &Store) -> Result<(), Error> {
        let stored = async {
            // In this order: the generation that serves has a checkpoint that is not older than its service.
            let generations: Vec<Generations> = all(store.database().collection(layout::VIEWS)).await?;
            let checkpoints: Vec<Checkpoint> = all(store.database().collection(layout::CHECKPOINTS)).await?;
            Ok::<_, Error>((generations, checkpoints))
        };
        let (generations, checkpoints) = timeout(SELECTION, stored).await.map_err(|_| io::ErrorKind::TimedOut)??;
        for (name, view) in &self.views {
            let found = generations.iter().find(|generations| generations.view == *name);
            let others = found.iter().flat_map(|found| &found.generations).filter(|it| it.version != view.version);
            *locked(&view.others) = others.map(|generation| generation.number).collect();
            let stored = serving_position(name, view.version, found, &checkpoints);
            let mut is_ranked = false;
            view.position.send_if_modified(|current| {
                let is_kept = current.as_ref().is_ok_and(|current| {
                    let before = found.and_then(|found| found.find(current.generation));
                    before.is_some_and(|before| before.state == State::Previous)
                });
                let newer = newer(current, stored, is_kept);
                let is_new = newer != *current;
                is_ranked = Rank::of(&newer) != Rank::of(current);
                *current = newer;
                is_new
            });
            if is_ranked {
                self.ranked.notify_one();
            }
        }
        Ok(())
    }

    fn advance(&self, name: &str, generation: i32, position: u64) {
        let Some(view) = self.views.get(name) else { return };
        let mut is_news = false;
        view.position.send_if_modified(|current| match current {
            Ok(current) if current.generation == generation => {
                let is_newer = current.position < position;
                current.position = current.position.max(position);
                is_newer
            }
            // Whether the generation serves queries of this version, only the stored record tells.
            Ok(_) | Err(_) => {
                is_news = !locked(&view.others).contains(&generation);
                false
            }
        });
        if is_news {
            self.news.notify_one();
        }
    }
}

impl Rank {
    fn of(position: &Result<ViewPosition, Unserved>) -> Self {
        match position {
            Ok(ViewPosition { is_idle: false, .. }) => Self::Live,
            Ok(ViewPosition { is_idle: true, .. }) => Self::Stale,
            Err(_) => Self::None,
        }
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
    let done = |current: &Result<ViewPosition, Unserved>| {
        current.as_ref().map_or(true, |view_position| view_position.position >= min_position)
    };
    let in_time = timeout(bound, position.wait_for(done)).await.is_ok();
    match &*position.borrow() {
        Ok(view_position) if in_time => Ok(*view_position),
        Ok(view_position) => Err(reply::behind(view, view_position.position, min_position)),
        Err(Unserved { reason, .. }) => Err(reply::unserved(view, reason)),
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

/// The position of the generation that serves queries of this version of the view, or why there is none.
fn serving_position(
    view: &str,
    version: i32,
    generations: Option<&Generations>,
    checkpoints: &[Checkpoint],
) -> Result<ViewPosition, Unserved> {
    let Some(serving) = generations.and_then(|generations| generations.serving(version)) else {
        let is_being_built =
            generations.is_some_and(|generations| generations.of(version).any(|it| it.state == State::Building));
        let why = if is_being_built { "is still being built" } else { "has not been built" };
        let reason = format!("version {version} of it, which this program reads, {why}").into();
        return Err(Unserved { reason, is_unbuilt: true });
    };
    if let Some(problem) = &serving.problem {
        return Err(Unserved { reason: problem.as_str().into(), is_unbuilt: false });
    }
    let collection = layout::collection(view, serving.number);
    let Some(checkpoint) = checkpoints.iter().find(|checkpoint| checkpoint.collection == collection) else {
        let reason = format!("{collection} has no checkpoint").into();
        return Err(Unserved { reason, is_unbuilt: false });
    };
    let position = u64::try_from(checkpoint.position).unwrap_or_default();
    Ok(ViewPosition { generation: serving.number, position, is_idle: serving.idle_since.is_some() })
}

/// The position that is known after a refresh. An announced position may be ahead of the stored one, since a checkpoint
/// that changed no document is stored later. So a generation can begin to serve at an earlier position than the one
/// before has announced: where that one `is_kept`, it is read until the new one has come as far.
fn newer(
    current: &Result<ViewPosition, Unserved>,
    stored: Result<ViewPosition, Unserved>,
    is_kept: bool,
) -> Result<ViewPosition, Unserved> {
    match (current, stored) {
        (Ok(current), Ok(stored))
            if is_kept && current.generation != stored.generation && current.position > stored.position =>
        {
            Ok(*current)
        }
        (Ok(current), Ok(stored)) if current.generation == stored.generation && current.position > stored.position => {
            Ok(ViewPosition { position: current.position, ..stored })
        }
        (Ok(_) | Err(_), stored) => stored,
    }
}

#[cfg(test)]
mod tests {
    use bson::DateTime;
    use views::layout::Generation;

    use super::*;

    fn at(generation: i32, position: u64) -> Result<ViewPosition, Unserved> {
        Ok(ViewPosition { generation, position, is_idle: false })
    }

    fn idle_at(generation: i32, position: u64) -> Result<ViewPosition, Unserved> {
        Ok(ViewPosition { generation, position, is_idle: true })
    }

    fn unbuilt() -> Result<ViewPosition, Unserved> {
        Err(Unserved { reason: "no".into(), is_unbuilt: true })
    }

    fn positions(current: Result<ViewPosition, Unserved>) -> (Positions, PositionReceiver) {
        let positions = Positions::new();
        let _ = positions.views["orders"].position.send_replace(current);
        let orders = positions.of("orders");
        (positions, orders)
    }

    fn announce(positions: &Positions, view: &str, generation: i32, position: u64) {
        positions.advance(view, generation, position);
    }

    async fn is_notified(positions: &Positions) -> bool {
        timeout(Duration::ZERO, positions.news.notified()).await.is_ok()
    }

    #[test]
    fn a_position_goes_forward_only() {
        let (positions, orders) = positions(at(1, 10));
        announce(&positions, "orders", 1, 12);
        announce(&positions, "orders", 1, 11);
        announce(&positions, "unheard-of", 1, 99);
        assert_eq!(*orders.borrow(), at(1, 12));
        assert_eq!(newer(&at(1, 12), at(1, 11), false), at(1, 12));
        assert_eq!(newer(&at(1, 12), at(1, 13), false), at(1, 13));
    }

    #[test]
    fn a_new_generation_has_its_own_position() {
        assert_eq!(newer(&at(1, 12), at(2, 12), true), at(2, 12));
        assert_eq!(newer(&at(1, 12), unbuilt(), true), unbuilt());
        assert_eq!(newer(&unbuilt(), at(1, 0), false), at(1, 0));
    }

    #[test]
    fn a_generation_is_read_once_it_is_where_the_one_before_was_known_to_be() {
        assert_eq!(newer(&at(1, 12), at(2, 11), true), at(1, 12));
        assert_eq!(newer(&at(1, 12), at(2, 13), true), at(2, 13));
        assert_eq!(newer(&at(1, 12), at(2, 11), false), at(2, 11), "the one before is about to be dropped");
    }

    #[test]
    fn whoever_answers_from_a_generation_that_is_kept_up_to_date_ranks_highest() {
        assert_eq!(
            [unbuilt(), idle_at(1, 12), at(1, 0)].map(|it| Rank::of(&it)),
            [Rank::None, Rank::Stale, Rank::Live]
        );
        assert!(Rank::None < Rank::Stale && Rank::Stale < Rank::Live);
        // The stored record says so, also where its position is not the newest.
        assert_eq!(newer(&at(1, 12), idle_at(1, 11), false), idle_at(1, 12));
        assert_eq!(newer(&idle_at(1, 12), at(1, 11), false), at(1, 12));
    }

    #[tokio::test]
    async fn an_announcement_of_another_generation_is_no_position_but_news() {
        for current in [at(1, 10), unbuilt()] {
            let (positions, orders) = positions(current.clone());
            *locked(&positions.views["orders"].others) = [3].into();
            announce(&positions, "orders", 3, 12);
            assert!(!is_notified(&positions).await, "it is another version's");
            announce(&positions, "orders", 2, 12);
            assert!(is_notified(&positions).await);
            assert_eq!(*orders.borrow(), current);
        }
    }

    #[test]
    fn the_checkpoint_is_that_of_the_serving_generation_of_the_version() {
        let checkpoint = |collection: &str, position| Checkpoint {
            collection: collection.to_owned(),
            position,
            version: 1,
            term: 1,
            journal: None,
            rate: None,
            digest: None,
            branch: None,
            event: None,
        };
        let checkpoints =
            [checkpoint("orders@1", 9), checkpoint("orders@2", 7), checkpoint("users@2", 8), checkpoint("orders@6", 5)];
        let generation = |number, version, state, problem: Option<&str>| Generation {
            number,
            version,
            state,
            since: DateTime::from_millis(0),
            force: false,
            values: false,
            returns: false,
            problem: problem.map(ToOwned::to_owned),
            idle_since: (number == 6).then_some(DateTime::from_millis(0)),
        };
        let generations = Generations {
            view: "orders".to_owned(),
            last: 6,
            generations: vec![
                generation(1, 1, State::Previous, None),
                generation(2, 1, State::Serving, None),
                generation(3, 2, State::Building, None),
                generation(4, 3, State::Serving, None),
                generation(5, 4, State::Serving, Some("it was dropped")),
                generation(6, 5, State::Serving, None),
            ],
        };
        let of = |version| serving_position("orders", version, Some(&generations), &checkpoints);
        let unserved = |version| of(version).map_err(|unserved| (unserved.reason.to_string(), unserved.is_unbuilt));
        assert_eq!((of(1), of(5)), (at(2, 7), idle_at(6, 5)));
        let being_built = "version 2 of it, which this program reads, is still being built".to_owned();
        assert_eq!(unserved(2), Err((being_built, true)));
        assert_eq!(unserved(3), Err(("orders@4 has no checkpoint".to_owned(), false)));
        assert_eq!(unserved(4), Err(("it was dropped".to_owned(), false)));
        assert!(unserved(9).unwrap_err().1);
        assert!(serving_position("orders", 1, None, &checkpoints).unwrap_err().is_unbuilt);
    }

    #[tokio::test]
    async fn an_announcement_wakes_a_waiting_query() {
        let (positions, orders) = positions(at(1, 10));
        let waiting = tokio::spawn(wait("orders", orders, 12, Duration::from_secs(30)));
        announce(&positions, "orders", 1, 11);
        announce(&positions, "orders", 1, 12);
        assert_eq!(waiting.await.unwrap(), Ok(at(1, 12).unwrap()));
    }

    #[tokio::test]
    async fn a_query_that_waits_in_vain_is_told_the_position() {
        let (_positions, orders) = positions(at(1, 10));
        let failure = wait("orders", orders, 12, Duration::from_millis(1)).await.unwrap_err();
        assert_eq!(failure.code, "view_behind");
        assert_eq!(failure.details["position"], 10);
        assert_eq!(failure.details["min_position"], 12);
        let (_positions, orders) = positions(unbuilt());
        assert_eq!(wait("orders", orders, 0, Duration::from_millis(1)).await.unwrap_err().code, "unavailable");
    }
}
