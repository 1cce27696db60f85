//! A view is changed while the system runs: replicas of a program with the next version of the view work beside those
//! that run, take their place, and give it back. No client notices.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bson::{Document, doc};
use futures_util::{TryStreamExt, future::join_all};
use serde_json::{Value, json};
use tests::{Expect, Process, Project, System, binary, eventually, http, journal, stays};
use tokio::sync::OnceCell;
use views::{
    View,
    layout::{self, Checkpoint, Generation, Generations},
    orders::Orders,
};

use crate::{
    projection::assert_views_are_journal,
    witnesses::{NEW_FIELD, Witnesses},
};

/// The version of the view `orders` in the next program.
pub const NEXT: i32 = Orders::VERSION + 1;
const LEASE: [&str; 2] = ["--lease-ms", "1000"];

/// The programs of one version.
pub struct Programs {
    projection: PathBuf,
    query: PathBuf,
}

/// Those that were built with the tests.
pub fn present() -> Programs {
    Programs { projection: binary("projection"), query: binary("query") }
}

/// Those in which the view `orders` has another version, one more field, and one more index.
pub async fn next() -> &'static Programs {
    static BUILT: OnceCell<Programs> = OnceCell::const_new();
    BUILT.get_or_init(|| async { tokio::task::spawn_blocking(build).await.unwrap() }).await
}

