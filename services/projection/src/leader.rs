//! Leads one generation of a view: keeps it up to date while it serves, builds it until it can serve, or builds it to
//! be compared. The invariant: a generation begins to serve only in the transaction that ends the service of the one
//! before, when both are at the same position and nobody else can write either; where both are of one version, their
//! digests are equal, unless the operator has asked for it all the same.
//!
//! The switch, step by step, each of which may be the last one of this process:
//!
//! 1. The build follows the serving generation, never beyond it, until it is near.
//! 2. It seizes the lease of the serving generation, and takes its checkpoint over under the new term. From then on that
//!    generation stands still. If the process dies now, the lease expires, and another replica goes on with it.
//! 3. It folds to exactly the position of that checkpoint, and compares the digests.
//! 4. One transaction makes it the serving generation ([`Catalog::switch`]).
//! 5. It goes on as the leader of the serving generation, under the lease that it has had all the time.

use std::{convert::Infallible, future::pending, time::Duration};

use anyhow::{Context, anyhow, bail, ensure};
use bson::doc;
use mongodb::error::Error;
use runtime::mongodb_driver;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use views::{
    View,
    layout::{self, Checkpoint, Generation, Generations, State},
};

use crate::{
    comparison::{Snapshot, Values},
    event::Unapplied,
    generations::{Catalog, Change, Refusal, Stopped, Switch},
    history::Mismatch,
    lease::Lease,
    metrics::{BuildGuard, LeadingGuard},
    projector::{Projector, Purpose, Resources},
    reader::ReadError,
    retry_state::{RetryState, describe},
    store::{Damaged, Store, Superseded, TakenOver, kill_session},
};

/// How near to the serving generation a build must be to take its place, in events. They are folded while that one stands
/// still.
const NEAR: u64 = 1_000;
/// How long the serving generation may stand still before the build gives up taking its place for now.
const MAX_STANDSTILL: Duration = Duration::from_secs(5);
/// How long the checkpoint of the serving generation may be locked before somebody must have died in a transaction.
const LOCKED: Duration = Duration::from_millis(500);
/// How often a build looks how far the serving generation has come.
const POLL: Duration = Duration::from_millis(100);
/// How often the leader of a serving generation says that it is not idle.
const AWAKE: Duration = Duration::from_secs(2);

/// How leading a generation ended.
enum Ended {
    /// The token was cancelled, or the generation need not be led any more.
    Stopped,
    /// The generation has another purpose now.
    Changed,
}

/// Leads a generation until the token is cancelled, and returns the highest term that it has seen. Retries after an
/// error.
pub async fn lead<V: View>(resources: &Resources, lease: &Lease, number: i32, stop: &CancellationToken) -> i64 {
    let (generation, term) = (&lease.collection, lease.term);
    let mut leader = Leader { resources, lease, number, retry: RetryState::default(), leading: None, building: None };
    loop {
        let error = match stop.run_until_cancelled(leader.find::<V>()).await {
            None => return term,
            Some(Ok(None)) => return term,
            Some(Ok(Some(view))) => match leader.lead_as::<V>(&view, stop).await {
                Ok(Ended::Stopped) => return term,
                Ok(Ended::Changed) => continue,
                Err(error) => error,
            },
            Some(Err(error)) => error,
        };
        // Whoever takes its place has taken its lease before.
        if let Ok(None) = resources.leases.recorded_session(lease).await {
            return error.downcast_ref().map_or(term, |Superseded { term }| *term);
        }
        if let Some(Superseded { term: later }) = error.downcast_ref() {
            tracing::warn!(generation, term, later, "another replica has taken the generation over under a later term");
            resources.metrics.of::<V>().lease_lost();
            return *later;
        }
        resources.metrics.of::<V>().failing(describe(&error));
        leader.building.iter().for_each(|building| building.set_failing(Some(describe(&error))));
        match error.downcast_ref() {
            Some(ReadError::Mismatch(refused @ Mismatch::Refused(_))) => {
                leader.set_problem::<V>(Some(&refused.to_string())).await;
            }
            Some(ReadError::Mismatch(beyond @ Mismatch::BeyondFork { .. })) => {
                leader.begin_anew::<V>(&beyond.to_string()).await;
            }
            Some(_) => {}
            None => {
                if let Some(damaged) = error.downcast_ref::<Damaged>() {
                    leader.set_problem::<V>(Some(&damaged.to_string())).await;
                }
            }
        }
        log(V::NAME, number, &error, &mut leader.retry);
        if stop.run_until_cancelled(leader.retry.wait()).await.is_none() {
            return term;
        }
    }
}

