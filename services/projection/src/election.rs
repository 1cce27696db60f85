//! Acquires, renews and releases the leases of the views, and runs a leader for each lease that this replica holds. The
//! invariants: a leader runs only while its lease is known to be valid, and the live replicas come to share the
//! generations as evenly as their versions of the views allow.

use std::{collections::HashMap, sync::Arc, time::Duration};

use anyhow::{anyhow, ensure};
use futures_util::future::{BoxFuture, join_all};
use runtime::{LogThrottle, Nats, Pulse};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use views::layout::{self, Generation, Generations, State};

use crate::{
    generations::Catalog,
    lease::{Lease, Leases, Other, Snapshot},
    metrics::ViewMetrics,
    retry_state::{RetryState, describe},
};

/// A view whose generations this replica can lead, as far as they belong to this version.
pub struct Candidate {
    pub view: &'static str,
    pub version: i32,
    pub lead: Lead,
    pub metrics: Arc<ViewMetrics>,
}

/// Leads a generation of this number until the token is cancelled, and returns the highest term that it has seen.
pub type Lead = Box<dyn Fn(Arc<Lease>, i32, CancellationToken) -> BoxFuture<'static, i64> + Send + Sync>;

pub struct Election {
    nats: Nats,
    stream: String,
    leases: Leases,
    catalog: Catalog,
    /// How long a generation that nobody needs is kept.
    grace: Duration,
    candidates: Vec<Candidate>,
    /// The leaders of the generations, by the names of their collections.
    leaders: HashMap<String, Leader>,
    pulse: Pulse,
    renew_at: Instant,
    /// When a free lease was first seen free.
    free_since: HashMap<String, Instant>,
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
    pub fn new(
        nats: &Nats,
        stream: &str,
        leases: Leases,
        (catalog, grace): (Catalog, Duration),
        candidates: Vec<Candidate>,
        pulse: Pulse,
    ) -> Self {
        let now = Instant::now();
        let (valid_until, _) = watch::channel(now);
        Self {
            nats: nats.clone(),
            stream: stream.to_owned(),
            leases,
            catalog,
            grace,
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

    /// Renews the leases if it is time to; then gives up a generation that another replica lacks, and acquires leases
    /// that are free.
    ///
    /// # Errors
    /// If MongoDB or NATS is unavailable. The leaders go on until their leases expire.
    pub async fn step(&mut self) -> anyhow::Result<()> {
        let now = Instant::now();
        let is_renewing = self.renew_at <= now;
        if is_renewing {
            // A replica without a connection to NATS must leave the views to one that has a connection.
            let heard = timeout(self.leases.duration() / 3, self.nats.responds(&self.stream)).await;
            ensure!(heard == Ok(true), "NATS does not answer");
            self.leases.renew().await?;
            self.renew_at = now + self.leases.duration() / 3;
            self.valid_until.send_replace(now + self.leases.duration());
        }
        let snapshot = self.leases.snapshot().await?;
        let views = self.catalog.all().await?;
        for Candidate { view, version, .. } in &self.candidates {
            let found = views.iter().find(|found| found.view == *view);
            if found
                .is_none_or(|found| found.of(*version).all(|it| !matches!(it.state, State::Building | State::Serving)))
            {
                self.catalog.ensure(view, *version).await?;
            }
        }
        if is_renewing {
            self.clean_up(&views, &snapshot).await?;
        }
        if snapshot.has_namesake(self.leases.replica()) && self.namesakes.is_due("") {
            tracing::warn!("another replica has the same name, or had until a moment ago: REPLICA must be unique");
        }
        let led = generations(&self.candidates, &views);
        self.leaders.retain(|collection, leader| {
            let is_held = snapshot.is_held(self.leases.replica(), collection, leader.term);
            if !is_held && !leader.task.is_finished() && !leader.stop.is_cancelled() {
                match snapshot.reason(collection) {
                    Some(reason) => tracing::info!(generation = collection, reason, "gave up the lease"),
                    None => {
                        tracing::warn!(
                            generation = collection,
                            term = leader.term,
                            "lost the lease, no longer leading the generation"
                        );
                        leader.metrics.lease_lost();
                    }
                }
            }
            if !led.iter().any(|led| led.collection == *collection) {
                leader.stop.cancel();
            }
            is_held && !leader.task.is_finished()
        });
        let others = snapshot.others(self.leases.replica());
        self.give_up_surplus(&led, &snapshot, &others);
        self.acquire_free(&led, &snapshot, &others).await
    }

    /// Notes which generations of other versions nobody keeps up to date, and drops what is not needed any more.
    async fn clean_up(&mut self, views: &[Generations], snapshot: &Snapshot) -> anyhow::Result<()> {
        for Candidate { view, version, .. } in &self.candidates {
            let Some(found) = views.iter().find(|found| found.view == *view) else { continue };
            let is_replaced = found.serving(*version).is_some_and(|serving| {
                serving.idle_since.is_none() && snapshot.holder(&layout::collection(view, serving.number)).is_some()
            });
            let others = found.generations.iter().filter(|it| it.version != *version && it.state.is_led());
            for Generation { number, idle_since, .. } in others {
                let collection = layout::collection(view, *number);
                if !is_replaced || snapshot.holder(&collection).is_some() {
                    self.free_since.remove(&collection);
                } else if idle_since.is_none() {
                    let free_since = *self.free_since.entry(collection).or_insert_with(Instant::now);
                    // Longer than it takes a replica of that version to take it over from another.
                    if free_since.elapsed() > 2 * self.leases.duration() {
                        self.catalog.set_idle(view, *number, true).await?;
                    }
                }
            }
            self.catalog.clean_up(found, i64::try_from(self.grace.as_millis()).unwrap_or(i64::MAX)).await?;
        }
        Ok(())
    }

    /// Gives up one generation that another replica lacks, unless one is changing hands already.
    fn give_up_surplus(&self, led: &[Led], snapshot: &Snapshot, others: &[Other<'_>]) {
        let is_changing_hands = |it: &Led| match self.leaders.get(&it.collection) {
            Some(leader) => leader.stop.is_cancelled(),
            None => snapshot.is_free(self.leases.replica(), &it.collection),
        };
        if led.iter().any(is_changing_hands) {
            return;
        }
        let is_lacked = |it: &&Led| must_give_up(self.leaders.len(), &loads(others, &self.candidates[it.candidate]));
        let mine = led.iter().filter(|it| self.leaders.contains_key(&it.collection));
        let Some(Led { collection, .. }) = mine.filter(is_lacked).max_by_key(|it| &it.collection) else { return };
        tracing::info!(generation = collection, "leaving the generation to another replica");
        self.leaders[collection].stop.cancel();
    }

    async fn acquire_free(&mut self, led: &[Led], snapshot: &Snapshot, others: &[Other<'_>]) -> anyhow::Result<()> {
        for Led { collection, number, candidate, can_be_seized } in led {
            if self.leaders.contains_key(collection) || !snapshot.is_free(self.leases.replica(), collection) {
                self.free_since.remove(collection);
                continue;
            }
            let free_since = *self.free_since.entry(collection.clone()).or_insert_with(Instant::now);
            // The replica whose turn it would be has not acquired the lease.
            let overdue = free_since.elapsed() > self.leases.duration();
            if !overdue && !may_acquire(self.leaders.len(), &loads(others, &self.candidates[*candidate])) {
                continue;
            }
            // A lease that this replica has seized is the builder's, as long as there is one.
            let is_seized = snapshot.reason(collection).is_some() && snapshot.holder(collection).is_some();
            if *can_be_seized && is_seized {
                continue;
            }
            if let Some(term) = self.leases.acquire(collection).await? {
                let lease = Lease { collection: collection.clone(), term, valid_until: self.valid_until.subscribe() };
                let leader = lead(&self.leases, &self.candidates[*candidate], *number, lease);
                self.leaders.insert(collection.clone(), leader);
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

/// A generation that has to be led by replicas of this version.
struct Led {
    collection: String,
    number: i32,
    /// The index of its candidate.
    candidate: usize,
    /// It serves, and another is being built that may take its place.
    can_be_seized: bool,
}

fn generations(candidates: &[Candidate], views: &[Generations]) -> Vec<Led> {
    let of = |(index, Candidate { view, version, .. }): (usize, &Candidate)| {
        let found = views.iter().find(|found| found.view == *view);
        let led = found.iter().flat_map(|found| found.of(*version)).filter(|generation| generation.state.is_led());
        let mut states = found.iter().flat_map(|found| found.of(*version)).map(|generation| generation.state);
        let has_builder = states.any(|state| state.is_led() && state != State::Serving);
        let led = led.map(|&Generation { number, state, .. }| Led {
            collection: layout::collection(view, number),
            number,
            candidate: index,
            can_be_seized: has_builder && state == State::Serving,
        });
        led.collect::<Vec<_>>()
    };
    candidates.iter().enumerate().flat_map(of).collect()
}

fn lead(leases: &Leases, candidate: &Candidate, number: i32, lease: Lease) -> Leader {
    let (term, lease) = (lease.term, Arc::new(lease));
    let stop = CancellationToken::new();
    let leading = (candidate.lead)(Arc::clone(&lease), number, stop.clone());
    let (leases, metrics) = (leases.clone(), Arc::clone(&candidate.metrics));
    let task = AbortOnDropHandle::new(tokio::spawn(async move {
        tokio::select! {
            () = lease.expired() => {
                metrics.lease_lost();
                let generation = &lease.collection;
                tracing::warn!(generation, term, "the lease expired, no longer leading the generation");
            }
            highest_term = leading => {
                // If this fails, the lease expires.
                let _ = leases.release(&lease, highest_term).await;
                tracing::info!(generation = lease.collection, term, "no longer leading the generation");
            }
        }
    }));
    Leader { term, metrics: Arc::clone(&candidate.metrics), stop, task }
}

/// How many leases each of the other replicas holds that can lead the same version of the view.
fn loads(others: &[Other<'_>], Candidate { view, version, .. }: &Candidate) -> Vec<usize> {
    others.iter().filter(|other| other.versions.get(*view) == Some(version)).map(|other| other.load).collect()
}

/// Whether a replica that leads `mine` generations should acquire one that is free, while the other replicas that can
/// lead it lead so many each.
fn may_acquire(mine: usize, others: &[usize]) -> bool {
    others.iter().all(|other| *other >= mine)
}

/// Whether such a replica should give one up that it leads.
fn must_give_up(mine: usize, others: &[usize]) -> bool {
    others.iter().any(|other| other + 1 < mine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_replica_acquires_all_generations() {
        assert!((0..4).all(|mine| may_acquire(mine, &[])));
        assert!(!must_give_up(4, &[]));
    }

    #[test]
    fn a_late_replica_gets_its_share_and_nobody_takes_it_back() {
        assert!(must_give_up(4, &[0]));
        assert!(!may_acquire(3, &[0]));
        assert!(may_acquire(0, &[3]));
        assert!(must_give_up(3, &[1]));
        assert!(!must_give_up(2, &[2]));
    }

    #[test]
    fn the_rest_of_an_uneven_share_moves_to_nobody() {
        assert!(!must_give_up(3, &[2]));
        assert!(!must_give_up(1, &[1, 0]));
        assert!(may_acquire(1, &[1, 1]));
    }

    /// A replica whose programs know the versions, and how many generations of each it leads.
    struct Replica {
        versions: &'static [usize],
        leads: [usize; 3],
    }

    /// Lets the replicas take steps in turn until nothing moves; `free` generations of each version belong to nobody.
    fn settle(replicas: &mut [Replica], mut free: [usize; 3]) {
        let all: usize = free.iter().sum::<usize>() + replicas.iter().flat_map(|it| it.leads).sum::<usize>();
        for round in 0.. {
            let mut has_moved = false;
            for turn in 0..replicas.len() {
                let others = |version: usize| -> Vec<usize> {
                    let able = |(index, it): &(usize, &Replica)| *index != turn && it.versions.contains(&version);
                    replicas.iter().enumerate().filter(able).map(|(_, it)| it.leads.iter().sum()).collect()
                };
                let mine: usize = replicas[turn].leads.iter().sum();
                let mut leads = replicas[turn].leads;
                let surplus = (0..3).rfind(|version| leads[*version] > 0 && must_give_up(mine, &others(*version)));
                let wanted = (0..3).find(|version| {
                    let is_able = replicas[turn].versions.contains(version);
                    is_able && free[*version] > 0 && may_acquire(mine, &others(*version))
                });
                match (surplus, wanted) {
                    (Some(version), _) if free.iter().all(|free| *free == 0) => {
                        (leads[version], free[version], has_moved) = (leads[version] - 1, free[version] + 1, true);
                    }
                    (_, Some(version)) => {
                        (leads[version], free[version], has_moved) = (leads[version] + 1, free[version] - 1, true);
                    }
                    (_, None) => {}
                }
                replicas[turn].leads = leads;
            }
            if !has_moved {
                break;
            }
            assert!(round < 100, "the generations do not come to rest");
        }
        assert_eq!(replicas.iter().flat_map(|it| it.leads).sum::<usize>(), all, "each generation is led");
    }

    #[test]
    fn from_any_start_the_replicas_come_to_rest_evenly() {
        for start in [[4, 0, 0], [2, 2, 0], [0, 0, 0], [3, 1, 0], [0, 4, 0]] {
            let mut replicas = start.map(|leads| Replica { versions: &[0], leads: [leads, 0, 0] });
            settle(&mut replicas, [4 - start.iter().sum::<usize>(), 0, 0]);
            let mut loads = replicas.map(|it| it.leads[0]);
            loads.sort_unstable();
            assert_eq!(loads, [1, 1, 2], "from {start:?}");
        }
    }

    #[test]
    fn replicas_of_two_programs_come_to_rest_too_and_each_generation_is_led() {
        // What both know (0), the views of the older program (1), and those of the newer one (2).
        const OLD: &[usize] = &[0, 1];
        const NEW: &[usize] = &[0, 2];
        for old in 1..4 {
            for new in 1..4 {
                for raised in 0..=4 {
                    let mut replicas: Vec<_> = (0..old).map(|_| Replica { versions: OLD, leads: [0; 3] }).collect();
                    replicas[0].leads = [4 - raised, raised, 0];
                    replicas.extend((0..new).map(|_| Replica { versions: NEW, leads: [0; 3] }));
                    settle(&mut replicas, [0, 0, raised]);
                    // Those of one program can lead the same, so they lead equally many.
                    for replica in &replicas {
                        let load: usize = replica.leads.iter().sum();
                        let least = replicas.iter().filter(|it| it.versions == replica.versions);
                        let least = least.map(|it| it.leads.iter().sum::<usize>()).min();
                        assert!(Some(load) <= least.map(|least| least + 1), "{old} {new} {raised}");
                    }
                }
            }
        }
    }
}
