//! How far the views are behind the orders that were acknowledged.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_nats::Message;
use futures_util::StreamExt;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use super::{
    installation::Orders,
    load::{Ask, Traffic},
};
use crate::System;

/// Listens to the views' announcements.
pub struct Follower {
    seen: Arc<Mutex<Seen>>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Seen {
    positions: BTreeMap<String, u64>,
    /// When the slowest view came to a position.
    slowest: Vec<(Instant, u64)>,
}

impl Follower {
    pub async fn start(system: &System) -> Self {
        let operator = system.operator().await;
        let mut announcements = operator.subscribe(system.subjects.checkpoints()).await.expect("NATS answers");
        let positions = crate::journal::checkpoints(system).await;
        let seen = Arc::new(Mutex::new(Seen { positions, slowest: vec![] }));
        let (subjects, noted) = (system.subjects.clone(), Arc::clone(&seen));
        let task = tokio::spawn(async move {
            let _operator = operator;
            while let Some(Message { subject, payload, .. }) = announcements.next().await {
                let position = std::str::from_utf8(&payload).ok().and_then(|text| text.parse().ok());
                let (Some(view), Some(position)) = (subjects.parse_checkpoint(&subject), position) else { continue };
                noted.lock().expect("no panic").note(view, position);
            }
        });
        Self { seen, _task: AbortOnDropHandle::new(task) }
    }

    /// The position of the slowest view.
    pub fn position(&self) -> u64 {
        self.seen.lock().expect("no panic").position()
    }

    /// For each moment and position how long it took until all views were there, in seconds, sorted. Waits for the last.
    pub async fn lags(&self, acknowledged: &[(Instant, u64)]) -> Vec<f64> {
        let last = acknowledged.iter().map(|(_, position)| *position).max().unwrap_or_default();
        let deadline = Instant::now() + Duration::from_secs(600);
        while self.position() < last {
            assert!(Instant::now() < deadline, "the views follow");
            sleep(Duration::from_millis(20)).await;
        }
        let seen = self.seen.lock().expect("no panic");
        let lag = |(at, position): &(Instant, u64)| {
            let place = seen.slowest.partition_point(|(_, there)| there < position);
            // What was there before we listened has no lag.
            seen.slowest.get(place).map_or(0.0, |(there, _)| there.saturating_duration_since(*at).as_secs_f64())
        };
        let mut lags: Vec<f64> = acknowledged.iter().map(lag).collect();
        lags.sort_by(f64::total_cmp);
        lags
    }

    /// Forgets what is past.
    pub fn forget(&self) {
        self.seen.lock().expect("no panic").slowest.clear();
    }
}

impl Seen {
    fn note(&mut self, view: &str, position: u64) {
        let before = self.position();
        let known = self.positions.entry(view.to_owned()).or_default();
        *known = position.max(*known);
        let slowest = self.position();
        if slowest > before {
            self.slowest.push((Instant::now(), slowest));
        }
    }

    fn position(&self) -> u64 {
        self.positions.values().copied().min().unwrap_or_default()
    }
}

/// Orders whose positions are kept.
pub struct Followed<'a> {
    pub orders: Orders<'a>,
    pub acknowledged: Vec<(Instant, u64)>,
}

impl Traffic for Followed<'_> {
    fn next(&mut self) -> Option<Ask> {
        self.orders.next()
    }

    fn then(&mut self, reply: &Message) -> Option<Ask> {
        self.acknowledged.push((Instant::now(), position(reply)));
        None
    }
}

/// The position in a command's reply.
pub fn position(reply: &Message) -> u64 {
    let headers = reply.headers.as_ref().and_then(|headers| headers.get(wire::POSITION));
    headers.and_then(|position| position.as_str().parse().ok()).expect("a command's reply has a position")
}
