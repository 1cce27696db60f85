//! The rows: what is measured, and what it is compared to.

use std::{sync::Arc, time::Duration};

use async_nats::Message;
use serde_json::json;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{
    bare::{BATCH, Mongo, Postgres, Stream, UPSERTS},
    change,
    echo::Echo,
    installation::{Installation, Orders, get_at, request, search_text},
    load::{Measured, Pace, Request, Workload, in_flight},
    report::{Row, Sample, Target},
    sustained::{SUSTAINED, Sustained, sustained},
};
use crate::Stack;

/// Rounds in which both sides are measured.
pub const ROUNDS: usize = 3;
/// Rounds of the row whose sides differ least.
const SCRAPED_ROUNDS: usize = 8;
/// Rounds of the rows that take minutes.
const LONG_ROUNDS: usize = 2;
/// How long each side is measured in a round, after a warm-up of a third of that.
const SAMPLE_TIME: Duration = Duration::from_secs(4);
pub const PRODUCTS: usize = 20_000;
/// Orders in a list.
const PAGE: usize = 20;
/// Orders that the views hold while queries are measured.
const QUERIED: usize = 100_000;
/// The least number of orders from which the views are rebuilt.
const REBUILT: usize = 300_000;
/// How long the idle services are watched.
const IDLE: Duration = Duration::from_secs(20);
/// The share of a core and the memory in MB that an idle service may use.
const IDLE_CORE: f64 = 0.005;
const IDLE_MEMORY: f64 = 40.0;

pub struct Bench {
    installation: Installation,
    parts: Option<Parts>,
}

