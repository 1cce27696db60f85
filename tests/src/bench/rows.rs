//! The rows: what is measured of ours, and against what.

use std::{sync::Arc, time::Duration};

use async_nats::Message;
use serde_json::json;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{
    bare::{BATCH, Mongo, Postgres, Stream, UPSERTS},
    echo::Echo,
    installation::{Installation, Orders, ask, get_at, search_text},
    load::{Ask, Measured, Pace, Traffic, in_flight},
    report::{Reach, Row, Turn},
    sustained::{SUSTAINED, Sustained, sustained},
};
use crate::Stack;

/// Turns of each side.
pub const TURNS: usize = 3;
/// Of those that take a minute.
const LONG_TURNS: usize = 2;
/// How long a turn is measured, after a warm-up of a third of it.
const TURN: Duration = Duration::from_secs(4);
pub const PRODUCTS: usize = 20_000;
/// Orders of a list.
const PAGE: usize = 20;
/// Orders that the queries are asked of.
const QUERIED: usize = 100_000;
/// Orders that the views are rebuilt from, at least.
const REBUILT: usize = 300_000;
/// How long the services are watched when there is nothing to do.
const IDLE: Duration = Duration::from_secs(20);
/// The core and the memory, in MB, that a service may have when there is nothing to do.
const IDLE_CORE: f64 = 0.005;
const IDLE_MEMORY: f64 = 40.0;

pub struct Bench {
    installation: Installation,
    parts: Option<Parts>,
}

/// The bare parts, once there are orders to be like.
struct Parts {
    alone: Postgres,
    pooled: Postgres,
    mongo: Mongo,
}

impl Bench {
    pub async fn start(stack: &Arc<Stack>) -> Self {
        Self { installation: Installation::start(stack, PRODUCTS).await, parts: None }
    }

    pub async fn measure(&mut self, row: &str) -> Vec<Row> {
        let before = match row {
            "rebuild" => REBUILT,
            "order_create_1" | "visible" | "sustained" => 1_000,
            _ => QUERIED,
        };
        self.installation.fill(before).await;
        if self.parts.is_none() || self.installation.projection.is_none() && !is_of_writes(row) {
            self.installation.start_projection();
            self.installation.caught_up().await;
        }
        if self.parts.is_none() {
            self.parts = Some(Parts::new(&self.installation).await);
        }
        if is_of_writes(row) {
            self.installation.stop_projection().await;
        } else {
            self.installation.caught_up().await;
        }
        match row {
            "order_create_1" => self.order_create_1().await,
            "visible" => self.visible().await,
            "sustained" => vec![self.sustained().await],
            "order_get_64" => vec![self.order_get_64().await],
            "order_get_vs_find" => vec![self.order_get_vs_find().await],
            "order_list_64" => vec![self.order_list_64().await],
            "search_64" => vec![self.search_64().await],
            "idle" => self.idle().await,
            "order_create_256" => vec![self.order_create_256().await],
            "order_create_vs_tx" => vec![self.order_create_vs_tx().await],
            "replicas" => self.replicas().await,
            "rebuild" => vec![self.rebuild().await],
            other => panic!("{other} is measured elsewhere"),
        }
    }

    fn parts(&self) -> &Parts {
        self.parts.as_ref().expect("they were made before the first row")
    }

    /// The latency of one client's order, to that of one transaction: of the write side alone, as the other rows of
    /// orders that are created, then while the views follow.
    async fn order_create_1(&mut self) -> Vec<Row> {
        let alone = self.create_one("order_create_1", Reach::AtMost(1.5)).await;
        self.installation.start_projection();
        self.installation.caught_up().await;
        vec![alone, self.create_one("order_create_1_followed", Reach::Open).await]
    }

