//! One generation takes the place of another while the builder, the leader, or MongoDB is killed, at each step of it:
//! afterwards the view is the fold of the journal, exactly one generation serves, and no client has noticed.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bson::{Document, doc};
use futures_util::TryStreamExt;
use mongodb::{Collection, Database};
use serde_json::json;
use tests::{Process, Stack, System, eventually, journal};
use views::{
    View,
    layout::{self, Checkpoint, Generations, State},
    orders::Orders,
};

use crate::{projection::assert_views_are_journal, witnesses::Witnesses};

/// Short leases; and what has served is dropped soon, so that the generations do not pile up.
const ARGUMENTS: [&str; 4] = ["--lease-ms", "1000", "--generation-grace-seconds", "1"];
/// How often a step is aimed at that takes milliseconds.
const ATTEMPTS: usize = 20;

/// How far the change from one generation to another has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Step {
    /// A replica has the lease of the new generation.
    Building,
    /// The builder has taken the lease of the serving generation, too.
    Seized,
    /// Under its term, the writer of before cannot write the serving generation any more.
    TakenOver,
    /// The new generation serves.
    Switched,
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_is_killed_at_whatever_step_one_generation_serves_and_nobody_notices() {
    let system = System::new().await;
    let _command = system.command().await;
    let mut replicas = Replicas::start(&system, 3);
    let _query = system.query().await;
    let (changes, witnesses) = (Changes::new(&system).await, Witnesses::new(&system));
    witnesses
        .watch(async {
            for step in [Step::Building, Step::Seized, Step::TakenOver, Step::Switched] {
                let mut has_hit = false;
                for _ in 0..ATTEMPTS {
                    let change = changes.begin().await;
                    changes.reaches(change, step).await;
                    replicas.kill(&changes.holder(change.to).await);
                    // Nobody goes on with it until its leases have expired.
                    let found = changes.step(change).await;
                    changes.ends(change).await;
                    has_hit = found == Some(step);
                    if has_hit {
                        break;
                    }
                }
                assert!(has_hit, "the builder was never killed in the step {step:?}");
            }
            for step in [Step::Building, Step::Seized, Step::TakenOver] {
                let leader = changes.holder(changes.serving().await).await;
                let change = changes.begin().await;
                changes.reaches(change, step).await;
                replicas.kill(&leader);
                changes.ends(change).await;
            }
        })
        .await;
    assert_eq!(witnesses.excused_queries(), 0);
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_and_restarted_at_any_time_of_it_the_views_are_a_fold_of_the_journal() {
    let system = System::new().await;
    let _command = system.command().await;
    let mut replicas = Replicas::start(&system, 2);
    let _query = system.query().await;
    let (changes, witnesses) = (Changes::new(&system).await, Witnesses::new(&system));
    witnesses
        .watch(async {
            // Different at each round: in the middle of building, following, switching, dropping.
            for pause in [40, 900, 350, 1700, 80, 1200, 500, 150] {
                for view in views::names() {
                    // A replica that was killed has not answered what had been sent to it.
                    let rebuilding = system.operate("view.rebuild", json!({"view": view}));
                    let _ = tokio::time::timeout(Duration::from_secs(2), rebuilding).await;
                }
                tokio::time::sleep(Duration::from_millis(pause)).await;
                replicas.kill_oldest();
            }
        })
        .await;
    eventually("all are built", async || {
        let all = changes.all().await;
        let is_settled =
            |found: &Generations| found.generations.iter().all(|it| !it.state.is_led() || serves(it.state));
        all.iter().all(is_settled).then_some(())
    })
    .await;
    let all = changes.all().await;
    assert!(all.iter().all(|found| found.last > 2), "each was built several times: {all:?}");
    for found in all {
        let serving = found.generations.iter().filter(|it| serves(it.state)).count();
        assert_eq!(serving, 1, "{found:?}");
    }
    assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mongodb_is_killed_at_each_step_of_it() {
    let stack = Stack::private("switch");
    let system = System::on(stack.clone()).await;
    let _command = system.command().await;
    let _projections = [system.start_projection(&ARGUMENTS), system.start_projection(&ARGUMENTS)];
    let _query = system.query().await;
    let (changes, witnesses) = (Changes::new(&system).await, Witnesses::new(&system));
    witnesses
        .watch(async {
            for step in [Step::Building, Step::Seized, Step::TakenOver, Step::Switched] {
                let change = changes.begin().await;
                changes.reaches(change, step).await;
                let outage = async {
                    let began = Instant::now();
                    tokio::task::spawn_blocking({
                        let stack = stack.clone();
                        move || {
                            stack.kill("mongodb");
                            stack.resume("mongodb");
                        }
                    })
                    .await
                    .unwrap();
                    answers(&system).await;
                    println!("killed at {step:?}; queries were answered again after {:?}", began.elapsed());
                };
                witnesses.excused(outage).await;
                changes.ends(change).await;
            }
        })
        .await;
    assert!(witnesses.excused_queries() > 0, "it was noticed that MongoDB was away");
    assert_views_are_journal(&system).await;
}

/// A builder that lost MongoDB in the middle of the switch, or was stopped there, may not have been able to release
/// what it has taken.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_was_taken_for_a_switch_and_never_released_is_used_again() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&ARGUMENTS));
    system.user().await;
    journal::caught_up(&system).await;
    let changes = Changes::new(&system).await;
    let lease = doc! {"_id": layout::collection(Orders::NAME, changes.serving().await)};
    let taken = doc! {"$inc": {"term": 1_i64}, "$set": {"reason": "the generation 2 takes its place"}};
    assert_eq!(changes.leases.update_one(lease, taken).await.unwrap().modified_count, 1);
    system.user().await;
    assert_views_are_journal(&system).await;
}

/// Such a transaction locks the checkpoint for a minute, unless somebody ends it.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_died_in_a_transaction_does_not_hold_the_switch_up() {
    let system = System::new().await;
    let _command = system.command().await;
    // So long that nobody else has taken the generation over before the builder takes its lease.
    let lease = ["--lease-ms", "20000", "--replica"];
    let replica = |name| (name, system.process("projection", &[&lease[..], &[name]].concat()));
    let mut replicas = HashMap::from(["switch-one", "switch-two"].map(replica));
    system.user().await;
    journal::caught_up(&system).await;
    let changes = Changes::new(&system).await;
    let from = layout::collection(Orders::NAME, changes.serving().await);
    let leader = changes.holder(1).await;
    replicas.remove(&*leader).unwrap().kill();

    let writer = mongodb::Client::with_uri_str(system.stack.url("MONGODB_PROJECTION_URL")).await.unwrap();
    let mut session = writer.start_session().await.unwrap();
    session.start_transaction().await.unwrap();
    let checkpoints = writer.database(&system.prefix).collection::<Document>(layout::CHECKPOINTS);
    let lock = checkpoints.update_one(doc! {"_id": &from}, doc! {"$set": {"position": 99_i64}});
    assert_eq!(lock.session(&mut session).await.unwrap().modified_count, 1);
    let recorded = doc! {"$set": {"session": session.id()}};
    assert_eq!(changes.leases.update_one(doc! {"_id": &from}, recorded).await.unwrap().modified_count, 1);

    let began = Instant::now();
    changes.ends(changes.begin().await).await;
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

/// A replica of another version may look at the leases a moment before this one acquires one of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_generation_that_is_kept_up_to_date_does_not_stay_idle() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&ARGUMENTS));
    system.user().await;
    journal::caught_up(&system).await;
    let changes = Changes::new(&system).await;
    let idle = doc! {"$currentDate": {"generations.0.idle_since": true}};
    let views = changes.views.collection::<Document>(layout::VIEWS);
    assert_eq!(views.update_one(doc! {"_id": Orders::NAME}, idle).await.unwrap().modified_count, 1);
    eventually("it is not idle", async || {
        changes.orders().await?.generations.iter().all(|it| it.idle_since.is_none()).then_some(())
    })
    .await;
}

