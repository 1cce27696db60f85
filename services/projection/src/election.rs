//! Acquires, renews and releases the leases of the views, and runs a leader for each lease that this replica holds. The
//! invariants: a leader runs only while its lease is known to be valid, and the live replicas come to share the views
//! evenly.

use std::{collections::HashMap, sync::Arc};

use anyhow::{anyhow, ensure};
use futures_util::future::{BoxFuture, join_all};
use runtime::{LogThrottle, Nats, Pulse};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    lease::{Lease, Leases, Snapshot},
    metrics::ViewMetrics,
    retry_state::{RetryState, describe},
};

/// A view that this replica can lead.
pub struct Candidate {
    pub view: &'static str,
    pub lead: Lead,
    pub metrics: Arc<ViewMetrics>,
}

/// Leads a view until the token is cancelled, and returns the highest term that it has seen.
pub type Lead = Box<dyn Fn(Arc<Lease>, CancellationToken) -> BoxFuture<'static, i64> + Send + Sync>;

pub struct Election {
    nats: Nats,
    stream: String,
    leases: Leases,
    candidates: Vec<Candidate>,
    leaders: HashMap<&'static str, Leader>,
    pulse: Pulse,
    renew_at: Instant,
    /// When a free lease was first seen free.
    free_since: HashMap<&'static str, Instant>,
    valid_until: watch::Sender<Instant>,
    namesakes: LogThrottle,
}

struct Leader {
    term: i64,
    metrics: Arc<ViewMetrics>,
    /// Makes the leader write what it has folded, and end.
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Election {
    pub fn new(nats: &Nats, stream: &str, leases: Leases, candidates: Vec<Candidate>, pulse: Pulse) -> Self {
        let now = Instant::now();
        let (valid_until, _) = watch::channel(now);
        Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            leases,
            candidates,
            leaders: HashMap::new(),
            pulse,
            renew_at: now,
            free_since: HashMap::new(),
            valid_until,
            namesakes: LogThrottle::default(),
        }
    }

    /// Leads this replica's share of the views until the token is cancelled, then hands them over.
    pub async fn run(mut self, shutdown: &CancellationToken) {
        let mut retry = RetryState::default();
        loop {
            self.pulse.beat();
            let stepped = timeout(self.leases.duration(), self.step());
            let Some(stepped) = shutdown.run_until_cancelled(stepped).await else { break };
            match stepped.unwrap_or_else(|_| Err(anyhow!("MongoDB does not answer"))) {
                Ok(()) if retry.is_failing() => {
                    tracing::info!("the leases of the views are renewed again");
                    retry.reset();
                }
                Ok(()) => {}
                Err(error) => {
                    if let Some(reason) = retry.log_once(&error) {
                        tracing::error!(reason, "cannot renew the leases of the views, trying again");
                    }
                }
            }
            if shutdown.run_until_cancelled(sleep(self.leases.duration() / 10)).await.is_none() {
                break;
            }
        }
        self.pulse.rest();
        self.hand_over().await;
    }

    /// Renews the leases if it is time to; then gives up views that other replicas lack, and acquires leases that are
    /// free.
    ///
    /// # Errors
    /// If MongoDB or NATS is unavailable. The leaders go on until their leases expire.
    pub async fn step(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.renew_at <= now {
            // A replica without a connection to NATS must leave the views to one that has a connection.
            let heard = timeout(self.leases.duration() / 3, self.nats.responds(&self.stream)).await;
            ensure!(heard == Ok(true), "NATS does not answer");
            self.leases.renew().await?;
            self.renew_at = now + self.leases.duration() / 3;
            self.valid_until.send_replace(now + self.leases.duration());
        }
        let snapshot = self.leases.snapshot().await?;
        if snapshot.has_namesake(self.leases.replica()) && self.namesakes.is_due("") {
            tracing::warn!("another replica has the same name, or had until a moment ago: REPLICA must be unique");
        }
        self.leaders.retain(|view, leader| {
            let is_held = snapshot.is_held(self.leases.replica(), view, leader.term);
            if !is_held && !leader.task.is_finished() && !leader.stop.is_cancelled() {
                tracing::warn!(view, term = leader.term, "lost the lease, no longer leading the view");
                leader.metrics.lease_lost();
            }
            is_held && !leader.task.is_finished()
        });
        let others = snapshot.loads_of_others(self.leases.replica());
        self.give_up_surplus(&others);
        self.acquire_free(&snapshot, &others).await
    }

    fn give_up_surplus(&self, others: &[usize]) {
        let views = self.candidates.len();
        let staying = || self.leaders.iter().filter(|(_, leader)| !leader.stop.is_cancelled());
        while must_give_up(views, staying().count(), others) {
            let Some((view, leader)) = staying().max_by_key(|(view, _)| **view) else { return };
            tracing::info!(view, "leaving the view to another replica");
            leader.stop.cancel();
        }
    }