    async fn create_one(&mut self, name: &str, reach: Reach) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = create(&mut self.installation, 1).await;
            if self.installation.projection.is_some() {
                self.installation.caught_up().await;
            }
            let bare = self.parts().alone.clone();
            let bare = in_flight(&self.installation.machine(), 1, TURN, move || one(bare.clone())).await;
            turns.push((Turn::latency(ours, 0.5), Turn::latency(bare, 0.5)));
        }
        Row::of(name, "ms", reach, turns)
    }

    /// Orders at 256 in flight, to the same rows in batches of 256.
    async fn order_create_256(&mut self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = create(&mut self.installation, 256).await;
            let bare = self.parts().alone.clone();
            let bare = in_flight(&self.installation.machine(), 1, TURN, move || {
                let bare = bare.clone();
                async move { bare.batch().await }
            })
            .await;
            turns.push((Turn::rate(ours, 1), Turn::rate(bare, BATCH)));
        }
        Row::of("order_create_256", "orders/s", Reach::AtLeast(0.6), turns)
    }

    /// Orders at 256 in flight, to one transaction per order.
    async fn order_create_vs_tx(&mut self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = create(&mut self.installation, 256).await;
            let bare = self.parts().pooled.clone();
            let bare = in_flight(&self.installation.machine(), 64, TURN, move || one(bare.clone())).await;
            turns.push((Turn::rate(ours, 1), Turn::rate(bare, 1)));
        }
        Row::of("order_create_vs_tx", "orders/s", Reach::AtLeast(5.0), turns)
    }

    /// From an order's reply until a query shows it, at 1,000 orders/s, to one step of each server after the other.
    async fn visible(&mut self) -> Vec<Row> {
        let echo = Echo::start(&self.installation, 60).await;
        let (mut medians, mut tails) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            let ours = visible(&mut self.installation).await;
            self.installation.caught_up().await;
            let Parts { alone, mongo, .. } = self.parts();
            let (alone, mongo, echo) = (alone.clone(), mongo.clone(), echo.clone_client());
            let bare = in_flight(&self.installation.machine(), 1, TURN, move || {
                let (alone, mongo, echo) = (alone.clone(), mongo.clone(), echo.clone());
                async move {
                    echo.request().await;
                    alone.order().await;
                    mongo.insert().await;
                }
            })
            .await;
            let (median, tail) = (ours.quantile(0.5), ours.quantile(0.99));
            let unloaded = bare.quantile(0.5);
            medians.push((
                Turn { figure: median, measured: ours, per_operation: 1, note: String::new() },
                Turn::latency(bare, 0.5),
            ));
            tails.push((tail, unloaded));
        }
        tails.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
        let (tail, unloaded) = tails[tails.len() / 2];
        vec![
            Row::of("visible", "ms", Reach::AtMost(3.0), medians),
            Row::plain("visible_p99", "ms", Reach::AtMost(15.0), tail, unloaded),
        ]
    }

    /// The highest rate of orders that all views follow, 99 of 100 moments within a second, to the same writes to all three servers at once.
    async fn sustained(&mut self) -> Row {
        let stream = Arc::new(Stream::new(&self.installation.system, &self.parts().alone).await);
        let mut turns = Vec::new();
        for _ in 0..LONG_TURNS {
            let Sustained { measured: ours, behind } = sustained(&mut self.installation).await;
            self.installation.caught_up().await;
            let Parts { alone, mongo, .. } = self.parts();
            let (alone, mongo, stream) = (alone.clone(), mongo.clone(), Arc::clone(&stream));
            let bare = in_flight(&self.installation.machine(), 1, SUSTAINED / 3, move || {
                let (alone, mongo, stream) = (alone.clone(), mongo.clone(), Arc::clone(&stream));
                async move {
                    let rows = tokio::spawn(async move { alone.batch().await });
                    let messages = tokio::spawn(async move { stream.batch().await });
                    mongo.batch().await;
                    rows.await.expect("no panic");
                    messages.await.expect("no panic");
                }
            })
            .await;
            turns.push((Turn::rate(ours, 1).noting(behind), Turn::rate(bare, BATCH)));
        }
        Row::of("sustained", "orders/s", Reach::AtLeast(0.6), turns)
    }

    /// Gets at 64 in flight, to an echo of as many bytes.
    async fn order_get_64(&mut self) -> Row {
        let bytes = self.installation.order_bytes().await;
        let echo = Echo::start(&self.installation, bytes).await;
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = get(&mut self.installation).await;
            let machine = self.installation.machine();
            let id = self.installation.some_order();
            let mut traffic = || ask(echo.subject.clone(), &json!({"id": id}));
            let (bare, _) = self.installation.asker.ask(&machine, Pace::InFlight(64), TURN, &mut traffic).await;
            turns.push((Turn::rate(ours, 1), Turn::rate(bare, 1)));
        }
        Row::of("order_get_64", "gets/s", Reach::AtLeast(0.5), turns)
    }

    /// The same, to the driver's `find_one`.
    async fn order_get_vs_find(&mut self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = get(&mut self.installation).await;
            let orders = self.parts().mongo.orders_collection();
            let ids: Arc<[Uuid]> = self.installation.order_ids().into();
            let bare = in_flight(&self.installation.machine(), 64, TURN, move || {
                let (orders, id) = (orders.clone(), ids[super::load::random(ids.len())].to_string());
                async move {
                    let found = orders.find_one(bson::doc! { "_id": id }).await.expect("MongoDB answers");
                    assert!(found.is_some(), "the order is there");
                }
            })
            .await;
            turns.push((Turn::rate(ours, 1), Turn::rate(bare, 1)));
        }
        Row::of("order_get_vs_find", "gets/s", Reach::AtLeast(3.0), turns)
    }

    /// Lists of a random user's 20 newest orders, to the driver's `find` of such a page.
    async fn order_list_64(&mut self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = list(&mut self.installation, PAGE).await;
            let users: Arc<[Uuid]> = self.installation.users().into();
            let body = move || json!({"user": users[super::load::random(users.len())], "limit": PAGE}).to_string();
            let bare = self.pages("orders@1", "order.list", body).await;
            turns.push((Turn::rate(ours, 1), Turn::rate(bare, 1)));
        }
        Row::of("order_list_64", "lists/s", Reach::AtLeast(0.7), turns)
    }

    /// Searches for a word and the beginning of another, to the driver's same `find`.
    async fn search_64(&mut self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = search(&mut self.installation).await;
            let body = || json!({"text": search_text()}).to_string();
            let bare = self.pages("products@1", "product.search", body).await;
            turns.push((Turn::rate(ours, 1), Turn::rate(bare, 1)));
        }
        Row::of("search_64", "searches/s", Reach::AtLeast(0.7), turns)
    }

    /// What a query's plan reads, by the driver alone.
    async fn pages(
        &self,
        collection: &'static str,
        query: &str,
        body: impl Fn() -> String + Clone + Send + 'static,
    ) -> Measured {
        let queries = views::queries();
        let found = queries.iter().find(|(_, it)| format!("{}.{}", it.noun, it.verb) == query);
        let plan = found.expect("there is such a query").1.plan;
        let mongo = self.parts().mongo.clone();
        in_flight(&self.installation.machine(), 64, TURN, move || {
            let Ok(views::Plan::List(list)) = plan(body().as_bytes()) else { panic!("a list") };
            let mongo = mongo.clone();
            async move {
                mongo.page(collection, list).await;
            }
        })
        .await
    }

    /// Processor time and memory of the services when nothing is asked and all views have caught up.
    async fn idle(&mut self) -> Vec<Row> {
        let machine = self.installation.machine();
        // What was asked last may still be logged, checkpointed, given back.
        sleep(Duration::from_secs(3)).await;
        let before = machine.cpu();
        sleep(IDLE).await;
        let cpu = super::cost::between(&before, &machine.cpu());
        let memory = self.installation.memory();
        let mut rows = Vec::new();
        for role in ["command", "projection", "query"] {
            let core = cpu[role] / IDLE.as_secs_f64();
            rows.push(Row::plain(&format!("idle_{role}"), "cores", Reach::AtMost(IDLE_CORE), core, 1.0));
            let name = format!("idle_memory_{role}");
            rows.push(Row::plain(&name, "MB", Reach::AtMost(1.0), memory[role], IDLE_MEMORY));
        }
        rows
    }

    /// More replicas, to one.
    async fn replicas(&mut self) -> Vec<Row> {
        let mut rows = Vec::new();
        for replicas in [2, 4] {
            let mut turns = Vec::new();
            for _ in 0..TURNS {
                let one = get(&mut self.installation).await;
                self.installation.set_query_replicas(replicas).await;
                let more = get(&mut self.installation).await;
                self.installation.set_query_replicas(1).await;
                turns.push((Turn::rate(more, 1), Turn::rate(one, 1)));
            }
            rows.push(Row::of(&format!("replicas_get_{replicas}"), "gets/s", Reach::Open, turns));
        }
        self.installation.stop_projection().await;
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let one = create(&mut self.installation, 256).await;
            self.installation.set_command_replicas(2).await;
            let two = create(&mut self.installation, 256).await;
            self.installation.set_command_replicas(1).await;
            turns.push((Turn::rate(two, 1), Turn::rate(one, 1)));
        }
        rows.push(Row::of("replicas_create_2", "orders/s", Reach::Open, turns));
        rows
    }

    /// All views from an empty database, to upserts of orders.
    async fn rebuild(&mut self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..LONG_TURNS {
            let ours = rebuild(&mut self.installation).await;
            let mongo = self.parts().mongo.clone();
            let bare = in_flight(&self.installation.machine(), 2, 3 * TURN, move || {
                let mongo = mongo.clone();
                async move { mongo.upserts().await }
            })
            .await;
            turns.push((ours, Turn::rate(bare, UPSERTS)));
        }
        Row::of("rebuild", "events/s", Reach::AtLeast(1.5), turns)
    }
}

