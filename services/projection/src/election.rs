//! Takes, keeps and gives up the leases of the views, and runs a leader for each that is held. The invariants: a leader
//! runs only while its lease is known to hold; and the replicas that live come to share the views evenly.

use std::{collections::HashMap, sync::Arc};

use anyhow::{anyhow, ensure};
use futures_util::future::{BoxFuture, join_all};
use runtime::{LogThrottle, Nats};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{
    lease::{Lease, Leases, Seen},
    trouble::{Trouble, plain},
};

/// A view that can be led.
pub struct Candidate {
    pub view: &'static str,
    pub lead: Lead,
}

/// Leads a view until the token is cancelled, and says the highest term that it met.
pub type Lead = Box<dyn Fn(Arc<Lease>, CancellationToken) -> BoxFuture<'static, i64> + Send + Sync>;

pub struct Election {
    nats: Nats,
    stream: String,
    leases: Leases,
    candidates: Vec<Candidate>,
    led: HashMap<&'static str, Leader>,
    renew_at: Instant,
    /// Since when a lease has been seen free.
    free_since: HashMap<&'static str, Instant>,
    valid_until: watch::Sender<Instant>,
    namesakes: LogThrottle,
}

struct Leader {
    term: i64,
    /// Lets it finish what it has begun, and end.
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Election {
    pub fn new(nats: &Nats, stream: &str, leases: Leases, candidates: Vec<Candidate>) -> Self {
        let now = Instant::now();
        let (valid_until, _) = watch::channel(now);
        Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            leases,
            candidates,
            led: HashMap::new(),
            renew_at: now,
            free_since: HashMap::new(),
            valid_until,
            namesakes: LogThrottle::default(),
        }
    }

    /// Leads this replica's share of the views until the token is cancelled, then hands them over.
    pub async fn run(mut self, shutdown: &CancellationToken) {
        let mut trouble = Trouble::default();
        loop {
            let stepped = timeout(self.leases.duration(), self.step());
            let Some(stepped) = shutdown.run_until_cancelled(stepped).await else { break };
            let pause = match stepped.unwrap_or_else(|_| Err(anyhow!("MongoDB does not answer"))) {
                Ok(()) => {
                    if trouble.is_told() {
                        tracing::info!("the leases are renewed again");
                        trouble.over();
                    }
                    shutdown.run_until_cancelled(sleep(self.leases.duration() / 10)).await
                }
                Err(error) => {
                    if let Some(reason) = trouble.news(&error) {
                        tracing::error!(reason, "the leases are not renewed, trying again");
                    }
                    shutdown.run_until_cancelled(sleep(self.leases.duration() / 10)).await
                }
            };
            if pause.is_none() {
                break;
            }
        }
        self.hand_over().await;
    }

    /// Renews what is held, if it is time; takes or gives up what the others have left or lack.
    ///
    /// # Errors
    /// If MongoDB or NATS is away. What is held goes on until it expires.
    pub async fn step(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        if self.renew_at <= now {
            // A replica that does not hear NATS must not keep the views from one that does.
            let heard = timeout(self.leases.duration() / 3, self.nats.responds(&self.stream)).await;
            ensure!(heard == Ok(true), "NATS does not answer");
            self.leases.renew().await?;
            self.renew_at = now + self.leases.duration() / 3;
            self.valid_until.send_replace(now + self.leases.duration());
        }
        let seen = self.leases.look().await?;
        if seen.has_namesake(self.leases.replica()) && self.namesakes.is_due("") {
            tracing::warn!("another replica has, or had until a moment ago, the same name: REPLICA is to be unique");
        }
        self.led.retain(|view, leader| {
            let held = seen.is_held(self.leases.replica(), view, leader.term);
            if !held && !leader.task.is_finished() && !leader.stop.is_cancelled() {
                tracing::warn!(view, term = leader.term, "the lease was lost: no longer leading");
            }
            held && !leader.task.is_finished()
        });
        let others = seen.loads_besides(self.leases.replica());
        self.give(&others);
        self.take(&seen, &others).await
    }

    fn give(&self, others: &[usize]) {
        let views = self.candidates.len();
        let staying = || self.led.iter().filter(|(_, leader)| !leader.stop.is_cancelled());
        while must_give(views, staying().count(), others) {
            let Some((view, leader)) = staying().max_by_key(|(view, _)| **view) else { return };
            tracing::info!(view, "giving the view to another replica");
            leader.stop.cancel();
        }
    }