fn serves(state: State) -> bool {
    state == State::Serving
}

/// Waits until each view is read at the journal's head.
async fn answers(system: &System) {
    for (_, query) in views::queries() {
        let (name, example) = (query.name(), serde_json::from_str::<serde_json::Value>(query.examples[0]).unwrap());
        eventually("the query is answered", async || {
            match system.read(&name, example.clone(), system.head().await).await {
                Ok(_) | Err(client::Error::NotFound(_)) => Some(()),
                Err(_) => None,
            }
        })
        .await;
    }
}

/// Replicas of the projection service in processes of their own.
struct Replicas<'a> {
    system: &'a System,
    started: usize,
    running: HashMap<String, Process>,
}

impl<'a> Replicas<'a> {
    fn start(system: &'a System, count: usize) -> Self {
        let mut replicas = Self { system, started: 0, running: HashMap::new() };
        (0..count).for_each(|_| replicas.start_one());
        replicas
    }

    fn start_one(&mut self) {
        self.started += 1;
        let name = format!("replica-{:03}", self.started);
        let process = self.system.process("projection", &[&ARGUMENTS[..], &["--replica", &name]].concat());
        self.running.insert(name, process);
    }

    /// Kills the replica with SIGKILL, and starts another one.
    fn kill(&mut self, name: &str) {
        self.running.remove(name).unwrap_or_else(|| panic!("{name} runs")).kill();
        self.start_one();
    }