impl Parts {
    async fn new(installation: &Installation) -> Self {
        let (system, users, products) = (&installation.system, installation.users(), installation.ordered_products());
        Self {
            alone: Postgres::new(system, 1, users, products).await,
            pooled: Postgres::new(system, 16, users, products).await,
            mongo: Mongo::new(system).await,
        }
    }
}

/// The rows of the write side alone, for which the projection service does not run.
fn is_of_writes(row: &str) -> bool {
    matches!(row, "order_create_1" | "order_create_256" | "order_create_vs_tx")
}

/// A transaction of one order.
async fn one(bare: Postgres) {
    bare.order().await;
}

pub async fn create(installation: &mut Installation, in_flight: usize) -> Measured {
    let machine = installation.machine();
    let (asker, mut orders) = installation.orders();
    asker.ask(&machine, Pace::InFlight(in_flight), TURN, &mut orders).await.0
}

pub async fn get(installation: &mut Installation) -> Measured {
    let machine = installation.machine();
    let (asker, mut traffic) = installation.order_get();
    asker.ask(&machine, Pace::InFlight(64), TURN, &mut traffic).await.0
}

pub async fn list(installation: &mut Installation, orders: usize) -> Measured {
    let machine = installation.machine();
    let (asker, mut traffic) = installation.order_list(orders);
    asker.ask(&machine, Pace::InFlight(64), TURN, &mut traffic).await.0
}