fn build() -> Programs {
    let versions = [Orders::VERSION, NEXT].map(|version| format!("const VERSION: i32 = {version};"));
    let indexes = "[index(group, Sort::Date), index(group, Sort::Total)]).collect()";
    let with_one_more = indexes.replace(".collect()", &format!(".chain([doc! {{ \"{NEW_FIELD}\": 1 }}]).collect()"));
    let field = "    pub refund_due: bool,\n";
    let value = "            refund_due: false,\n";
    let copy = Project::changed_copy(
        "next",
        "shared/views/src/orders.rs",
        &[
            (&versions[0], &versions[1]),
            (field, &format!("{field}    pub {NEW_FIELD}: usize,\n")),
            (value, &format!("{value}            {NEW_FIELD}: lines.len(),\n")),
            (indexes, &with_one_more),
        ],
    );
    let programs = ["test-projection-service", "test-query-service"];
    // As a part of this crate, they need what the tests need, which is built already.
    let build = ["build", "--locked", "--offline", "-p", "tests", "--bin", programs[0], "--bin", programs[1]];
    copy.succeeds("cargo", &build);
    let [projection, query] = programs.map(|program| copy.take(program));
    Programs { projection, query }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_view_is_changed_under_load_and_changed_back_and_nobody_notices() {
    let (system, old, new) = (System::new().await, present(), next().await);
    let (_command, told) = (system.command().await, Told::new(&system));
    let replicas = Replicas { system: &system };
    let old_projections = ["old-1", "old-2"].map(|name| replicas.projection(&old, name));
    let old_queries = ["old-3", "old-4"].map(|name| replicas.query(&old, name));
    replicas.rank("old-3", "live").await;
    replicas.rank("old-4", "live").await;
    let witnesses = Witnesses::new(&system);
    told.note("replicas of the present program serve");

    let (new_projections, new_queries) = told
        .while_told(witnesses.watch(async {
            more_orders_are_shown(&witnesses, [300, 0]).await;
            // They come too early, and must not answer anybody.
            let new_queries = ["new-3", "new-4"].map(|name| replicas.query(new, name));
            told.note("query replicas of the next program are started");
            for name in ["new-3", "new-4"] {
                let stats = replicas.rank(name, "none").await;
                assert_eq!((&stats["ready"], &stats["standing_by"]), (&json!(false), &json!(["orders"])), "{stats}");
            }
            stays("nobody is answered by them", 0, async || witnesses.shown()[1]).await;
            let new_projections = ["new-1", "new-2"].map(|name| replicas.projection(new, name));
            told.note("projection replicas of the next program are started");
            for name in ["new-3", "new-4"] {
                let stats = replicas.rank(name, "live").await;
                assert_eq!((&stats["ready"], &stats["standing_by"]), (&json!(true), &json!([])), "{stats}");
            }
            told.note("the next generation serves: all replicas answer");
            more_orders_are_shown(&witnesses, [50, 50]).await;
            told.note("query replicas of the present program are stopped");
            stop(old_queries).await;
            stays_shown(&witnesses, 0, 1).await;
            told.note("projection replicas of the present program are stopped");
            stop(old_projections).await;
            is_idle(&system, Orders::VERSION, true).await;
            told.note("the present generation is idle");
            more_orders_are_shown(&witnesses, [0, 50]).await;
            (new_projections, new_queries)
        }))
        .await;
    assert_next_orders_are_journal(&system).await;

    told.note("back: query replicas of the present program are started");
    let _replicas = told
        .while_told(witnesses.watch(async {
            let old_queries = ["old-5", "old-6"].map(|name| replicas.query(&old, name));
            for name in ["old-5", "old-6"] {
                let stats = replicas.rank(name, "stale").await;
                assert_eq!((&stats["ready"], &stats["standing_by"]), (&json!(true), &json!(["orders"])), "{stats}");
            }
            let before = witnesses.shown()[0];
            stays("nobody is answered by them", before, async || witnesses.shown()[0]).await;
            let old_projections = ["old-7", "old-8"].map(|name| replicas.projection(&old, name));
            told.note("projection replicas of the present program are started");
            for name in ["old-5", "old-6"] {
                replicas.rank(name, "live").await;
            }
            told.note("the present generation has caught up: all replicas answer");
            more_orders_are_shown(&witnesses, [50, 50]).await;
            told.note("the replicas of the next program are stopped");
            stop(new_queries).await;
            stays_shown(&witnesses, 1, 0).await;
            stop(new_projections).await;
            is_idle(&system, NEXT, true).await;
            told.note("the next generation is idle");
            (old_projections, old_queries)
        }))
        .await;
    let served = journal::serving(&system).await;
    assert_eq!(served["orders"], layout::collection("orders", 1), "it was not built anew");
    assert_views_are_journal(&system).await;
    println!("the slowest query took {:?}", witnesses.slowest());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_query_replica_that_is_alone_says_which_version_of_the_view_is_missing() {
    let (system, new) = (System::new().await, next().await);
    let (_command, _projection) = (system.command().await, system.start_projection(&LEASE));
    let user = system.user().await;
    journal::caught_up(&system).await;
    let (replicas, port) = (Replicas { system: &system }, http::free_address());
    let _query = replicas.start(&new.query, "query", &["--replica", "alone", "--metrics-address", &port.to_string()]);
    // The other views have the versions that are there.
    eventually("another view is read", async || {
        system.read("user.get", json!({"id": user.id}), user.position).await.ok()
    })
    .await;
    let version = format!("version {NEXT} of it, which this program reads, has not been built");
    for name in ["order.list", "order.get"] {
        let body = if name == "order.get" { json!({"id": user.id}) } else { json!({}) };
        let refused = eventually("it says why", async || {
            let answer = system.ask(&format!("qry.{name}"), body.clone(), &[]).await;
            answer.err()?.failure().cloned()
        })
        .await;
        assert_eq!((refused.status, &*refused.code), (503, "unavailable"));
        assert!(refused.message.contains(&version), "{}", refused.message);
    }
    let (status, text) = http::get(port, "/readyz").await.unwrap();
    assert_eq!(status, 503, "{text}");
    assert!(text.contains("orders") && text.contains(&version), "{text}");
    assert_eq!(http::get(port, "/healthz").await.unwrap().0, 200);

    // One that can answer makes it stand by.
    let _able = system.start_query(&["--replica", "able"]);
    eventually("it stands by", async || {
        (replicas.stats("alone").await?["standing_by"] == json!(["orders"])).then_some(())
    })
    .await;
    for _ in 0..200 {
        system.ask("qry.order.list", json!({}), &[]).await.data();
    }
}

/// Replicas in processes of their own, each with a log.
struct Replicas<'a> {
    system: &'a System,
}

impl Replicas<'_> {
    fn projection(&self, programs: &Programs, name: &str) -> Process {
        self.start(&programs.projection, "projection", &[&LEASE[..], &["--replica", name]].concat())
    }

    fn query(&self, programs: &Programs, name: &str) -> Process {
        self.start(&programs.query, "query", &["--replica", name])
    }

    fn start(&self, program: &Path, role: &str, arguments: &[&str]) -> Process {
        let log = self.system.stack.directory().join(format!("{}-{role}.log", self.system.prefix));
        self.system.process_of(program, role, arguments, &log)
    }

    /// What the replica says in `$SRV.STATS`.
    async fn stats(&self, name: &str) -> Option<Value> {
        let stats = self.system.client.nats().request(format!("$SRV.STATS.query.{name}"), "".into()).await.ok()?;
        let stats: Value = serde_json::from_slice(&stats.payload).unwrap();
        Some(stats["data"].clone())
    }

    /// Waits until a query replica has this rank for the view `orders`; returns what it says.
    async fn rank(&self, name: &str, rank: &str) -> Value {
        eventually(&format!("{name} is {rank}"), async || {
            let stats = self.stats(name).await?;
            let orders = stats["views"].as_array()?.iter().find(|view| view["view"] == "orders")?;
            (orders["rank"] == rank && stats["ready"] == json!(rank != "none")).then_some(stats.clone())
        })
        .await
    }
}

async fn stop(processes: [Process; 2]) {
    join_all(processes.map(Process::stop)).await;
}

/// Waits until so many more orders have been shown without the new field, and with it.
async fn more_orders_are_shown(witnesses: &Witnesses<'_>, more: [u64; 2]) {
    let before = witnesses.shown();
    eventually("orders are shown", async || {
        let shown = witnesses.shown();
        (0..2).all(|which| shown[which] >= before[which] + more[which]).then_some(())
    })
    .await;
}