fn log(view: &str, generation: i32, error: &anyhow::Error, retry: &mut RetryState) {
    let Some(text) = retry.log_once(error) else { return };
    if let Some(Unapplied { position, aggregate, event, reason }) = error.downcast_ref() {
        tracing::error!(
            view,
            generation,
            position,
            aggregate,
            event,
            reason,
            "the view cannot apply an event, trying again"
        );
        return;
    }
    match error.downcast_ref() {
        Some(ReadError::Mismatch(Mismatch::Refused(_))) => {
            tracing::error!(
                view,
                generation,
                reason = text,
                "the view is of another history than the stream, nothing is served from it"
            );
        }
        Some(
            ReadError::NoStream(_)
            | ReadError::NoConsumer(..)
            | ReadError::Lost(_)
            | ReadError::Mismatch(Mismatch::Short { .. } | Mismatch::BeyondFork { .. }),
        ) => {
            tracing::warn!(view, generation, reason = text, "the view cannot read the stream, trying again");
        }
        Some(ReadError::Gap { .. } | ReadError::Foreign(_)) | None => {
            tracing::error!(view, generation, reason = text, "the view stopped, trying again")
        }
    }
}

/// A replica that leads a generation.
struct Leader<'a> {
    resources: &'a Resources,
    lease: &'a Lease,
    number: i32,
    retry: RetryState,
    /// Says that this replica leads the view, once the generation serves.
    leading: Option<LeadingGuard>,
    /// Says that this replica builds the generation, while it does not serve.
    building: Option<BuildGuard>,
}

