//! Watershed as it is measured: the release binaries as processes of their own, with users, products and orders.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_nats::HeaderMap;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::{
    cost::Machine,
    load::{Ask, Asker, Traffic, random},
};
use crate::{Process, Stack, System};

/// Products that orders take pieces of.
const ORDERED_PRODUCTS: usize = 500;
const USERS: usize = 1_000;
/// So that none is ever out of stock.
const STOCK: i64 = 1_000_000_000;
/// The names of products are made of these: three words each.
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
/// How long the answer of a replica may take.
const PING: Duration = Duration::from_millis(200);
/// How long the views may take to follow a long journal.
const CATCH_UP: Duration = Duration::from_secs(1800);

pub struct Installation {
    // They are dropped in this order: the services end before their servers.
    pub command: Vec<Process>,
    pub projection: Option<Process>,
    pub query: Vec<Process>,
    pub system: Arc<System>,
    pub asker: Asker,
    users: Vec<Uuid>,
    products: Vec<Uuid>,
    orders: Vec<Uuid>,
}

/// Orders of two lines, of random users.
pub struct Orders<'a> {
    subject: String,
    users: &'a [Uuid],
    products: &'a [Uuid],
    /// The identifiers of those that were asked for.
    made: &'a mut Vec<Uuid>,
    left: usize,
}

impl Installation {
    /// On these servers, with that many products.
    pub async fn start(stack: &Arc<Stack>, products: usize) -> Self {
        let mut installation = Self::empty(stack).await;
        (installation.users, installation.products) = (ids(USERS), ids(products));
        installation.make_users_and_products().await;
        installation
    }

    /// On these servers, with nothing in it.
    pub async fn empty(stack: &Arc<Stack>) -> Self {
        let system = Arc::new(System::on(Arc::clone(stack)).await);
        let asker = Asker::new(&system.client.nats).await;
        let (command, query) = (vec![system.process("command", &[])], vec![system.process("query", &[])]);
        let projection = Some(system.process("projection", &[]));
        system.answers("command").await;
        system.answers("query").await;
        let (users, products, orders) = (vec![], vec![], vec![]);
        Self { command, projection, query, system, asker, users, products, orders }
    }

    async fn make_users_and_products(&mut self) {
        let Self { system, users, products, asker, .. } = self;
        let user = |id: &Uuid| json!({"id": id, "email": format!("{id}@example.com"), "name": "Ada Lovelace"});
        let users = users.iter().map(|id| ask(system.subjects.command("user", "register"), &user(id)));
        let product = |(n, id): (usize, &Uuid)| {
            let word = || WORDS[random(WORDS.len())];
            let name = format!("{} {} {}", word(), word(), word());
            let price = json!({"amount": 100 + n % 900, "currency": "GBP"});
            json!({"id": id, "sku": format!("S{n}"), "name": name, "price": price, "stock": STOCK})
        };
        let products = products.iter().enumerate();
        let products = products.map(|it| ask(system.subjects.command("product", "create"), &product(it)));
        asker.ask_all(&mut Each(users.chain(products))).await;
    }

    /// Places orders until there are so many.
    pub async fn fill(&mut self, orders: usize) {
        let missing = orders.saturating_sub(self.orders.len());
        let (asker, mut traffic) = self.orders();
        traffic.left = missing;
        asker.ask_all(&mut traffic).await;
    }

    /// Who asks, and orders without end.
    pub fn orders(&mut self) -> (&mut Asker, Orders<'_>) {
        let Self { system, users, products, orders, asker, .. } = self;
        let subject = system.subjects.command("order", "create");
        let products = &products[..ORDERED_PRODUCTS];
        (asker, Orders { subject, users, products, made: orders, left: usize::MAX })
    }

    pub fn users(&self) -> &[Uuid] {
        &self.users
    }

    pub fn ordered_products(&self) -> &[Uuid] {
        &self.products[..ORDERED_PRODUCTS]
    }

    pub fn order_get(&mut self) -> (&mut Asker, impl FnMut() -> Ask) {
        let Self { system, orders, asker, .. } = self;
        let subject = system.subjects.query("order", "get");
        (asker, move || ask(subject.clone(), &json!({"id": orders[random(orders.len())]})))
    }

    /// Lists of a random user's newest orders, so many.
    pub fn order_list(&mut self, orders: usize) -> (&mut Asker, impl FnMut() -> Ask) {
        let Self { system, users, asker, .. } = self;
        let subject = system.subjects.query("order", "list");
        (asker, move || ask(subject.clone(), &json!({"user": users[random(users.len())], "limit": orders})))
    }