pub async fn search(installation: &mut Installation) -> Measured {
    let machine = installation.machine();
    let (asker, mut traffic) = installation.product_search();
    asker.ask(&machine, Pace::InFlight(64), TURN, &mut traffic).await.0
}

/// Orders of which one in ten is asked for as soon as it was acknowledged.
struct Visible<'a> {
    orders: Orders<'a>,
    get: String,
    acknowledged: usize,
}

impl Traffic for Visible<'_> {
    fn next(&mut self) -> Option<Ask> {
        self.orders.next()
    }

    fn then(&mut self, reply: &Message) -> Option<Ask> {
        self.acknowledged += 1;
        let accepted: wire::Accepted = serde_json::from_slice(&reply.payload).expect("a command's reply");
        self.acknowledged
            .is_multiple_of(10)
            .then(|| get_at(self.get.clone(), &accepted.id.to_string(), &accepted.position.to_string()))
    }
}

pub async fn visible(installation: &mut Installation) -> Measured {
    let machine = installation.machine();
    let get = installation.system.subjects.query("order", "get");
    let (asker, orders) = installation.orders();
    let mut traffic = Visible { orders, get, acknowledged: 0 };
    let (asked, mut followed) = asker.ask(&machine, Pace::PerSecond(1_000.0), 2 * TURN, &mut traffic).await;
    followed.cpu = asked.cpu;
    followed
}

pub async fn rebuild(installation: &mut Installation) -> Turn {
    installation.stop_projection().await;
    installation.system.views().await.drop().await.expect("the database can be dropped");
    let events = installation.system.head().await;
    let began = Instant::now();
    installation.start_projection();
    let machine = installation.machine();
    let before = machine.cpu();
    installation.caught_up().await;
    let elapsed = began.elapsed();
    let cpu = super::cost::between(&before, &machine.cpu());
    Turn {
        figure: events as f64 / elapsed.as_secs_f64(),
        measured: Measured::counted(events as usize, elapsed, cpu),
        per_operation: 1,
        note: String::new(),
    }
}
