//! The installation that is measured: the release binaries in child processes, with users, products and orders.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use async_nats::HeaderMap;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::{
    cost::Machine,
    load::{LoadGenerator, Request, Workload, random},
};
use crate::{Process, Stack, System, http};

/// Products that orders are placed for.
const ORDERED_PRODUCTS: usize = 500;
const USERS: usize = 1_000;
/// The stock of each product. It never runs out.
const STOCK: i64 = 1_000_000_000;
/// The words of the products' names, three for each.
pub const WORDS: [&str; 40] = [
    "alarm",
    "antique",
    "bag",
    "basket",
    "blue",
    "bottle",
    "bowl",
    "box",
    "button",
    "cake",
    "candle",
    "ceramic",
    "christmas",
    "clock",
    "cream",
    "cushion",
    "design",
    "doily",
    "drawer",
    "glass",
    "green",
    "hanging",
    "heart",
    "holder",
    "jumbo",
    "lantern",
    "light",
    "metal",
    "paper",
    "pink",
    "polkadot",
    "red",
    "retrospot",
    "silver",
    "spaceboy",
    "star",
    "vintage",
    "white",
    "wicker",
    "wooden",
];
/// How often metrics are asked for: fifteen times as often as usual.
const SCRAPE_INTERVAL: Duration = Duration::from_secs(1);
/// How long a replica may take to answer a ping.
const PING_TIMEOUT: Duration = Duration::from_millis(200);
/// How long the views may take to catch up with a long journal.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(1800);

pub struct Installation {
    // Fields are dropped in this order, so that the services end before their servers.
    pub command: Vec<Process>,
    pub projection: Option<Process>,
    pub query: Vec<Process>,
    pub system: Arc<System>,
    /// Where the first replica of each service shows its metrics.
    metrics: [SocketAddr; 3],
    pub generator: LoadGenerator,
    users: Vec<Uuid>,
    products: Vec<Uuid>,
    orders: Vec<Uuid>,
}

/// Orders of random users, with two lines each.
pub struct Orders<'a> {
    subject: String,
    users: &'a [Uuid],
    products: &'a [Uuid],
    /// The identifiers of the orders that were requested.
    made: &'a mut Vec<Uuid>,
    left: usize,
}

impl Installation {
    /// Starts an installation on these servers, with this many products.
    pub async fn start(stack: &Arc<Stack>, products: usize) -> Self {
        let mut installation = Self::empty(stack).await;
        (installation.users, installation.products) = (ids(USERS), ids(products));
        installation.make_users_and_products().await;
        installation
    }

    /// Starts an installation on these servers, without users, products and orders.
    pub async fn empty(stack: &Arc<Stack>) -> Self {
        let system = Arc::new(System::on(Arc::clone(stack)).await);
        let generator = LoadGenerator::new(system.client.nats()).await;
        let metrics = std::array::from_fn(|_| http::free_address());
        let start = |role, metrics: SocketAddr| system.process(role, &["--metrics-address", &metrics.to_string()]);
        let (command, query) = (vec![start("command", metrics[0])], vec![start("query", metrics[2])]);
        let projection = Some(start("projection", metrics[1]));
        system.answers("command").await;
        system.answers("query").await;
        let (users, products, orders) = (vec![], vec![], vec![]);
        Self { command, projection, query, system, metrics, generator, users, products, orders }
    }

    async fn make_users_and_products(&mut self) {
        let Self { system, users, products, generator, .. } = self;
        let user = |id: &Uuid| json!({"id": id, "email": format!("{id}@example.com"), "name": "Ada Lovelace"});
        let users = users.iter().map(|id| request(system.subjects.command("user", "register"), &user(id)));
        let product = |(n, id): (usize, &Uuid)| {
            let word = || WORDS[random(WORDS.len())];
            let name = format!("{} {} {}", word(), word(), word());
            let price = json!({"amount": 100 + n % 900, "currency": "GBP"});
            json!({"id": id, "sku": format!("S{n}"), "name": name, "price": price, "stock": STOCK})
        };
        let products = products.iter().enumerate();
        let products = products.map(|it| request(system.subjects.command("product", "create"), &product(it)));
        generator.send_all(&mut Each(users.chain(products))).await;
    }