impl Leader<'_> {
    /// The generations of the view; `None` if there is none of this number any more.
    async fn find<V: View>(&self) -> anyhow::Result<Option<Generations>> {
        let found = self.resources.catalog.of(V::NAME).await?;
        Ok(found.filter(|view| view.find(self.number).is_some()))
    }

    async fn lead_as<V: View>(&mut self, view: &Generations, stop: &CancellationToken) -> anyhow::Result<Ended> {
        let Some(generation) = view.find(self.number).filter(|generation| generation.version == V::VERSION) else {
            return Ok(Ended::Stopped);
        };
        match generation.state {
            State::Serving => self.keep::<V>(generation, stop).await,
            State::Building => self.build::<V>(generation.force, stop).await,
            State::Verifying => self.verify::<V>(generation.values, stop).await,
            State::Previous | State::Verified | State::Refused | State::Dropping => Ok(Ended::Stopped),
        }
    }

    /// Keeps the serving generation up to date.
    async fn keep<V: View>(&mut self, generation: &Generation, stop: &CancellationToken) -> anyhow::Result<Ended> {
        let Self { resources, lease, number, .. } = *self;
        let metrics = resources.metrics.of::<V>();
        self.building = None;
        self.leading.get_or_insert_with(|| {
            tracing::info!(view = V::NAME, generation = number, term = lease.term, "leading the view");
            metrics.lead(lease.term)
        });
        let purpose = (number, Purpose::Live);
        let starting = Projector::<V>::start(resources, lease, purpose, self.retry.is_failing());
        let Some(started) = stop.run_until_cancelled(starting).await else { return Ok(Ended::Stopped) };
        let projector = started?;
        if generation.problem.is_some() {
            self.set_problem::<V>(None).await;
        }
        let store = projector.store();
        let keeping = projector.run(stop, &mut self.retry);
        tokio::select! {
            ended = keeping => ended.map(|()| Ended::Stopped),
            damage = store.damage::<V>() => Err(damage),
            never = keep_awake::<V>(resources, number) => match never {},
        }
    }

    /// Builds the generation until it serves.
    async fn build<V: View>(&mut self, force: bool, stop: &CancellationToken) -> anyhow::Result<Ended> {
        self.build_for::<V>("building", stop, async |build| build.run(force).await).await
    }

    /// Builds the generation to be compared with the serving one.
    async fn verify<V: View>(&mut self, values: bool, stop: &CancellationToken) -> anyhow::Result<Ended> {
        self.build_for::<V>("verifying", stop, async |build| build.verify(values).await).await
    }

    async fn build_for<V: View>(
        &mut self,
        state: &'static str,
        stop: &CancellationToken,
        work: impl AsyncFnOnce(&mut Build<'_, V>) -> anyhow::Result<Ended>,
    ) -> anyhow::Result<Ended> {
        let Self { resources, lease, number, .. } = *self;
        let building = self.building.get_or_insert_with(|| {
            tracing::info!(view = V::NAME, generation = number, state, "building a generation of the view");
            resources.metrics.building(V::NAME, number, state)
        });
        let purpose = (number, Purpose::Build);
        let starting = Projector::<V>::start(resources, lease, purpose, self.retry.is_failing());
        let Some(started) = stop.run_until_cancelled(starting).await else { return Ok(Ended::Stopped) };
        let mut build = Build {
            building,
            resources,
            lease,
            number,
            projector: started?,
            retry: &mut self.retry,
            share: resources.build_share,
            behind: u64::MAX,
        };
        let store = build.projector.store();
        let ended = tokio::select! {
            built = stop.run_until_cancelled(work(&mut build)) => built.unwrap_or(Ok(Ended::Stopped)),
            damage = store.damage::<V>() => Err(damage),
        };
        build.projector.close().await;
        ended
    }

    /// Lets a new generation be built in the place of this one, whose last events the journal has left.
    async fn begin_anew<V: View>(&self, reason: &str) {
        let Resources { catalog, .. } = self.resources;
        let begin = async {
            let view = catalog.of(V::NAME).await?;
            match view.as_ref().and_then(|view| view.find(self.number)).map(|generation| generation.state) {
                Some(State::Serving) => {
                    catalog.set_problem(V::NAME, self.number, Some(&format!("it is built anew: {reason}"))).await?;
                    if let Change::Done(_) = catalog.rebuild(V::NAME, V::VERSION, false).await? {
                        tracing::warn!(
                            view = V::NAME,
                            generation = self.number,
                            reason,
                            "the journal has left the branch of the view, which is built anew"
                        );
                    }
                }
                Some(state) if state.is_led() => catalog.give_up(V::NAME, self.number, state).await?,
                _ => {}
            }
            Ok::<_, Refusal>(())
        };
        if let Err(error) = begin.await {
            let generation = self.number;
            tracing::warn!(view = V::NAME, generation, %error, "cannot begin to build the view anew, trying again");
        }
    }

    async fn set_problem<V: View>(&self, problem: Option<&str>) {
        if let Err(error) = self.resources.catalog.set_problem(V::NAME, self.number, problem).await {
            let reason = mongodb_driver::describe(&error);
            tracing::warn!(view = V::NAME, generation = self.number, reason, "cannot say that the view has a problem");
        }
    }
}

/// Says that somebody keeps the generation up to date, once it has caught up: now, and again and again, since a replica
/// of another version may note the opposite at the very moment when this one takes it over.
async fn keep_awake<V: View>(resources: &Resources, number: i32) -> Infallible {
    let metrics = resources.metrics.of::<V>();
    let is_near = || {
        let position = metrics.leading().and_then(|leading| leading.position)?;
        let last = resources.metrics.stream.get()?;
        Some(last.saturating_sub(position) <= NEAR)
    };
    loop {
        while is_near() != Some(true) {
            sleep(POLL).await;
        }
        // If it fails, it is done the next time.
        let _ = resources.catalog.set_idle(V::NAME, number, false).await;
        sleep(AWAKE).await;
    }
}

/// A generation while it is being built.
struct Build<'a, V: View> {
    resources: &'a Resources,
    lease: &'a Lease,
    number: i32,
    building: &'a BuildGuard,
    projector: Projector<'a, V>,
    retry: &'a mut RetryState,
    /// The part of the time that the build uses while events keep coming.
    share: f64,
    /// How many events it was behind when it last looked.
    behind: u64,
}