    async fn take(&mut self, seen: &Seen, others: &[usize]) -> anyhow::Result<()> {
        let views = self.candidates.len();
        for candidate in &self.candidates {
            let view = candidate.view;
            if self.led.contains_key(view) || !seen.is_free(self.leases.replica(), view) {
                self.free_since.remove(view);
                continue;
            }
            let free_since = *self.free_since.entry(view).or_insert_with(Instant::now);
            // Whoever should take it does not.
            let overdue = free_since.elapsed() > self.leases.duration();
            if !overdue && !may_take(views, self.led.len(), others) {
                continue;
            }
            if let Some(term) = self.leases.acquire(view).await? {
                let leader = lead(&self.leases, candidate, term, self.valid_until.subscribe());
                self.led.insert(view, leader);
            }
        }
        Ok(())
    }

    async fn hand_over(self) {
        let leaders = self.led.into_values().map(|leader| {
            leader.stop.cancel();
            leader.task
        });
        join_all(leaders).await;
        if let Err(error) = self.leases.leave().await {
            tracing::warn!(reason = plain(&error.into()), "could not hand over: others wait until the leases expire");
        }
    }
}

fn lead(leases: &Leases, candidate: &Candidate, term: i64, valid_until: watch::Receiver<Instant>) -> Leader {
    let lease = Arc::new(Lease { view: candidate.view, term, valid_until });
    let stop = CancellationToken::new();
    let leading = (candidate.lead)(Arc::clone(&lease), stop.clone());
    let leases = leases.clone();
    let task = AbortOnDropHandle::new(tokio::spawn(async move {
        tokio::select! {
            () = lease.expired() => {
                tracing::warn!(view = lease.view, term, "the lease expired: no longer leading");
            }
            highest_term = leading => {
                // If it fails, the lease expires.
                let _ = leases.release(&lease, highest_term).await;
                tracing::info!(view = lease.view, term, "no longer leading");
            }
        }
    }));
    Leader { term, stop, task }
}

/// Whether a replica that leads `mine` of the views should take one more that is free, while the others lead as many as
/// `others` says.
fn may_take(views: usize, mine: usize, others: &[usize]) -> bool {
    let replicas = others.len() + 1;
    let nobody_has_fewer = others.iter().all(|other| *other >= mine);
    mine < views / replicas || mine < views.div_ceil(replicas) && nobody_has_fewer
}

/// Whether it should give one up.
fn must_give(views: usize, mine: usize, others: &[usize]) -> bool {
    let replicas = others.len() + 1;
    let somebody_lacks = others.iter().any(|other| *other < views / replicas);
    mine > views.div_ceil(replicas) || mine > views / replicas && somebody_lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alone_a_replica_takes_all() {
        assert!((0..4).all(|mine| may_take(4, mine, &[])));
        assert!(!must_give(4, 4, &[]));
    }

    #[test]
    fn a_late_replica_gets_its_share_and_nobody_takes_it_back() {
        assert!(must_give(4, 4, &[0]));
        assert!(must_give(4, 3, &[0]));
        assert!(!must_give(4, 2, &[0]));
        assert!(!may_take(4, 2, &[0]));
        assert!(may_take(4, 0, &[2]));
        assert!(may_take(4, 1, &[2]));
        assert!(!may_take(4, 2, &[2]));
    }

    #[test]
    fn what_cannot_be_shared_evenly_goes_to_those_who_have_least() {
        assert!(must_give(4, 2, &[2, 0]));
        assert!(!must_give(4, 1, &[2, 0]));
        assert!(!may_take(4, 1, &[1, 0]));
        assert!(may_take(4, 1, &[1, 1]));
        assert!(!must_give(4, 2, &[1, 1]));
    }

    #[test]
    fn more_replicas_than_views_is_at_rest() {
        assert!(!must_give(4, 1, &[1, 1, 1, 0]));
        assert!(!may_take(4, 1, &[1, 1, 0, 0]));
        assert!(may_take(4, 0, &[1, 1, 1, 0]));
    }

    #[test]
    fn from_any_start_the_replicas_come_to_rest_evenly() {
        for start in [[4, 0, 0], [2, 2, 0], [0, 0, 0], [3, 1, 0], [0, 4, 0]] {
            let mut loads: [usize; 3] = start;
            for step in 0..12 {
                let replica = step % 3;
                let others: Vec<_> = (0..3).filter(|other| *other != replica).map(|other| loads[other]).collect();
                while must_give(4, loads[replica], &others) {
                    loads[replica] -= 1;
                }
                while loads.iter().sum::<usize>() < 4 && may_take(4, loads[replica], &others) {
                    loads[replica] += 1;
                }
            }
            loads.sort_unstable();
            assert_eq!(loads, [1, 1, 2], "from {start:?}");
        }
    }
}
