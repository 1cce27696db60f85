//! Decides for which views this replica takes requests. Replicas of an older and of a newer program share one queue
//! group while the newer takes the place of the older. The invariant: a replica takes requests for a view only if no
//! other replica of the installation, as far as this one knows, can answer them better. If nobody can, it takes them,
//! and says what is wrong.
//!
//! A replica of the highest rank asks nobody. Any other asks all replicas for their ranks, which are in the `data` of
//! `$SRV.STATS`, once a second.

use std::{collections::BTreeMap, time::Duration};

use runtime::{Monitor, Nats};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use crate::positions::{Positions, Rank};

/// How long the other replicas may take to tell their ranks.
const ANSWER_TIME: Duration = Duration::from_millis(500);
/// How long to wait before they are asked again.
const PAUSE: Duration = Duration::from_millis(500);
/// How often in succession no higher rank must have been told before this replica takes the requests. A replica that
/// has much to do may be late once.
const ALONE: u32 = 3;

/// For which views this replica takes requests.
pub struct Standby {
    positions: Positions,
    views: BTreeMap<&'static str, Turn>,
}

/// Whether this replica takes requests for a view.
struct Turn {
    is_open: watch::Sender<bool>,
    /// How often in succession no other replica has told a higher rank.
    alone: u32,
}

/// The highest rank of the other replicas by view.
type Highest = BTreeMap<String, Rank>;

impl Standby {
    /// Takes requests for the views that are live. For the others, the replica stands by until [`Self::run`] knows
    /// more.
    pub fn new(positions: &Positions, monitor: &Monitor) -> Self {
        let turn = |(view, rank)| (view, Turn { is_open: watch::Sender::new(rank == Rank::Live), alone: 0 });
        let views: BTreeMap<_, _> = positions.ranks().map(turn).collect();
        let shown: Vec<_> = views.iter().map(|(view, turn)| (*view, turn.is_open.subscribe())).collect();
        monitor.add_data(move |data| {
            let standing_by = shown.iter().filter(|(_, is_open)| !*is_open.borrow()).map(|(view, _)| *view);
            data.insert("standing_by".into(), standing_by.collect());
        });
        Self { positions: positions.clone(), views }
    }

    /// Tells whether this replica takes requests for the view.
    ///
    /// # Panics
    /// If there is no such view.
    pub fn is_open(&self, view: &'static str) -> watch::Receiver<bool> {
        self.views[view].is_open.subscribe()
    }

    /// Follows the ranks of this replica and of the others for ever. The replica must answer on `$SRV` already.
    pub async fn run(mut self, nats: Nats, monitor: Monitor) {
        let positions = self.positions.clone();
        loop {
            let ranks: Vec<_> = positions.ranks().collect();
            self.note(&ranks, |view, turn, rank| turn.note_own(view, rank));
            if ranks.iter().all(|(_, rank)| *rank == Rank::Live) {
                positions.rank_changed().await;
                continue;
            }
            tokio::select! {
                () = positions.rank_changed() => continue,
                highest = highest_of_others(&nats, &monitor) => if let Some(highest) = highest {
                    self.note(&ranks, |view, turn, rank| turn.note_others(view, rank, highest.get(view).copied()));
                },
            }
            let _ = timeout(PAUSE, positions.rank_changed()).await;
        }
    }

    fn note(&mut self, ranks: &[(&'static str, Rank)], mut note: impl FnMut(&'static str, &mut Turn, Rank)) {
        for (view, rank) in ranks {
            if let Some(turn) = self.views.get_mut(view) {
                note(view, turn, *rank);
            }
        }
    }
}

impl Turn {
    fn note_own(&mut self, view: &str, rank: Rank) {
        if rank == Rank::Live {
            self.set(view, true);
        }
    }

    fn note_others(&mut self, view: &str, rank: Rank, highest: Option<Rank>) {
        if highest > Some(rank) {
            self.set(view, false);
            return;
        }
        self.alone += 1;
        if self.alone >= ALONE {
            self.set(view, true);
        }
    }