    pub fn product_search(&mut self) -> (&mut Asker, impl FnMut() -> Ask) {
        let subject = self.system.subjects.query("product", "search");
        (&mut self.asker, move || ask(subject.clone(), &json!({"text": search_text()})))
    }

    pub async fn set_query_replicas(&mut self, replicas: usize) {
        self.query.truncate(replicas);
        while self.query.len() < replicas {
            self.query.push(self.system.process("query", &[]));
        }
        self.answer("query", replicas).await;
    }

    pub async fn set_command_replicas(&mut self, replicas: usize) {
        self.command.truncate(replicas);
        while self.command.len() < replicas {
            self.command.push(self.system.process("command", &[]));
        }
        self.answer("command", replicas).await;
    }

    /// Waits until so many replicas, and no more, say that they are there.
    async fn answer(&self, service: &str, replicas: usize) {
        let client = &self.system.client.nats;
        crate::eventually("the replicas are there", async || {
            let inbox = client.new_inbox();
            let mut replies = client.subscribe(inbox.clone()).await.ok()?;
            client.publish_with_reply(format!("$SRV.PING.{service}"), inbox, "".into()).await.ok()?;
            let mut there = 0;
            while timeout_at(Instant::now() + PING, replies.next()).await.is_ok_and(|reply| reply.is_some()) {
                there += 1;
            }
            (there == replicas).then_some(())
        })
        .await;
    }

    /// The length of an order as a reply.
    pub async fn order_bytes(&self) -> usize {
        let subject = self.system.subjects.query("order", "get");
        let body = json!({"id": self.some_order()}).to_string();
        self.system.client.nats.request(subject, body.into()).await.expect("the query is answered").payload.len()
    }

    /// A random order that there is.
    pub fn some_order(&self) -> Uuid {
        self.orders[random(self.orders.len())]
    }

    pub fn order_ids(&self) -> &[Uuid] {
        &self.orders
    }

    /// The processes whose time is counted.
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
        self.projection.get_or_insert_with(|| self.system.process("projection", &[]));
    }

    pub async fn stop_projection(&mut self) {
        if let Some(mut projection) = self.projection.take() {
            projection.signal("TERM");
            crate::eventually("the projection service ends", async || projection.has_ended().then_some(())).await;
        }
    }

    /// Waits until all views have the whole journal.
    pub async fn caught_up(&self) {
        let head = self.system.head().await;
        let operator = self.system.operator().await;
        let mut announcements = operator.subscribe(self.system.subjects.checkpoints()).await.expect("NATS answers");
        let mut positions = crate::journal::checkpoints(&self.system).await;
        let deadline = Instant::now() + CATCH_UP;
        while positions.len() < views::names().len() || positions.values().any(|position| *position < head) {
            let message = timeout_at(deadline, announcements.next()).await.expect("the views catch up in time");
            let message = message.expect("the subscription lasts");
            let view = self.system.subjects.parse_checkpoint(&message.subject).expect("a view's").to_owned();
            let position: Option<u64> = std::str::from_utf8(&message.payload).ok().and_then(|text| text.parse().ok());
            let known = positions.entry(view).or_default();
            *known = position.expect("a position").max(*known);
        }
    }

    /// Resident memory of our processes in MB, the largest of each role.
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

impl Traffic for Orders<'_> {
    fn next(&mut self) -> Option<Ask> {
        self.left = self.left.checked_sub(1)?;
        Some(Ask { subject: self.subject.clone(), headers: None, body: self.body().into() })
    }
}

/// What comes from an iterator.
struct Each<I>(I);

impl<I: Iterator<Item = Ask>> Traffic for Each<I> {
    fn next(&mut self) -> Option<Ask> {
        self.0.next()
    }
}

pub fn ask(subject: String, body: &Value) -> Ask {
    Ask { subject, headers: None, body: body.to_string().into() }
}

/// An `order.get` that waits for the position.
pub fn get_at(subject: String, id: &str, position: &str) -> Ask {
    let mut headers = HeaderMap::new();
    headers.insert(wire::MIN_POSITION, position);
    Ask { subject, headers: Some(headers), body: format!(r#"{{"id":"{id}"}}"#).into() }
}

/// A whole word, and the beginning of another.
pub fn search_text() -> String {
    let word = |_| WORDS[random(WORDS.len())];
    let (whole, begun) = (word(()), word(()));
    format!("{whole} {}", &begun[..3])
}

fn ids(number: usize) -> Vec<Uuid> {
    (0..number).map(|_| Uuid::now_v7()).collect()
}
