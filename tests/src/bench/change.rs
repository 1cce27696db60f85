//! What building a view anew costs those who use the shop meanwhile: how much later they see what they have ordered
//! while the views are being built, and how long anybody waits while a new generation takes the place of the one
//! before.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    installation::{Installation, Orders},
    load::{Measured, Pace, Request, Workload},
    report::{Row, Sample, Target},
    rows::visible,
};
use crate::System;

const ROUNDS: usize = 3;
/// Orders per second while a generation takes the place of another.
const ORDERS: f64 = 300.0;
/// How long the queries are watched without a switch.
const QUIET: Duration = Duration::from_secs(10);
/// How long a build may take.
const BUILD_TIMEOUT: Duration = Duration::from_secs(900);

/// The time from an order's reply until a query shows it, at 1,000 orders/s, while all views are being built anew,
/// compared to the same without.
pub async fn rebuild_beside(installation: &mut Installation) -> Vec<Row> {
    let (mut medians, mut tails) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let alone = visible(installation).await;
        installation.caught_up().await;
        let before = generations(&installation.system).await;
        for view in views::names() {
            operate(&installation.system, "view.rebuild", json!({"view": view})).await;
        }
        let began = Instant::now();
        let beside = visible(installation).await;
        let now = generations(&installation.system).await;
        assert_eq!(now, before, "the views must still be being built, or there are too few orders");
        let rate = built(&installation.system).await / began.elapsed().as_secs_f64();
        replaced(&installation.system, &before).await;
        installation.caught_up().await;
        tails.push((beside.quantile(0.99), alone.quantile(0.99)));
        let note = format!("{rate:.0} events/s built in each view meanwhile");
        medians.push((Sample { note, ..Sample::latency(beside, 0.5) }, Sample::latency(alone, 0.5)));
    }
    tails.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let (beside, alone) = tails[tails.len() / 2];
    vec![
        Row::of("rebuild_beside", "ms", Target::AtMost(2.0), medians),
        Row::plain("rebuild_beside_p99", "ms", Target::AtMost(2.0), beside, alone),
    ]
}

/// The longest time that a query waited for what was acknowledged before it was asked, while new generations took the
/// place of those before, compared to the same without.
pub async fn switch(installation: &mut Installation) -> Row {
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let bare = watched(installation, async |_| sleep(QUIET).await).await;
        installation.caught_up().await;
        let ours = watched(installation, async |system| {
            let before = generations(system).await;
            for view in views::names() {
                operate(system, "view.rebuild", json!({"view": view})).await;
            }
            replaced(system, &before).await;
        })
        .await;
        rounds.push((Sample::latency(ours, 1.0), Sample::latency(bare, 1.0)));
        installation.caught_up().await;
    }
    Row::of("switch", "ms", Target::Open, rounds)
}

/// Measures queries for what was just acknowledged, one after the other, while orders come and until `work` is done.
async fn watched(installation: &mut Installation, work: impl AsyncFnOnce(&System)) -> Measured {
    let system = std::sync::Arc::clone(&installation.system);
    let product = system.product(0).await.id;
    let machine = installation.machine();
    let (generator, orders) = installation.orders();
    let (over, ended) = watch::channel(false);
    let working = async {
        work(&system).await;
        let _ = over.send(true);
    };
    let watching = async {
        let (mut waits, began) = (Vec::new(), Instant::now());
        while !*ended.borrow() {
            let restocked = system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
            let asked = Instant::now();
            let shown = system.read("product.get", json!({"id": product}), restocked.position).await;
            assert!(shown.is_ok(), "{shown:?}");
            waits.push(asked.elapsed());
        }
        Measured::of(waits, began.elapsed())
    };
    // The orders end when nobody watches any more.
    let ordering = async {
        let mut orders = Until { orders, ended: ended.clone() };
        generator.run(&machine, Pace::PerSecond(ORDERS), BUILD_TIMEOUT, &mut orders).await
    };
    let (measured, ..) = tokio::join!(watching, working, ordering);
    measured
}

/// Orders, until somebody says that there are enough.
struct Until<'a> {
    orders: Orders<'a>,
    ended: watch::Receiver<bool>,
}

impl Workload for Until<'_> {
    fn next(&mut self) -> Option<Request> {
        if *self.ended.borrow() { None } else { self.orders.next() }
    }
}

async fn operate(system: &System, name: &str, body: Value) -> Value {
    system.operate(name, body).await.expect("the operation is carried out").body
}

/// The generation of each view that serves.
async fn generations(system: &System) -> Vec<Value> {
    let listed = operate(system, "view.list", json!({})).await;
    listed["views"].as_array().expect("a list").iter().map(|view| view["generation"].clone()).collect()
}

/// Up to which position the slowest of the new generations is built.
async fn built(system: &System) -> f64 {
    let listed = operate(system, "view.list", json!({})).await;
    let generations = listed["views"].as_array().expect("a list").iter().flat_map(|view| {
        view["generations"].as_array().expect("a list").iter().filter(|generation| generation["state"] == "building")
    });
    generations.filter_map(|generation| generation["position"].as_f64()).fold(f64::MAX, f64::min)
}

/// Waits until other generations serve than before.
async fn replaced(system: &System, before: &[Value]) {
    let replacing = async {
        while generations(system).await.iter().zip(before).any(|(now, before)| now == before) {
            sleep(Duration::from_millis(200)).await;
        }
    };
    timeout(BUILD_TIMEOUT, replacing).await.expect("the views are built in time");
}