    /// Places orders until there are this many.
    pub async fn fill(&mut self, orders: usize) {
        let missing = orders.saturating_sub(self.orders.len());
        let (generator, mut workload) = self.orders();
        workload.left = missing;
        generator.send_all(&mut workload).await;
    }

    /// The load generator, and an endless workload of orders.
    pub fn orders(&mut self) -> (&mut LoadGenerator, Orders<'_>) {
        let Self { system, users, products, orders, generator, .. } = self;
        let subject = system.subjects.command("order", "create");
        let products = &products[..ORDERED_PRODUCTS];
        (generator, Orders { subject, users, products, made: orders, left: usize::MAX })
    }

    pub fn users(&self) -> &[Uuid] {
        &self.users
    }

    pub fn ordered_products(&self) -> &[Uuid] {
        &self.products[..ORDERED_PRODUCTS]
    }

    pub fn order_get(&mut self) -> (&mut LoadGenerator, impl FnMut() -> Request) {
        let Self { system, orders, generator, .. } = self;
        let subject = system.subjects.query("order", "get");
        (generator, move || request(subject.clone(), &json!({"id": orders[random(orders.len())]})))
    }

    /// Lists this many of a random user's newest orders.
    pub fn order_list(&mut self, orders: usize) -> (&mut LoadGenerator, impl FnMut() -> Request) {
        let Self { system, users, generator, .. } = self;
        let subject = system.subjects.query("order", "list");
        (generator, move || request(subject.clone(), &json!({"user": users[random(users.len())], "limit": orders})))
    }

    pub fn product_search(&mut self) -> (&mut LoadGenerator, impl FnMut() -> Request) {
        let subject = self.system.subjects.query("product", "search");
        (&mut self.generator, move || request(subject.clone(), &json!({"text": search_text()})))
    }

    pub async fn set_query_replicas(&mut self, replicas: usize) {
        self.query.truncate(replicas);
        while self.query.len() < replicas {
            self.query.push(self.system.process("query", &[]));
        }
        self.await_replicas("query", replicas).await;
    }

    pub async fn set_command_replicas(&mut self, replicas: usize) {
        self.command.truncate(replicas);
        while self.command.len() < replicas {
            self.command.push(self.system.process("command", &[]));
        }
        self.await_replicas("command", replicas).await;
    }

    /// Waits until exactly this many replicas answer a ping.
    async fn await_replicas(&self, service: &str, replicas: usize) {
        let client = self.system.client.nats();
        crate::eventually("the replicas answer", async || {
            let inbox = client.new_inbox();
            let mut replies = client.subscribe(inbox.clone()).await.ok()?;
            client.publish_with_reply(format!("$SRV.PING.{service}"), inbox, "".into()).await.ok()?;
            let mut answers = 0;
            while timeout_at(Instant::now() + PING_TIMEOUT, replies.next()).await.is_ok_and(|reply| reply.is_some()) {
                answers += 1;
            }
            (answers == replicas).then_some(())
        })
        .await;
    }

    /// The length of the reply to `order.get` in bytes.
    pub async fn order_bytes(&self) -> usize {
        let subject = self.system.subjects.query("order", "get");
        let body = json!({"id": self.some_order()}).to_string();
        self.system.client.nats().request(subject, body.into()).await.expect("the query is answered").payload.len()
    }

    /// The identifier of a random order.
    pub fn some_order(&self) -> Uuid {
        self.orders[random(self.orders.len())]
    }

    pub fn order_ids(&self) -> &[Uuid] {
        &self.orders
    }

    /// The processes whose processor time is measured.
    pub fn machine(&self) -> Machine {
        let mut machine = Machine::of(self.system.stack.directory());
        let roles = [("command", &self.command), ("query", &self.query)];
        for (role, process) in roles.into_iter().flat_map(|(role, all)| all.iter().map(move |one| (role, one))) {
            machine.add(role, process.id());
        }
        if let Some(projection) = &self.projection {
            machine.add("projection", projection.id());
        }
        machine
    }

