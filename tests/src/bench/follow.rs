//! The lag of the views: how far they are behind the acknowledged orders.

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
    load::{Request, Workload},
};
use crate::System;

/// Follows the views by the checkpoints that they announce.
pub struct Follower {
    progress: Arc<Mutex<Progress>>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Progress {
    positions: BTreeMap<String, u64>,
    /// When the slowest view reached which position.
    slowest: Vec<(Instant, u64)>,
}

impl Follower {
    pub async fn start(system: &System) -> Self {
        let operator = system.operator().await;
        let mut announcements = operator.subscribe(system.subjects.checkpoints()).await.expect("NATS answers");
        let positions = crate::journal::checkpoints(system).await;
        let progress = Arc::new(Mutex::new(Progress { positions, slowest: vec![] }));
        let (subjects, announced) = (system.subjects.clone(), Arc::clone(&progress));
        let task = tokio::spawn(async move {
            let _operator = operator;
            while let Some(Message { subject, payload, .. }) = announcements.next().await {
                let position = std::str::from_utf8(&payload).ok().and_then(|text| text.parse().ok());
                let (Some(view), Some(position)) = (subjects.parse_checkpoint(&subject), position) else { continue };
                announced.lock().expect("no panic").announced(view, position);
            }
        });
        Self { progress, _task: AbortOnDropHandle::new(task) }
    }

    /// The position of the slowest view.
    pub fn position(&self) -> u64 {
        self.progress.lock().expect("no panic").position()
    }

    /// How long it took, in seconds, until all views reached each acknowledged position. Waits for the last, and sorts.
    pub async fn lags(&self, acknowledged: &[(Instant, u64)]) -> Vec<f64> {
        let last = acknowledged.iter().map(|(_, position)| *position).max().unwrap_or_default();
        let deadline = Instant::now() + Duration::from_secs(600);
        while self.position() < last {
            assert!(Instant::now() < deadline, "the views have not caught up in ten minutes");
            sleep(Duration::from_millis(20)).await;
        }
        let progress = self.progress.lock().expect("no panic");
        let lag = |(at, position): &(Instant, u64)| {
            let place = progress.slowest.partition_point(|(_, reached)| reached < position);
            // A position that was reached before this follower started has no lag.
            progress.slowest.get(place).map_or(0.0, |(at_view, _)| at_view.saturating_duration_since(*at).as_secs_f64())
        };
        let mut lags: Vec<f64> = acknowledged.iter().map(lag).collect();
        lags.sort_by(f64::total_cmp);
        lags
    }

    /// Discards what was recorded so far.
    pub fn forget(&self) {
        self.progress.lock().expect("no panic").slowest.clear();
    }
}

impl Progress {
    fn announced(&mut self, view: &str, position: u64) {
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

/// Orders, with the time and the position of each acknowledgement.
pub struct Followed<'a> {
    pub orders: Orders<'a>,
    pub acknowledged: Vec<(Instant, u64)>,
}

impl Workload for Followed<'_> {
    fn next(&mut self) -> Option<Request> {
        self.orders.next()
    }

    fn follow_up(&mut self, reply: &Message) -> Option<Request> {
        self.acknowledged.push((Instant::now(), position(reply)));
        None
    }
}

/// The position in a command's reply.
pub fn position(reply: &Message) -> u64 {
    let headers = reply.headers.as_ref().and_then(|headers| headers.get(wire::POSITION));
    headers.and_then(|position| position.as_str().parse().ok()).expect("a command's reply has a position")
}