    async fn acquire_free(&mut self, snapshot: &Snapshot, others: &[usize]) -> anyhow::Result<()> {
        let views = self.candidates.len();
        for candidate in &self.candidates {
            let view = candidate.view;
            if self.leaders.contains_key(view) || !snapshot.is_free(self.leases.replica(), view) {
                self.free_since.remove(view);
                continue;
            }
            let free_since = *self.free_since.entry(view).or_insert_with(Instant::now);
            // The replica whose turn it would be has not acquired the lease.
            let overdue = free_since.elapsed() > self.leases.duration();
            if !overdue && !may_acquire(views, self.leaders.len(), others) {
                continue;
            }
            if let Some(term) = self.leases.acquire(view).await? {
                let leader = lead(&self.leases, candidate, term, self.valid_until.subscribe());
                self.leaders.insert(view, leader);
            }
        }
        Ok(())
    }

    async fn hand_over(self) {
        let leaders = self.leaders.into_values().map(|leader| {
            leader.stop.cancel();
            leader.task
        });
        join_all(leaders).await;
        if let Err(error) = self.leases.leave().await {
            tracing::warn!(
                reason = describe(&error.into()),
                "cannot release the leases, other replicas wait until they expire"
            );
        }
    }
}

fn lead(leases: &Leases, candidate: &Candidate, term: i64, valid_until: watch::Receiver<Instant>) -> Leader {
    let lease = Arc::new(Lease { view: candidate.view, term, valid_until });
    let stop = CancellationToken::new();
    let leading = (candidate.lead)(Arc::clone(&lease), stop.clone());
    let (leases, metrics) = (leases.clone(), Arc::clone(&candidate.metrics));
    let guard = metrics.lead(term);
    let task = AbortOnDropHandle::new(tokio::spawn(async move {
        let _guard = guard;
        tokio::select! {
            () = lease.expired() => {
                metrics.lease_lost();
                tracing::warn!(view = lease.view, term, "the lease expired, no longer leading the view");
            }
            highest_term = leading => {
                // If this fails, the lease expires.
                let _ = leases.release(&lease, highest_term).await;
                tracing::info!(view = lease.view, term, "no longer leading the view");
            }
        }
    }));
    Leader { term, metrics: Arc::clone(&candidate.metrics), stop, task }
}

/// Whether a replica that leads `mine` of the views should acquire one more that is free, while the other replicas lead
/// `others`.
fn may_acquire(views: usize, mine: usize, others: &[usize]) -> bool {
    let replicas = others.len() + 1;
    let nobody_has_fewer = others.iter().all(|other| *other >= mine);
    mine < views / replicas || mine < views.div_ceil(replicas) && nobody_has_fewer
}

/// Whether such a replica should give one up.
fn must_give_up(views: usize, mine: usize, others: &[usize]) -> bool {
    let replicas = others.len() + 1;
    let somebody_lacks = others.iter().any(|other| *other < views / replicas);
    mine > views.div_ceil(replicas) || mine > views / replicas && somebody_lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_replica_acquires_all_views() {
        assert!((0..4).all(|mine| may_acquire(4, mine, &[])));
        assert!(!must_give_up(4, 4, &[]));
    }

    #[test]
    fn a_late_replica_gets_its_share_and_nobody_takes_it_back() {
        assert!(must_give_up(4, 4, &[0]));
        assert!(must_give_up(4, 3, &[0]));
        assert!(!must_give_up(4, 2, &[0]));
        assert!(!may_acquire(4, 2, &[0]));
        assert!(may_acquire(4, 0, &[2]));
        assert!(may_acquire(4, 1, &[2]));
        assert!(!may_acquire(4, 2, &[2]));
    }

    #[test]
    fn the_rest_of_an_uneven_share_goes_to_those_who_have_least() {
        assert!(must_give_up(4, 2, &[2, 0]));
        assert!(!must_give_up(4, 1, &[2, 0]));
        assert!(!may_acquire(4, 1, &[1, 0]));
        assert!(may_acquire(4, 1, &[1, 1]));
        assert!(!must_give_up(4, 2, &[1, 1]));
    }

    #[test]
    fn more_replicas_than_views_come_to_rest() {
        assert!(!must_give_up(4, 1, &[1, 1, 1, 0]));
        assert!(!may_acquire(4, 1, &[1, 1, 0, 0]));
        assert!(may_acquire(4, 0, &[1, 1, 1, 0]));
    }

    #[test]
    fn from_any_start_the_replicas_come_to_rest_evenly() {
        for start in [[4, 0, 0], [2, 2, 0], [0, 0, 0], [3, 1, 0], [0, 4, 0]] {
            let mut loads: [usize; 3] = start;
            for step in 0..12 {
                let replica = step % 3;
                let others: Vec<_> = (0..3).filter(|other| *other != replica).map(|other| loads[other]).collect();
                while must_give_up(4, loads[replica], &others) {
                    loads[replica] -= 1;
                }
                while loads.iter().sum::<usize>() < 4 && may_acquire(4, loads[replica], &others) {
                    loads[replica] += 1;
                }
            }
            loads.sort_unstable();
            assert_eq!(loads, [1, 1, 2], "from {start:?}");
        }
    }
}