    fn set(&mut self, view: &str, is_open: bool) {
        self.alone = 0;
        let is_new = self.is_open.send_if_modified(|current| std::mem::replace(current, is_open) != is_open);
        match is_open {
            _ if !is_new => {}
            true => tracing::info!(view, "taking requests for the view"),
            false => tracing::info!(view, "other replicas answer queries of the view better: standing by"),
        }
    }
}

/// Asks all replicas of the query service for their ranks. `None` if it is not certain that they have heard it.
async fn highest_of_others(nats: &Nats, monitor: &Monitor) -> Option<Highest> {
    let Ok(replies) = nats.gather("$SRV.STATS.query".to_owned(), ANSWER_TIME, ANSWER_TIME).await else {
        // The service is about to end.
        sleep(ANSWER_TIME).await;
        return None;
    };
    let replies: Vec<Value> = replies.iter().filter_map(|it| serde_json::from_slice(&it.payload).ok()).collect();
    highest(&replies, &monitor.metadata(), monitor.replica())
}

/// The highest ranks in the replies to `$SRV.STATS` of the other replicas of this installation; `None` if this
/// replica's own reply is missing.
fn highest(replies: &[Value], own: &Value, replica: &str) -> Option<Highest> {
    #[derive(Deserialize)]
    struct RankedView {
        view: String,
        rank: Rank,
    }

    // Other installations may share the NATS server.
    let is_ours = |it: &&Value| ["stream", "prefix"].iter().all(|field| it["metadata"][field] == own[field]);
    let (mine, others): (Vec<&Value>, Vec<&Value>) =
        replies.iter().filter(is_ours).partition(|it| it["id"] == json!(replica));
    if mine.is_empty() {
        return None;
    }
    let mut highest = Highest::new();
    for view in others.iter().filter_map(|it| it["data"]["views"].as_array()).flatten() {
        if let Ok(RankedView { view, rank }) = RankedView::deserialize(view) {
            let known = highest.entry(view).or_insert(rank);
            *known = rank.max(*known);
        }
    }
    Some(highest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(prefix: &str, id: &str, rank: &str) -> Value {
        json!({
            "type": "io.nats.micro.v1.stats_response", "id": id, "metadata": { "stream": "EVENTS", "prefix": prefix },
            "data": { "views": [{ "view": "orders", "rank": rank }, { "view": "users" }] },
        })
    }

    #[test]
    fn the_highest_rank_is_that_of_another_replica_of_the_same_installation() {
        let own = json!({ "stream": "EVENTS", "prefix": "a" });
        let of = |replies: &[Value]| highest(replies, &own, "me").map(|it| it.get("orders").copied());
        assert_eq!(of(&[stats("a", "you", "live")]), None, "nobody knows who has heard it");
        assert_eq!(of(&[stats("a", "me", "live"), stats("b", "you", "live"), json!("?")]), Some(None));
        let all = [stats("a", "you", "stale"), stats("a", "me", "live"), stats("a", "she", "none")];
        assert_eq!(of(&all), Some(Some(Rank::Stale)));
    }

    #[test]
    fn a_replica_takes_what_nobody_can_answer_better_once_it_is_certain_of_that() {
        let turn = || Turn { is_open: watch::Sender::new(false), alone: 0 };
        let is_open = |turn: &Turn| *turn.is_open.borrow();
        let mut stale = turn();
        for highest in [None, Some(Rank::Stale), Some(Rank::Live), None, Some(Rank::None)] {
            stale.note_others("orders", Rank::Stale, highest);
            assert!(!is_open(&stale), "{highest:?}");
        }
        stale.note_others("orders", Rank::Stale, None);
        assert!(is_open(&stale));
        stale.note_others("orders", Rank::Stale, Some(Rank::Live));
        assert!(!is_open(&stale));
        stale.note_own("orders", Rank::Live);
        assert!(is_open(&stale));
        // As soon as it is not live any more, others may be better; until it knows, it answers.
        stale.note_own("orders", Rank::Stale);
        assert!(is_open(&stale));
    }
}