/// The bare parts. They are made once there are orders, which they copy.
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
        let orders = match row {
            "rebuild" | "rebuild_beside" => REBUILT,
            "order_create_1" | "visible" | "sustained" => 1_000,
            _ => QUERIED,
        };
        self.installation.fill(orders).await;
        if self.parts.is_none() || self.installation.projection.is_none() && !is_write_side(row) {
            self.installation.start_projection();
            self.installation.caught_up().await;
        }
        if self.parts.is_none() {
            self.parts = Some(Parts::new(&self.installation).await);
        }
        if is_write_side(row) {
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
            "scraped" => self.scraped().await,
            "rebuild" => vec![self.rebuild().await],
            "rebuild_beside" => change::rebuild_beside(&mut self.installation).await,
            "switch" => vec![change::switch(&mut self.installation).await],
            other => panic!("{other} is measured elsewhere"),
        }
    }

    fn parts(&self) -> &Parts {
        self.parts.as_ref().expect("the parts are made before the first row")
    }

    /// The latency of one client's order, compared to one transaction: first with the write side alone, as in the other
    /// rows that create orders, then with the projection running.
    async fn order_create_1(&mut self) -> Vec<Row> {
        let alone = self.create_one("order_create_1", Target::AtMost(1.5)).await;
        self.installation.start_projection();
        self.installation.caught_up().await;
        vec![alone, self.create_one("order_create_1_followed", Target::Open).await]
    }

    async fn create_one(&mut self, name: &str, target: Target) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = create(&mut self.installation, 1).await;
            if self.installation.projection.is_some() {
                self.installation.caught_up().await;
            }
            let bare = self.parts().alone.clone();
            let bare = in_flight(&self.installation.machine(), 1, SAMPLE_TIME, move || one_order(bare.clone())).await;
            rounds.push((Sample::latency(ours, 0.5), Sample::latency(bare, 0.5)));
        }
        Row::of(name, "ms", target, rounds)
    }

    /// Orders with 256 in flight, compared to the same rows in batches of 256.
    async fn order_create_256(&mut self) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = create(&mut self.installation, 256).await;
            let bare = self.parts().alone.clone();
            let bare = in_flight(&self.installation.machine(), 1, SAMPLE_TIME, move || {
                let bare = bare.clone();
                async move { bare.batch().await }
            })
            .await;
            rounds.push((Sample::rate(ours, 1), Sample::rate(bare, BATCH)));
        }
        Row::of("order_create_256", "orders/s", Target::AtLeast(0.6), rounds)
    }

    /// Orders with 256 in flight, compared to one transaction per order.
    async fn order_create_vs_tx(&mut self) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = create(&mut self.installation, 256).await;
            let bare = self.parts().pooled.clone();
            let bare = in_flight(&self.installation.machine(), 64, SAMPLE_TIME, move || one_order(bare.clone())).await;
            rounds.push((Sample::rate(ours, 1), Sample::rate(bare, 1)));
        }
        Row::of("order_create_vs_tx", "orders/s", Target::AtLeast(5.0), rounds)
    }

    /// The time from an order's reply until a query shows it, at 1,000 orders/s, compared to one step of each server in
    /// turn.
    async fn visible(&mut self) -> Vec<Row> {
        let echo = Echo::start(&self.installation, 60).await;
        let (mut medians, mut tails) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let ours = visible(&mut self.installation).await;
            self.installation.caught_up().await;
            let Parts { alone, mongo, .. } = self.parts();
            let (alone, mongo, echo) = (alone.clone(), mongo.clone(), echo.clone_client());
            let bare = in_flight(&self.installation.machine(), 1, SAMPLE_TIME, move || {
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
                Sample { figure: median, measured: ours, per_operation: 1, note: String::new() },
                Sample::latency(bare, 0.5),
            ));
            tails.push((tail, unloaded));
        }
        tails.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
        let (tail, unloaded) = tails[tails.len() / 2];
        vec![
            Row::of("visible", "ms", Target::AtMost(3.0), medians),
            Row::plain("visible_p99", "ms", Target::AtMost(15.0), tail, unloaded),
        ]
    }

    /// The highest rate of orders that all views sustain, compared to the same writes to all three servers at once.
    async fn sustained(&mut self) -> Row {
        let stream = Arc::new(Stream::new(&self.installation.system, &self.parts().alone).await);
        let mut rounds = Vec::new();
        for _ in 0..LONG_ROUNDS {
            let Sustained { measured: ours, lag } = sustained(&mut self.installation).await;
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
            rounds.push((Sample::rate(ours, 1).noting(lag), Sample::rate(bare, BATCH)));
        }
        Row::of("sustained", "orders/s", Target::AtLeast(0.6), rounds)
    }

    /// Gets with 64 in flight, compared to an echo of as many bytes.
    async fn order_get_64(&mut self) -> Row {
        let bytes = self.installation.order_bytes().await;
        let echo = Echo::start(&self.installation, bytes).await;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = get(&mut self.installation).await;
            let machine = self.installation.machine();
            let id = self.installation.some_order();
            let mut workload = || request(echo.subject.clone(), &json!({"id": id}));
            let (bare, _) =
                self.installation.generator.run(&machine, Pace::InFlight(64), SAMPLE_TIME, &mut workload).await;
            rounds.push((Sample::rate(ours, 1), Sample::rate(bare, 1)));
        }
        Row::of("order_get_64", "gets/s", Target::AtLeast(0.5), rounds)
    }

    /// The same, compared to the driver's `find_one`.
    async fn order_get_vs_find(&mut self) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = get(&mut self.installation).await;
            let orders = self.parts().mongo.orders_collection();
            let ids: Arc<[Uuid]> = self.installation.order_ids().into();
            let bare = in_flight(&self.installation.machine(), 64, SAMPLE_TIME, move || {
                let (orders, id) = (orders.clone(), ids[super::load::random(ids.len())].to_string());
                async move {
                    let found = orders.find_one(bson::doc! { "_id": id }).await.expect("MongoDB answers");
                    assert!(found.is_some(), "the order is there");
                }
            })
            .await;
            rounds.push((Sample::rate(ours, 1), Sample::rate(bare, 1)));
        }
        Row::of("order_get_vs_find", "gets/s", Target::AtLeast(3.0), rounds)
    }

    /// Lists of a random user's 20 newest orders, compared to the driver's `find` of such a page.
    async fn order_list_64(&mut self) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = list(&mut self.installation, PAGE).await;
            let users: Arc<[Uuid]> = self.installation.users().into();
            let body = move || json!({"user": users[super::load::random(users.len())], "limit": PAGE}).to_string();
            let bare = self.pages("orders", "order.list", body).await;
            rounds.push((Sample::rate(ours, 1), Sample::rate(bare, 1)));
        }
        Row::of("order_list_64", "lists/s", Target::AtLeast(0.7), rounds)
    }

    /// Searches for a word and the beginning of another, compared to the same `find` by the driver.
    async fn search_64(&mut self) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let ours = search(&mut self.installation).await;
            let body = || json!({"text": search_text()}).to_string();
            let bare = self.pages("products", "product.search", body).await;
            rounds.push((Sample::rate(ours, 1), Sample::rate(bare, 1)));
        }
        Row::of("search_64", "searches/s", Target::AtLeast(0.7), rounds)
    }

    /// Reads what the plans of a query read, with the driver alone.
    async fn pages(&self, view: &str, query: &str, body: impl Fn() -> String + Clone + Send + 'static) -> Measured {
        let queries = views::queries();
        let found = queries.iter().find(|(_, it)| format!("{}.{}", it.noun, it.verb) == query);
        let plan = found.expect("there is such a query").1.plan;
        let mongo = self.parts().mongo.clone();
        let collection: Arc<str> = crate::journal::serving(&self.installation.system).await[view].as_str().into();
        in_flight(&self.installation.machine(), 64, SAMPLE_TIME, move || {
            let Ok(views::Plan::List(list)) = plan(body().as_bytes()) else { panic!("a list") };
            let (mongo, collection) = (mongo.clone(), Arc::clone(&collection));
            async move {
                mongo.page(&collection, list).await;
            }
        })
        .await
    }

    /// The processor time and the memory of the services without requests, when all views have caught up.
    async fn idle(&mut self) -> Vec<Row> {
        let machine = self.installation.machine();
        // The servers and services may still be finishing work, and giving memory back.
        sleep(Duration::from_secs(3)).await;
        let before = machine.cpu();
        sleep(IDLE).await;
        let cpu = super::cost::between(&before, &machine.cpu());
        let memory = self.installation.memory();
        let mut rows = Vec::new();
        for role in ["command", "projection", "query"] {
            let core = cpu[role] / IDLE.as_secs_f64();
            rows.push(Row::plain(&format!("idle_{role}"), "cores", Target::AtMost(IDLE_CORE), core, 1.0));
            let name = format!("idle_memory_{role}");
            rows.push(Row::plain(&name, "MB", Target::AtMost(1.0), memory[role], IDLE_MEMORY));
        }
        rows
    }

    /// Gets and orders while the metrics are being asked for, compared to the same without.
    async fn scraped(&mut self) -> Vec<Row> {
        let gets = self.scraped_and_not(async |installation| Sample::rate(get(installation).await, 1)).await;
        self.installation.stop_projection().await;
        let orders = self.scraped_and_not(async |installation| Sample::rate(create(installation, 256).await, 1)).await;
        let target = Target::AtLeast(0.97);
        vec![
            Row::of("scraped_get_64", "gets/s", target, gets),
            Row::of("scraped_create_256", "orders/s", target, orders),
        ]
    }

    /// Measures with and without scraping, in turns. Which comes first changes, as each measurement wears on the next.
    async fn scraped_and_not(
        &mut self,
        mut measure: impl AsyncFnMut(&mut Installation) -> Sample,
    ) -> Vec<(Sample, Sample)> {
        let mut rounds = Vec::new();
        for round in 0..SCRAPED_ROUNDS {
            let mut both = Vec::new();
            for is_scraped in [round % 2 == 0, round % 2 == 1] {
                let scraping = is_scraped.then(|| self.installation.scrape());
                both.push((is_scraped, measure(&mut self.installation).await));
                drop(scraping);
            }
            both.sort_by_key(|(is_scraped, _)| !is_scraped);
            let mut both = both.into_iter().map(|(_, sample)| sample);
            rounds.extend(both.next().zip(both.next()));
        }
        rounds
    }

    /// Several replicas, compared to one.
    async fn replicas(&mut self) -> Vec<Row> {
        let mut rows = Vec::new();
        for replicas in [2, 4] {
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                let one = get(&mut self.installation).await;
                self.installation.set_query_replicas(replicas).await;
                let more = get(&mut self.installation).await;
                self.installation.set_query_replicas(1).await;
                rounds.push((Sample::rate(more, 1), Sample::rate(one, 1)));
            }
            rows.push(Row::of(&format!("replicas_get_{replicas}"), "gets/s", Target::Open, rounds));
        }
        self.installation.stop_projection().await;
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let one = create(&mut self.installation, 256).await;
            self.installation.set_command_replicas(2).await;
            let two = create(&mut self.installation, 256).await;
            self.installation.set_command_replicas(1).await;
            rounds.push((Sample::rate(two, 1), Sample::rate(one, 1)));
        }
        rows.push(Row::of("replicas_create_2", "orders/s", Target::Open, rounds));
        rows
    }

    /// Rebuilding all views in an empty database, compared to upserts of orders.
    async fn rebuild(&mut self) -> Row {
        let mut rounds = Vec::new();
        for _ in 0..LONG_ROUNDS {
            let ours = rebuild(&mut self.installation).await;
            let mongo = self.parts().mongo.clone();
            let bare = in_flight(&self.installation.machine(), 2, 3 * SAMPLE_TIME, move || {
                let mongo = mongo.clone();
                async move { mongo.upserts().await }
            })
            .await;
            rounds.push((ours, Sample::rate(bare, UPSERTS)));
        }
        Row::of("rebuild", "events/s", Target::AtLeast(1.5), rounds)
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

/// Whether the row measures the write side alone, without the projection service.
fn is_write_side(row: &str) -> bool {
    matches!(row, "order_create_1" | "order_create_256" | "order_create_vs_tx")
}

/// Writes one order in a transaction.
async fn one_order(bare: Postgres) {
    bare.order().await;
}

pub async fn create(installation: &mut Installation, in_flight: usize) -> Measured {
    let machine = installation.machine();
    let (generator, mut orders) = installation.orders();
    generator.run(&machine, Pace::InFlight(in_flight), SAMPLE_TIME, &mut orders).await.0
}

pub async fn get(installation: &mut Installation) -> Measured {
    let machine = installation.machine();
    let (generator, mut workload) = installation.order_get();
    generator.run(&machine, Pace::InFlight(64), SAMPLE_TIME, &mut workload).await.0
}

pub async fn list(installation: &mut Installation, orders: usize) -> Measured {
    let machine = installation.machine();
    let (generator, mut workload) = installation.order_list(orders);
    generator.run(&machine, Pace::InFlight(64), SAMPLE_TIME, &mut workload).await.0
}

pub async fn search(installation: &mut Installation) -> Measured {
    let machine = installation.machine();
    let (generator, mut workload) = installation.product_search();
    generator.run(&machine, Pace::InFlight(64), SAMPLE_TIME, &mut workload).await.0
}

/// Orders, of which every tenth is queried as soon as it is acknowledged.
struct Visible<'a> {
    orders: Orders<'a>,
    get: String,
    acknowledged: usize,
}

impl Workload for Visible<'_> {
    fn next(&mut self) -> Option<Request> {
        self.orders.next()
    }

    fn follow_up(&mut self, reply: &Message) -> Option<Request> {
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
    let (generator, orders) = installation.orders();
    let mut workload = Visible { orders, get, acknowledged: 0 };
    let (orders, mut gets) = generator.run(&machine, Pace::PerSecond(1_000.0), 2 * SAMPLE_TIME, &mut workload).await;
    gets.cpu = orders.cpu;
    gets
}

pub async fn rebuild(installation: &mut Installation) -> Sample {
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
    Sample {
        figure: events as f64 / elapsed.as_secs_f64(),
        measured: Measured::counted(events as usize, elapsed, cpu),
        per_operation: 1,
        note: String::new(),
    }
}