    fn kill_oldest(&mut self) {
        let oldest = self.running.keys().min().unwrap().clone();
        self.kill(&oldest);
    }
}

/// A generation of the view `orders` that takes the place of another.
#[derive(Clone, Copy, Debug)]
struct Change {
    from: i32,
    to: i32,
}

/// The changes of the view `orders`, as MongoDB has them.
struct Changes<'a> {
    system: &'a System,
    views: Database,
    leases: Collection<Document>,
}

impl<'a> Changes<'a> {
    async fn new(system: &'a System) -> Self {
        let views = system.views().await;
        Self { system, leases: views.collection(layout::LEASES), views }
    }

    async fn all(&self) -> Vec<Generations> {
        self.views.collection(layout::VIEWS).find(doc! {}).await.unwrap().try_collect().await.unwrap()
    }

    async fn orders(&self) -> Option<Generations> {
        self.views.collection(layout::VIEWS).find_one(doc! {"_id": Orders::NAME}).await.ok().flatten()
    }

    /// The number of the generation that serves.
    async fn serving(&self) -> i32 {
        eventually("a generation serves", async || Some(self.orders().await?.serving(Orders::VERSION)?.number)).await
    }

    /// Begins to build a generation.
    async fn begin(&self) -> Change {
        let from = self.serving().await;
        let begun = self.system.operate("view.rebuild", json!({"view": Orders::NAME})).await.unwrap().body;
        assert_eq!(begun["is_new"], true, "{begun}");
        Change { from, to: i32::try_from(begun["generation"].as_i64().unwrap()).unwrap() }
    }

    /// Waits until the change has come to this step, or further.
    async fn reaches(&self, change: Change, step: Step) {
        let deadline = Instant::now() + tests::PATIENCE;
        while self.step(change).await < Some(step) {
            assert!(Instant::now() < deadline, "{change:?} does not come to {step:?}");
        }
    }

    /// How far the change has come; `None` before its first step.
    async fn step(&self, Change { from, to }: Change) -> Option<Step> {
        let [from, to] = [from, to].map(|number| (number, layout::collection(Orders::NAME, number)));
        let (found, taken, held) = tokio::join!(self.orders(), self.lease(&from.1), self.lease(&to.1));
        if found?.find(to.0).is_some_and(|it| serves(it.state)) {
            return Some(Step::Switched);
        }
        if let Some(taken) = taken.filter(|lease| lease.contains_key("reason") && lease.contains_key("holder")) {
            let checkpoints = self.views.collection::<Checkpoint>(layout::CHECKPOINTS);
            let checkpoint = checkpoints.find_one(doc! {"_id": from.1}).await.ok()??;
            let is_taken_over = checkpoint.term >= taken.get_i64("term").unwrap();
            return Some(if is_taken_over { Step::TakenOver } else { Step::Seized });
        }
        held.filter(|lease| lease.contains_key("holder")).map(|_| Step::Building)
    }

    async fn lease(&self, collection: &str) -> Option<Document> {
        self.leases.find_one(doc! {"_id": collection}).await.ok().flatten()
    }

    /// The name of the replica that has the lease of the generation.
    async fn holder(&self, number: i32) -> String {
        let collection = layout::collection(Orders::NAME, number);
        eventually("the generation is led", async || {
            let lease = self.lease(&collection).await?;
            Some(lease.get_str("holder").ok()?.split('/').next()?.to_owned())
        })
        .await
    }

    /// Waits until the new generation serves, alone, and is up to date.
    async fn ends(&self, Change { to, .. }: Change) {
        let found = eventually("the new generation serves", async || {
            self.orders().await.filter(|found| found.find(to).is_some_and(|it| serves(it.state)))
        })
        .await;
        assert_eq!(found.generations.iter().filter(|it| serves(it.state)).count(), 1, "{found:?}");
        let head = self.system.head().await;
        eventually("it goes on", async || {
            (journal::checkpoints(self.system).await.get(Orders::NAME)? >= &head).then_some(())
        })
        .await;
    }
}
