//! Clients that send commands and queries all the time while something happens to the services, and check every reply:
//! no query fails, none is answered from an earlier position than its session has seen, and no page mixes generations.

use std::{
    collections::{BTreeMap, HashSet},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use client::{Error, Reply};
use futures_util::future::join_all;
use serde_json::{Value, json};
use tests::System;

/// The field that documents of the view `orders` have in the program of the next version.
pub const NEW_FIELD: &str = "line_count";

const BUYERS: usize = 3;
/// The largest number of pages of a walk through the orders.
const PAGES: usize = 12;
/// How long a witness rests between two requests.
const REST: Duration = Duration::from_millis(2);

pub struct Witnesses<'a> {
    system: &'a System,
    is_over: AtomicBool,
    /// A server is down, so that a query may be answered `unavailable`, or not in time.
    is_outage: AtomicBool,
    answered: AtomicU64,
    /// The queries that were not answered during an outage.
    excused: AtomicU64,
    slowest_millis: AtomicU64,
    /// How many orders were shown without the new field, and how many with it.
    shown: [AtomicU64; 2],
}

impl<'a> Witnesses<'a> {
    pub fn new(system: &'a System) -> Self {
        Self {
            system,
            is_over: AtomicBool::new(false),
            is_outage: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            excused: AtomicU64::new(0),
            slowest_millis: AtomicU64::new(0),
            shown: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    /// Lets the witnesses work until `work` is done.
    pub async fn watch<T>(&self, work: impl Future<Output = T>) -> T {
        self.is_over.store(false, Relaxed);
        self.answered.store(0, Relaxed);
        let working = async {
            let done = work.await;
            self.is_over.store(true, Relaxed);
            done
        };
        let buying = join_all((0..BUYERS).map(|_| self.buy()));
        let reading = join_all(views::queries().into_iter().map(|(_, query)| {
            let example = serde_json::from_str(query.examples[0]).unwrap();
            self.repeat(format!("qry.{}", query.name()), example)
        }));
        let (done, ..) = tokio::join!(working, buying, reading, self.walk_through_orders(), self.compare_replicas());
        assert!(self.answered.load(Relaxed) > 500, "{:?}", self.answered);
        done
    }

    /// Excuses queries that are not answered while `outage` lasts.
    pub async fn excused<T>(&self, outage: impl Future<Output = T>) -> T {
        self.is_outage.store(true, Relaxed);
        let over = outage.await;
        self.is_outage.store(false, Relaxed);
        over
    }

    pub fn excused_queries(&self) -> u64 {
        self.excused.load(Relaxed)
    }

    /// The longest time that a query has waited for its reply since this was asked last.
    pub fn slowest(&self) -> Duration {
        Duration::from_millis(self.slowest_millis.swap(0, Relaxed))
    }

    /// How many orders have been shown until now: without the new field, and with it.
    pub fn shown(&self) -> [u64; 2] {
        [0, 1].map(|which| self.shown[which].load(Relaxed))
    }

    fn goes_on(&self) -> bool {
        !self.is_over.load(Relaxed)
    }

    /// Sends a query; `None` if it was not answered, and is excused. The reply must be of this position or a later one.
    async fn ask(&self, name: &str, body: Value, min_position: u64) -> Option<Result<Reply<Value>, Error>> {
        let (was_outage, began) = (self.is_outage.load(Relaxed), Instant::now());
        let position = min_position.to_string();
        let answer = self.system.ask(name, body.clone(), &[(wire::MIN_POSITION, &position)]).await;
        let is_outage = was_outage || self.is_outage.load(Relaxed);
        match &answer {
            Ok(reply) => assert!(reply.position >= Some(min_position), "{name} {body} of {min_position}: {reply:?}"),
            Err(Error::NotFound(_)) => {}
            Err(Error::Unavailable(_) | Error::TimedOut(_) | Error::ViewBehind(_) | Error::Overloaded(_))
                if is_outage =>
            {
                self.excused.fetch_add(1, Relaxed);
                return None;
            }
            Err(error) => panic!("{name} {body} of {min_position}: {error} {error:?}"),
        }
        self.answered.fetch_add(1, Relaxed);
        if !is_outage {
            self.slowest_millis.fetch_max(u64::try_from(began.elapsed().as_millis()).unwrap(), Relaxed);
        }
        Some(answer)
    }

    /// A session that sends one query again and again: it sees nothing older than what it has seen.
    async fn repeat(&self, name: String, body: Value) {
        let mut last = 0;
        while self.goes_on() {
            if let Some(Ok(reply)) = self.ask(&name, body.clone(), last).await {
                last = reply.position.unwrap();
            }
            tokio::time::sleep(REST).await;
        }
    }

    /// A session that changes things, and sees what it has done.
    async fn buy(&self) {
        const STOCK: i64 = 1_000_000;

        let (user, product) = (self.system.user().await.id, self.system.product(STOCK).await.id);
        let mut sold = 0;
        for round in 0_usize.. {
            let lines: Vec<_> = (0..=round % 3).map(|_| json!({"product": product, "quantity": 1})).collect();
            let placed = self.system.accept("order.create", json!({"user": user, "lines": lines})).await;
            sold += i64::try_from(lines.len()).unwrap();
            self.sees_order(placed.id, placed.position, "placed", lines.len()).await;
            let verb = if round.is_multiple_of(2) { "pay" } else { "cancel" };
            let changed = self.system.accept(&format!("order.{verb}"), json!({"id": placed.id})).await;
            let status = if verb == "pay" { "paid" } else { "cancelled" };
            if verb == "cancel" {
                sold -= i64::try_from(lines.len()).unwrap();
            }
            self.sees_order(placed.id, changed.position, status, lines.len()).await;
            if let Some(reply) = self.ask("qry.product.get", json!({"id": product}), changed.position).await {
                assert_eq!(reply.unwrap().body["stock"], STOCK - sold);
            }
            if !self.goes_on() {
                return;
            }
        }
    }

    async fn sees_order(&self, id: domain::Id, position: u64, status: &str, lines: usize) {
        let Some(reply) = self.ask("qry.order.get", json!({"id": id}), position).await else { return };
        let order = reply.unwrap().body;
        assert_eq!((&order["status"], order["lines"].as_array().unwrap().len()), (&json!(status), lines), "{order}");
        let is_new = order.get(NEW_FIELD).is_some();
        assert!(!is_new || order[NEW_FIELD] == lines, "{order}");
        self.shown[usize::from(is_new)].fetch_add(1, Relaxed);
    }

    /// A session that reads all orders in pages, again and again. Each page is from one generation: its orders have the
    /// new field, or none has. All pages together show no order twice, and all in order, whatever generations they are
    /// from.
    async fn walk_through_orders(&self) {
        let mut position = 0;
        while self.goes_on() {
            let (mut seen, mut before) = (HashSet::new(), None);
            let mut request = json!({"limit": 40});
            for _ in 0..PAGES {
                let Some(page) = self.ask("qry.order.list", request.clone(), position).await else { break };
                let page = page.unwrap();
                position = page.position.unwrap();
                let items = page.body["items"].as_array().unwrap();
                let new = items.iter().filter(|order| order.get(NEW_FIELD).is_some()).count();
                assert!(new == 0 || new == items.len(), "{new} of {} orders have the new field", items.len());
                for order in items {
                    let text = |field: &str| order[field].as_str().unwrap().to_owned();
                    let key = (text("placed_at"), text("id"));
                    assert!(seen.insert(text("id")), "twice: {order}");
                    assert!(before.is_none_or(|before| before > key), "not in order: {order}");
                    before = Some(key);
                }
                let Some(next) = page.body["next"].as_str() else { break };
                request["cursor"] = json!(next);
                tokio::time::sleep(REST).await;
            }
        }
    }

    /// No replica of the query service goes back.
    async fn compare_replicas(&self) {
        let mut last: BTreeMap<(String, String), u64> = BTreeMap::new();
        while self.goes_on() {
            for replica in self.system.all_stats().await.iter().filter(|it| it["name"] == "query") {
                for view in replica["data"]["views"].as_array().unwrap() {
                    let Some(position) = view["position"].as_u64() else { continue };
                    let key = (replica["id"].to_string(), view["view"].to_string());
                    let before = last.insert(key, position).unwrap_or_default();
                    assert!(position >= before, "{before} before {view} of {}", replica["id"]);
                }
            }
        }
    }
}