    pub fn start_projection(&mut self) {
        let address = self.metrics[1].to_string();
        self.projection.get_or_insert_with(|| self.system.process("projection", &["--metrics-address", &address]));
    }

    /// Asks the services for their metrics every second, until the handle is dropped.
    pub fn scrape(&self) -> AbortOnDropHandle<()> {
        let addresses = self.metrics;
        AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                for address in addresses {
                    // The projection service does not run in every row.
                    let _ = http::get(address, "/metrics").await;
                }
                sleep(SCRAPE_INTERVAL).await;
            }
        }))
    }

    pub async fn stop_projection(&mut self) {
        if let Some(mut projection) = self.projection.take() {
            projection.signal("TERM");
            crate::eventually("the projection service ends", async || projection.has_ended().then_some(())).await;
        }
    }

    /// Waits until all views have reached the journal's head.
    pub async fn caught_up(&self) {
        let head = self.system.head().await;
        let operator = self.system.operator().await;
        let mut announcements = operator.subscribe(self.system.subjects.checkpoints()).await.expect("NATS answers");
        let mut positions = crate::journal::checkpoints(&self.system).await;
        let deadline = Instant::now() + CATCH_UP_TIMEOUT;
        while positions.len() < views::names().len() || positions.values().any(|position| *position < head) {
            let message = timeout_at(deadline, announcements.next()).await.expect("the views catch up in time");
            let message = message.expect("the subscription lasts");
            let view = self.system.subjects.parse_checkpoint(&message.subject).expect("a view's").to_owned();
            let position: Option<u64> = std::str::from_utf8(&message.payload).ok().and_then(|text| text.parse().ok());
            let known = positions.entry(view).or_default();
            *known = position.expect("a position").max(*known);
        }
    }

    /// The resident memory of the services in MB, the largest replica of each role.
    pub fn memory(&self) -> BTreeMap<&'static str, f64> {
        let processes = [("command", &self.command[..]), ("query", &self.query[..])];
        let processes = processes.into_iter().chain([("projection", self.projection.as_slice())]);
        processes
            .map(|(role, all)| (role, all.iter().map(|one| one.resident() as f64 / 1e6).fold(0.0, f64::max)))
            .collect()
    }
}

impl Orders<'_> {
    fn body(&mut self) -> String {
        let id = Uuid::now_v7();
        self.made.push(id);
        let user = self.users[random(self.users.len())];
        let product = || self.products[random(self.products.len())];
        let (first, second) = (product(), product());
        format!(
            r#"{{"id":"{id}","user":"{user}","lines":[{{"product":"{first}","quantity":1}},{{"product":"{second}","quantity":1}}]}}"#
        )
    }
}

impl Workload for Orders<'_> {
    fn next(&mut self) -> Option<Request> {
        self.left = self.left.checked_sub(1)?;
        Some(Request { subject: self.subject.clone(), headers: None, body: self.body().into() })
    }
}

/// The requests of an iterator.
struct Each<I>(I);

impl<I: Iterator<Item = Request>> Workload for Each<I> {
    fn next(&mut self) -> Option<Request> {
        self.0.next()
    }
}

pub fn request(subject: String, body: &Value) -> Request {
    Request { subject, headers: None, body: body.to_string().into() }
}

/// An `order.get` that waits until the view has reached the position.
pub fn get_at(subject: String, id: &str, position: &str) -> Request {
    let mut headers = HeaderMap::new();
    headers.insert(wire::MIN_POSITION, position);
    Request { subject, headers: Some(headers), body: format!(r#"{{"id":"{id}"}}"#).into() }
}

/// A word, and the beginning of another.
pub fn search_text() -> String {
    let word = |_| WORDS[random(WORDS.len())];
    let (whole, begun) = (word(()), word(()));
    format!("{whole} {}", &begun[..3])
}

fn ids(number: usize) -> Vec<Uuid> {
    (0..number).map(|_| Uuid::now_v7()).collect()
}
