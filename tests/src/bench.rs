//! Measures Watershed against the bare parts that it is made of, on the same servers in the same minute: ours and bare
//! take turns, and the median of the turns' ratios counts, since machines are shared and noisy.

mod bare;
mod load;

use std::{sync::Arc, time::Duration};

use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::{Process, Stack, System};
use bare::Bare;
use load::{Latencies, in_flight};

/// Turns of each side.
const TURNS: usize = 3;
/// How long a turn is measured, after a warm-up of a third of it.
const TURN: Duration = Duration::from_secs(5);
/// Products that the orders take pieces of.
const PRODUCTS: usize = 500;

/// A figure of ours and the bare part's, in the same unit.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub unit: &'static str,
    pub ours: f64,
    pub bare: f64,
    /// Of rates ours to bare; of latencies too: there less is better.
    pub ratio: f64,
}

/// Everything that is measured against, with the services as processes of their own.
struct Bench {
    // They are dropped in this order: the services end before their servers.
    command: Process,
    services: Vec<(&'static str, Process)>,
    system: Arc<System>,
    users: Vec<Uuid>,
    products: Vec<Uuid>,
}

/// Measures the rows, or those whose name is given, on servers of its own.
pub async fn run(only: Option<&str>) -> Vec<Row> {
    let system = Arc::new(System::on(Stack::private("bench")).await);
    let bench = Bench::start(system).await;
    let wanted = |name: &str| only.is_none_or(|only| only == name);
    let mut rows = Vec::new();
    if wanted("order_create_1") {
        rows.push(bench.order_create_1().await);
    }
    if wanted("visible") {
        rows.push(bench.visible().await);
    }
    if wanted("order_create_vs_tx") {
        rows.push(bench.order_create_vs_tx().await);
    }
    rows.extend(bench.memory());
    rows
}

impl Bench {
    async fn start(system: Arc<System>) -> Self {
        let command = system.process("command", &[]);
        let services = ["projection", "query"].map(|role| (role, system.process(role, &[]))).into();
        system.answers("command").await;
        let mut users = Vec::new();
        let mut products = Vec::new();
        for _ in 0..50 {
            users.push(system.user().await.id.0);
        }
        for _ in 0..PRODUCTS {
            products.push(system.product(100_000_000).await.id.0);
        }
        Self { system, command, services, users, products }
    }

    /// Orders of two lines each second, 256 in flight, to one transaction per order for the same rows. The projection
    /// service is halted, for good: what our turn leaves it to do would slow down the bare part's.
    async fn order_create_vs_tx(&self) -> Row {
        let projection = self.services.iter().find(|(role, _)| *role == "projection");
        projection.expect("it was started").1.signal("STOP");
        let bare = Bare::new(&self.system.postgres_url(), 16).await;
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = in_flight(256, TURN, || self.create_order()).await.rate();
            let bare = in_flight(64, TURN, || bare.order(&self.users, &self.products)).await.rate();
            turns.push((ours, bare));
        }
        row("order_create_vs_tx", "orders/s", turns)
    }

    /// The median latency of one client's order, to that of one transaction.
    async fn order_create_1(&self) -> Row {
        let bare = Bare::new(&self.system.postgres_url(), 1).await;
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let ours = in_flight(1, TURN, || self.create_order()).await.quantile(0.5);
            let bare = in_flight(1, TURN, || bare.order(&self.users, &self.products)).await.quantile(0.5);
            turns.push((ours, bare));
        }
        row("order_create_1", "ms", turns)
    }

    /// From the reply to an order until a query shows it, when nothing else goes on, to a bare NATS request.
    async fn visible(&self) -> Row {
        let mut turns = Vec::new();
        for _ in 0..TURNS {
            let mut ours = Latencies::default();
            for _ in 0..200 {
                let order = self.create_order().await;
                let id = json!({"id": order.id});
                ours.time(|| self.system.read("order.get", id, order.position)).await.data();
            }
            let absent = json!({"id": self.users[0]});
            let bare = in_flight(1, TURN, || self.system.client.query("order.get", absent.clone(), &[])).await;
            turns.push((ours.quantile(0.5), bare.quantile(0.5)));
        }
        row("visible", "ms", turns)
    }

    /// Resident memory of each service after all of this, to the 60 MB that it may have.
    fn memory(&self) -> Vec<Row> {
        let of = |name, process: &Process| {
            let (ours, bare) = (process.resident() as f64 / 1e6, 60.0);
            Row { name, unit: "MB", ours, bare, ratio: ours / bare }
        };
        let services = self
            .services
            .iter()
            .map(|(role, process)| of(if *role == "query" { "memory_query" } else { "memory_projection" }, process));
        [of("memory_command", &self.command)].into_iter().chain(services).collect()
    }

    async fn create_order(&self) -> wire::Accepted {
        let product = || self.products[load::random(self.products.len())];
        let line = || json!({"product": product(), "quantity": 1});
        let user = self.users[load::random(self.users.len())];
        self.system.accept("order.create", json!({"user": user, "lines": [line(), line()]})).await
    }
}

fn row(name: &'static str, unit: &'static str, mut turns: Vec<(f64, f64)>) -> Row {
    turns.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let (ours, bare) = turns[turns.len() / 2];
    Row { name, unit, ours, bare, ratio: ours / bare }
}