impl<V: View> Build<'_, V> {
    async fn run(&mut self, force: bool) -> anyhow::Result<Ended> {
        loop {
            let view = self.resources.catalog.of(V::NAME).await?.context("the generations of the view are gone")?;
            let serving = view.serving(V::VERSION);
            let served = match serving.filter(|serving| serving.problem.is_none()) {
                Some(serving) => {
                    position_of::<V>(self.resources, serving.number).await?.map(|position| (serving.number, position))
                }
                None => None,
            };
            let is_over = match served {
                Some((serving, position)) if self.follow(serving, position).await? => {
                    self.replace(serving, force).await?
                }
                Some(_) => false,
                None => self.catch_up(&view, serving).await?,
            };
            if is_over {
                return Ok(Ended::Changed);
            }
        }
    }

    /// Comes to where the serving generation is; returns whether it is near.
    async fn follow(&mut self, serving: i32, position: u64) -> anyhow::Result<bool> {
        self.projector.advance_to(position, self.share, self.retry).await?;
        self.building.set_failing(None);
        let now = position_of::<V>(self.resources, serving).await?.unwrap_or_default();
        if !self.is_near(now) {
            return Ok(false);
        }
        if now < self.projector.position() {
            // It was set back, and comes here again.
            sleep(POLL).await;
            return Ok(false);
        }
        Ok(true)
    }

    /// Whether the build is near to a position, to which it was as far as it could be told before. If it does not come
    /// nearer, events come faster than the build takes them, so that it gives way less from now on.
    fn is_near(&mut self, position: u64) -> bool {
        let behind = position.saturating_sub(self.projector.position());
        if behind > NEAR && behind > self.behind / 2 {
            self.share = (2.0 * self.share).min(1.0);
        }
        self.behind = behind;
        behind <= NEAR
    }

    /// Takes the place of the serving generation, unless its documents differ. Returns whether the build is over.
    async fn replace(&mut self, serving: i32, force: bool) -> anyhow::Result<bool> {
        let Resources { leases, catalog, .. } = self.resources;
        let collection = layout::collection(V::NAME, serving);
        let term = leases.seize(&collection, &format!("the generation {} takes its place", self.number)).await?;
        let replaced = timeout(MAX_STANDSTILL, self.switch_from(serving, term, force)).await;
        let released = leases.release_seized(&collection, term).await;
        let differing = replaced.unwrap_or_else(|_| bail!("the serving generation stood still for too long"))?;
        released?;
        let Some(serving) = differing else { return Ok(true) };
        // The one that serves goes on, and is compared as it was when it stood still.
        let own = Snapshot::open(&self.resources.database, &layout::collection(V::NAME, self.number)).await?;
        let comparison = serving.compare_with(own, Values::Hidden).await?;
        let different = comparison.different;
        tracing::error!(
            view = V::NAME,
            generation = self.number,
            different,
            "a new generation differs from the one that serves, and does not take its place"
        );
        catalog.compared(V::NAME, self.number, (State::Building, State::Refused), &comparison).await?;
        Ok(true)
    }

    /// Makes this generation the serving one, in place of another. If their documents differ, returns the other as it
    /// is now, and changes nothing.
    async fn switch_from(&mut self, serving: i32, term: i64, force: bool) -> anyhow::Result<Option<Snapshot>> {
        let Resources { database, catalog, .. } = self.resources;
        let store = Store::open::<V>(database, serving, true).await?;
        let mut session = database.client().start_session().await?;
        let collection = layout::collection(V::NAME, serving);
        let TakenOver { standing, digest } = tokio::select! {
            taken_over = store.take_over(&mut session, term) => taken_over?,
            failed = unlock(self.resources, &collection) => return Err(failed),
        };
        let position = standing.position;
        // It does not give way: the serving generation waits for it.
        self.projector.advance_to(position, 1.0, self.retry).await?;
        ensure!(self.projector.position() == position, "the serving generation was set back");
        // A program of before may have written documents without computing their digest.
        let differs = digest.zip(self.projector.digest()).is_some_and(|(theirs, ours)| theirs != ours);
        if differs && !force {
            return Ok(Some(Snapshot::open(database, &collection).await?));
        }
        let from = Some(Stopped { number: serving, term: Some(term), state: State::Previous });
        self.switch(catalog, position, from).await?;
        Ok(None)
    }

    /// Comes to where the serving generation is, compares the documents, and drops its own.
    async fn verify(&mut self, values: bool) -> anyhow::Result<Ended> {
        let Resources { database, catalog, .. } = self.resources;
        let values = if values { Values::Shown } else { Values::Hidden };
        loop {
            let view = catalog.of(V::NAME).await?.context("the generations of the view are gone")?;
            let serving = view.serving(V::VERSION).context("no generation serves that could be verified")?.number;
            let position = position_of::<V>(self.resources, serving).await?;
            let position = position.context("the serving generation has no checkpoint")?;
            if !self.follow(serving, position).await? {
                continue;
            }
            let served = Snapshot::open(database, &layout::collection(V::NAME, serving)).await?;
            let position = u64::try_from(served.checkpoint.position)?;
            self.projector.advance_to(position, self.share, self.retry).await?;
            let own = Snapshot::open(database, &layout::collection(V::NAME, self.number)).await?;
            let comparison = served.compare_with(own, values).await?;
            if !comparison.is_equal() {
                tracing::error!(
                    view = V::NAME,
                    generation = serving,
                    different = comparison.different,
                    "a verification has found that documents are not what the events lead to"
                );
            }
            let states = (State::Verifying, State::Verified);
            catalog.compared(V::NAME, self.number, states, &comparison).await?;
            catalog.drop_documents(V::NAME, self.number).await?;
            return Ok(Ended::Changed);
        }
    }

    /// Comes to the end of the stream, and begins to serve if nothing of this version does.
    async fn catch_up(&mut self, view: &Generations, broken: Option<&Generation>) -> anyhow::Result<bool> {
        let Resources { nats, stream, catalog, .. } = self.resources;
        // Where nothing was ever built and there is no stream, nothing has happened yet.
        let is_first = self.number == 1;
        let last_sequence = async || {
            let state = nats.stream_state(stream).await.map_err(|error| anyhow!("{error}"))?;
            match state {
                Some(state) => anyhow::Ok(state.last_sequence),
                None if is_first => Ok(0),
                None => Err(ReadError::NoStream(stream.clone()).into()),
            }
        };
        let mut target = last_sequence().await?;
        // Whoever has read another version must not see an earlier position than there.
        for other in view.generations.iter().filter(|other| other.state == State::Serving && other.problem.is_none()) {
            if other.version != V::VERSION && other.idle_since.is_none() {
                target = target.max(position_of::<V>(self.resources, other.number).await?.unwrap_or_default());
            }
        }
        self.projector.advance_to(target, self.share, self.retry).await?;
        self.building.set_failing(None);
        let now = last_sequence().await?;
        if !self.is_near(now) {
            return Ok(false);
        }
        let from = broken.map(|broken| Stopped { number: broken.number, term: None, state: State::Dropping });
        self.switch(catalog, self.projector.position(), from).await
    }

    async fn switch(&mut self, catalog: &Catalog, position: u64, from: Option<Stopped>) -> anyhow::Result<bool> {
        let Self { resources: Resources { database, leases, .. }, lease, number, .. } = *self;
        let session = database.client().start_session().await?;
        // If this process dies in the transaction, that locks what others need to go on: they end the session.
        ensure!(leases.record_session(lease, session.id()).await?, "the lease was lost");
        if let Some(Stopped { number, term: Some(term), .. }) = from {
            let collection = layout::collection(V::NAME, number);
            let is_held = leases.record_session_of_seized(&collection, term, session.id()).await?;
            ensure!(is_held, "the lease of the serving generation was lost");
        }
        catalog.switch(&Switch { view: V::NAME, number, term: lease.term, position, from }, session).await?;
        tracing::info!(view = V::NAME, generation = number, position, "the generation serves");
        Ok(true)
    }
}

/// Ends the transaction in which the writer of a generation may have died, and which locks its checkpoint. Returns only
/// if that fails.
async fn unlock(Resources { leases, database, .. }: &Resources, collection: &str) -> anyhow::Error {
    sleep(LOCKED).await;
    let unlocking = async {
        match leases.last_session(collection).await? {
            Some(former) => kill_session(database, former).await,
            None => Ok(()),
        }
    };
    match unlocking.await {
        Ok(()) => pending().await,
        Err(error) => error.into(),
    }
}

/// The stored position of a generation; `None` if it has no checkpoint.
async fn position_of<V: View>(resources: &Resources, number: i32) -> Result<Option<u64>, Error> {
    let checkpoints = resources.database.collection::<Checkpoint>(layout::CHECKPOINTS);
    let found = checkpoints.find_one(doc! { "_id": layout::collection(V::NAME, number) }).await?;
    Ok(found.map(|checkpoint| u64::try_from(checkpoint.position).unwrap_or_default()))
}