/// Checks that no more orders are shown by replicas that were stopped, and that others go on.
async fn stays_shown(witnesses: &Witnesses<'_>, stopped: usize, others: usize) {
    let before = witnesses.shown();
    // A reply may have been on its way when its replica ended.
    let is_shown = async || witnesses.shown()[stopped] > before[stopped] + 3;
    stays("the replicas that were stopped do not answer", false, is_shown).await;
    assert!(witnesses.shown()[others] > before[others]);
}

/// The generations of the view `orders`.
async fn generations(system: &System) -> Vec<Generation> {
    let views = system.views().await.collection::<Generations>(layout::VIEWS);
    views.find_one(doc! {"_id": Orders::NAME}).await.unwrap().map(|found| found.generations).unwrap_or_default()
}

async fn is_idle(system: &System, version: i32, is_idle: bool) {
    eventually("it is noticed that nobody keeps the generation up to date", async || {
        let generations = generations(system).await;
        let generation = generations.iter().find(|it| it.version == version)?;
        (generation.idle_since.is_some() == is_idle).then_some(())
    })
    .await;
}

/// Waits until the next version's generation has caught up, and compares it with the journal: its documents are those
/// of this version, with the new field.
async fn assert_next_orders_are_journal(system: &System) {
    let number = generations(system).await.iter().find(|it| it.version == NEXT).unwrap().number;
    let (views, collection) = (system.views().await, layout::collection(Orders::NAME, number));
    let head = i64::try_from(system.head().await).unwrap();
    eventually("the next generation has caught up", async || {
        let checkpoints = views.collection::<Checkpoint>(layout::CHECKPOINTS);
        let checkpoint = checkpoints.find_one(doc! {"_id": &collection}).await.ok()??;
        (checkpoint.position >= head).then_some(())
    })
    .await;
    let documents = views.collection::<Document>(&collection);
    let indexes = documents.list_index_names().await.unwrap();
    assert!(indexes.contains(&format!("{NEW_FIELD}_1")), "{indexes:?}");
    let mut stored: Vec<Document> = documents.find(doc! {}).await.unwrap().try_collect().await.unwrap();
    for document in &mut stored {
        let lines = i64::try_from(document.get_array("lines").unwrap().len()).unwrap();
        assert_eq!(document.remove(NEW_FIELD), Some(lines.into()), "{document}");
    }
    let id = |document: &Document| document.get_str("_id").unwrap().to_owned();
    stored.sort_by_key(id);
    let expected = journal::fold(&journal::events(system).await);
    let expected: Vec<_> =
        expected.into_iter().filter(|((view, _), _)| *view == Orders::NAME).map(|(_, document)| document).collect();
    assert_eq!(stored.len(), expected.len());
    for (stored, expected) in stored.iter().zip(&expected) {
        assert_eq!(stored, expected);
    }
}

/// Prints what happens, with the state of the generations each second, for whoever reads a failure.
struct Told<'a> {
    system: &'a System,
    began: Instant,
}

impl<'a> Told<'a> {
    fn new(system: &'a System) -> Self {
        Self { system, began: Instant::now() }
    }

    fn note(&self, what: &str) {
        println!("{:>5.1} s  {what}", self.began.elapsed().as_secs_f64());
    }

    async fn while_told<T>(&self, work: impl Future<Output = T>) -> T {
        let telling = async {
            loop {
                self.tell().await;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        };
        tokio::select! {
            done = work => done,
            () = telling => unreachable!("it goes on for ever"),
        }
    }

    async fn tell(&self) {
        let checkpoints = self.system.views().await.collection::<Checkpoint>(layout::CHECKPOINTS);
        let Ok(checkpoints) = checkpoints.find(doc! {}).await else { return };
        let Ok(checkpoints): Result<Vec<Checkpoint>, _> = checkpoints.try_collect().await else { return };
        let told =
            generations(self.system).await.into_iter().map(|Generation { number, state, idle_since, .. }| {
                let collection = layout::collection(Orders::NAME, number);
                let position = checkpoints.iter().find(|it| it.collection == collection).map(|it| it.position);
                let idle = if idle_since.is_some() { ", idle" } else { "" };
                format!("{collection} {state:?}{idle} at {}", position.unwrap_or_default())
            });
        let stats = self.system.all_stats().await;
        let serving = stats.iter().filter(|it| {
            it["name"] == "query" && !it["data"]["standing_by"].as_array().unwrap().contains(&json!(Orders::NAME))
        });
        let serving: Vec<_> = serving.map(|it| it["id"].as_str().unwrap().to_owned()).collect();
        let head = self.system.head().await;
        self.note(&format!("head {head}; {}; answered by {}", told.collect::<Vec<_>>().join("; "), serving.join(" ")));
    }
}
