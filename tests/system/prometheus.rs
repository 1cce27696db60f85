//! What docs/observability/ promises, with a real Prometheus: every expression has data, and every alert fires while its
//! trouble lasts, and clears when it is over.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use bson::{Document, doc};
use domain::Id;
use futures_util::{TryStreamExt, future::join_all};
use mongodb::IndexModel;
use serde_json::{Value, json};
use tests::{
    Expect, Process, Proxy, Stack, System, eventually,
    http::{free_address, get},
    journal,
    prometheus::{Programs, Prometheus},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;
use views::layout;

const README: &str = include_str!("../../docs/observability/README.md");
const RULES: &str = include_str!("../../docs/observability/alerts.yml");
const DASHBOARD: &str = include_str!("../../docs/observability/dashboard.json");
const OWN_SOURCE: &str = include_str!("prometheus.rs");

/// The alerts whose trouble no test makes, each with the reason. promtool tests them on made-up figures.
const NOT_MADE: [(&str, &str); 3] = [
    ("WatershedMemoryGrowing", "no replica grows beyond 512 MiB within seconds"),
    ("WatershedConnectionsExhausted", "the services bound what they do at once, so that their pools suffice"),
    ("WatershedRelaysDoubled", "PostgreSQL gives the relay's lock to one session only"),
];

#[test]
fn promtool_accepts_the_rules_and_their_tests_and_the_example_of_a_configuration() {
    let Some(programs) = Programs::find() else { return };
    programs.promtool(&["check", "config", "prometheus.yml"]);
    programs.promtool(&["check", "rules", "alerts.yml"]);
    programs.promtool(&["test", "rules", "alerts.test.yml"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_expression_returns_data_and_every_figure_is_shown() {
    let Some(programs) = Programs::find() else { return };
    let shop = Shop::open(&programs, System::new().await, [&[], SHORT_LEASE, &["--min-position-wait-ms", "300"]]).await;
    let Shop { system, prometheus, .. } = &shop;
    let second = free_address();
    let _second = start(system, "command", second, &[]);
    let targets = [&shop.targets()[..], &[("command", second)]].concat();
    prometheus.scrape(&targets).await;

    let alerts = prometheus.alerts().await;
    let figures: Vec<String> = alerts.iter().flat_map(|expression| figures(expression)).chain(panels()).collect();
    let enough = AtomicBool::new(false);
    let asking = async {
        // What happens only in trouble.
        shop.query_of_a_future_position().await;
        let lock = lock_head(system).await;
        eventually("a command is refused as overloaded", async || {
            (shop.restock().await? == "overloaded").then_some(())
        })
        .await;
        lock.batch_execute("rollback").await.unwrap();
        let indexes = drop_indexes(system).await;
        eventually("a query fails", async || (shop.list_orders().await? == "internal").then_some(())).await;
        create_indexes(system, indexes).await;
        shop.lose_leases().await;

        for figure in &figures {
            eventually(&format!("there is data: {figure}"), async || {
                prometheus.query(figure).await.iter().any(|it| it["value"][1] != "NaN").then_some(())
            })
            .await;
        }
        enough.store(true, Relaxed);
    };
    tokio::join!(asking, shop.traffic(&enough));

    let used: BTreeSet<&str> = figures.iter().flat_map(|figure| names(figure)).collect();
    let mut known = BTreeSet::new();
    for (service, address) in targets {
        for (family, samples) in families(&get(address, "/metrics").await.unwrap().1) {
            let is_used = samples.iter().any(|it| used.contains(&**it)) || README.contains(&format!("`{family}`"));
            assert!(
                is_used || !family.starts_with("watershed_"),
                "{family} of the {service} service: show it in the dashboard, or list it in docs/observability/README.md"
            );
            known.extend(samples);
        }
    }
    let unknown: Vec<_> = used.iter().filter(|name| !known.contains(**name)).collect();
    assert!(unknown.is_empty(), "docs/observability names what no service shows: {unknown:?}");
}

#[test]
fn the_dashboard_can_be_read_by_people() {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "the identifiers of panels differ");
    for panel in panels.iter().filter(|panel| panel["type"] != "row") {
        let is_described =
            ["title", "description"].iter().all(|it| panel[it].as_str().is_some_and(|it| !it.is_empty()));
        assert!(is_described && panel["datasource"]["uid"] == "${datasource}", "{panel}");
    }
}

#[test]
fn every_alert_has_a_trouble_that_raises_it() {
    for alert in RULES.split("- alert: ").skip(1).filter_map(|rule| rule.lines().next()) {
        let is_named = OWN_SOURCE.contains(&format!("\"{alert}\""));
        assert!(is_named, "tests/system/prometheus.rs: add a trouble in which {alert} fires, or a reason to NOT_MADE");
    }
    for (alert, _) in NOT_MADE {
        assert_eq!(OWN_SOURCE.matches(&format!("\"{alert}\"")).count(), 1, "{alert} is in NOT_MADE, and is made");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_that_end_hang_or_differ_raise_alerts() {
    let Some(programs) = Programs::find() else { return };
    let shop = Shop::open(&programs, System::new().await, [&[], &[], &[]]).await;
    let Shop { system, prometheus, .. } = &shop;
    prometheus.is_quiet().await;

    let second = free_address();
    let mut replica = start(system, "query", second, &[]);
    let targets = [&shop.targets()[..], &[("query", second)]].concat();
    prometheus.scrape(&targets).await;
    let started_at = format!("process_start_time_seconds{{instance=\"{second}\"}}");
    for _ in 0..3 {
        let before = prometheus.value(&started_at).await.unwrap();
        replica.kill();
        replica = start(system, "query", second, &[]);
        eventually("the new replica is scraped", async || {
            (prometheus.value(&started_at).await? > before).then_some(())
        })
        .await;
    }
    prometheus.fires(&["WatershedReplicaRestarts"]).await;

    replica.kill();
    prometheus.fires(&["WatershedReplicaDown"]).await;
    let _replica = start(system, "query", second, &[]);
    prometheus.clears(&["WatershedReplicaDown"]).await;

    shop.projection.signal("STOP");
    system.user().await;
    prometheus.fires(&["WatershedServiceDown", "WatershedViewStandsStill"]).await;
    shop.projection.signal("CONT");
    prometheus.clears(&["WatershedServiceDown", "WatershedViewStandsStill"]).await;

    let connections = join_all((0..300).map(|_| TcpStream::connect(shop.addresses[2]))).await;
    assert!(connections.iter().all(Result::is_ok));
    prometheus.fires(&["WatershedFilesRunningOut"]).await;
    drop(connections);
    prometheus.clears(&["WatershedFilesRunningOut"]).await;

    let (other, _other) = replica_of_another_revision().await;
    prometheus.scrape(&[&targets[..], &[("query", other)]].concat()).await;
    prometheus.fires(&["WatershedRevisionsMixed"]).await;
    prometheus.scrape(&targets).await;
    prometheus.clears(&["WatershedRevisionsMixed"]).await;
    prometheus.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_are_lost_raise_alerts() {
    let Some(programs) = Programs::find() else { return };
    let stack = Stack::private("alerts");
    let proxy = Proxy::start(stack.url("NATS_QUERY_URL")).await;
    let system = System::on(stack.clone()).await;
    let shop = Shop::open(&programs, system, [&[], SHORT_LEASE, &["--nats-url", &proxy.url]]).await;
    let Shop { prometheus, .. } = &shop;
    prometheus.is_quiet().await;

    let enough = AtomicBool::new(false);
    let troubles = async {
        let raised = [
            "WatershedServerDown",
            "WatershedServerUnreachable",
            "WatershedReplicaNotReady",
            "WatershedRequestsFailing",
            "WatershedViewWithoutLeader",
        ];
        tokio::task::block_in_place(|| stack.stop("mongodb"));
        prometheus.fires(&raised).await;
        tokio::task::block_in_place(|| stack.resume("mongodb"));
        prometheus.clears(&raised).await;

        let losses = r#"sum(watershed_server_losses_total{job="watershed-query", server="nats"})"#;
        for _ in 0..5 {
            let before = prometheus.value(losses).await;
            proxy.cut();
            eventually("the loss is counted", async || (prometheus.value(losses).await > before).then_some(())).await;
        }
        prometheus.fires(&["WatershedServerUnsteady"]).await;
        prometheus.is_quiet().await;
        enough.store(true, Relaxed);
    };
    tokio::join!(troubles, shop.traffic(&enough));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_and_views_in_trouble_raise_alerts() {
    let Some(programs) = Programs::find() else { return };
    let shop = Shop::open(&programs, System::new().await, [&[], SHORT_LEASE, &[]]).await;
    let Shop { system, prometheus, .. } = &shop;
    prometheus.is_quiet().await;

    let enough = AtomicBool::new(false);
    let troubles = async {
        let lock = take_relay_lock(system).await;
        prometheus.fires(&["WatershedRelayNowhere", "WatershedRelayBehind"]).await;
        drop(lock);
        prometheus.clears(&["WatershedRelayNowhere", "WatershedRelayBehind"]).await;

        // Somebody writes into the views' database, and takes it back.
        let products = collection(system, "products").await;
        let product = doc! {"_id": shop.product.to_string()};
        let document = products.find_one_and_delete(product.clone()).await.unwrap().unwrap();
        prometheus.fires(&["WatershedViewFailing"]).await;
        products.insert_one(document).await.unwrap();
        prometheus.clears(&["WatershedViewFailing"]).await;

        // Somebody's transaction holds a document.
        let mut other = products.client().start_session().await.unwrap();
        other.start_transaction().await.unwrap();
        eventually("the document is locked", async || {
            // The view may be writing it.
            let change = products.update_one(product.clone(), doc! {"$set": {"name": "Mine"}});
            if change.session(&mut other).await.is_ok() {
                return Some(());
            }
            let _ = other.abort_transaction().await;
            other.start_transaction().await.unwrap();
            None
        })
        .await;
        prometheus.fires(&["WatershedViewBehind", "WatershedViewFarBehind"]).await;
        other.abort_transaction().await.unwrap();
        prometheus.clears(&["WatershedViewBehind", "WatershedViewFarBehind"]).await;

        for _ in 0..5 {
            shop.lose_leases().await;
        }
        prometheus.fires(&["WatershedLeasesUnsteady"]).await;

        let relay = async_nats::jetstream::new(system.relay_user().await);
        let subject = system.subjects.event("product", "restocked");
        relay.publish(subject, "{}".into()).await.unwrap().await.unwrap();
        prometheus.fires(&["WatershedRelayFailing"]).await;
        async_nats::jetstream::new(system.operator().await).delete_stream(system.stream()).await.unwrap();
        prometheus.is_quiet().await;
        enough.store(true, Relaxed);
    };
    tokio::join!(troubles, shop.traffic(&enough));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_fail_or_wait_raise_alerts() {
    let Some(programs) = Programs::find() else { return };
    let small = ["--queue-commands", "10", "--batch-commands", "4"];
    let shop = Shop::open(&programs, System::new().await, [&small, &[], &["--min-position-wait-ms", "1500"]]).await;
    let Shop { system, prometheus, .. } = &shop;
    prometheus.is_quiet().await;

    let enough = AtomicBool::new(false);
    let troubles = async {
        let raised =
            ["WatershedOverloaded", "WatershedQueueFilling", "WatershedCommandsSlow", "WatershedBatchesRetried"];
        let lock = lock_head(system).await;
        let is_over = AtomicBool::new(false);
        let crowd = join_all((0..20).map(|_| shop.traffic(&is_over)));
        let watching = async {
            prometheus.fires(&raised).await;
            lock.batch_execute("rollback").await.unwrap();
            is_over.store(true, Relaxed);
        };
        tokio::join!(watching, crowd);
        prometheus.clears(&raised).await;

        let raised = ["WatershedQueriesSlow", "WatershedQueriesOutOfTime", "WatershedInternalErrors"];
        let indexes = drop_indexes(system).await;
        let is_over = AtomicBool::new(false);
        let waiting = async {
            while !is_over.load(Relaxed) {
                shop.query_of_a_future_position().await;
            }
        };
        let watching = async {
            prometheus.fires(&raised).await;
            is_over.store(true, Relaxed);
        };
        tokio::join!(watching, waiting);
        create_indexes(system, indexes).await;
        prometheus.is_quiet().await;
        enough.store(true, Relaxed);
    };
    tokio::join!(troubles, shop.traffic(&enough), shop.traffic(&enough));
}

const SHORT_LEASE: &[&str] = &["--lease-ms", "1000"];

/// A replica of each service in a process of its own, and a Prometheus that scrapes them.
struct Shop {
    prometheus: Prometheus,
    system: System,
    /// Where the command, projection and query services show their figures.
    addresses: [SocketAddr; 3],
    projection: Process,
    _others: [Process; 2],
    product: Id,
}

impl Shop {
    /// Starts replicas with these arguments: of the command, projection and query service.
    async fn open(programs: &Programs, system: System, arguments: [&[&str]; 3]) -> Self {
        let addresses = std::array::from_fn(|_| free_address());
        let [command, projection, query] = std::array::from_fn(|index| {
            start(&system, ["command", "projection", "query"][index], addresses[index], arguments[index])
        });
        system.answers("command").await;
        system.answers("query").await;
        let product = system.product(1_000_000).await.id;
        journal::caught_up(&system).await;
        let targets = targets(addresses);
        let prometheus = Prometheus::start(programs, &system, &targets).await;
        Self { prometheus, system, addresses, projection, _others: [command, query], product }
    }

    fn targets(&self) -> [(&'static str, SocketAddr); 3] {
        targets(self.addresses)
    }

    /// A client that sends commands and queries until it is told to stop. Failures are part of a trouble.
    async fn traffic(&self, enough: &AtomicBool) {
        while !enough.load(Relaxed) {
            let restock = json!({"id": self.product, "quantity": 1});
            let restocked = self.system.try_command("product.restock", restock).await;
            if let Some(position) = restocked.ok().and_then(|reply| reply.position) {
                let _ = self.system.read("product.get", json!({"id": self.product}), position).await;
            }
            self.list_orders().await;
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Sends a command, and returns the code of its failure.
    async fn restock(&self) -> Option<String> {
        let restock = json!({"id": self.product, "quantity": 1});
        let error = self.system.try_command("product.restock", restock).await.err()?;
        error.code().map(str::to_owned)
    }

    /// Sends a query, and returns the code of its failure.
    async fn list_orders(&self) -> Option<String> {
        let error = self.system.ask("qry.order.list", json!({}), &[]).await.err()?;
        error.code().map(str::to_owned)
    }

    /// Sends a query that its view cannot answer in time.
    async fn query_of_a_future_position(&self) {
        let reply = self.system.read("order.list", json!({}), self.system.head().await + 1_000_000).await;
        assert_eq!(reply.code(), "view_behind");
    }

    /// Takes the leases from the projection service for a moment, and waits until it has counted the loss.
    async fn lose_leases(&self) {
        let views = views::names().len() as f64;
        eventually("all views are led", async || {
            (self.prometheus.value("sum(watershed_view_leading)").await? == views).then_some(())
        })
        .await;
        let lost = "sum(watershed_leases_lost_total)";
        let before = self.prometheus.value(lost).await;
        let leases = self.system.views().await.collection::<Document>(layout::LEASES);
        let taken = doc! {"$set": {"holder": "somebody else", "expires": {"$add": ["$$NOW", 300]}}};
        leases.update_many(doc! {"_id": {"$regex": "@"}}, vec![taken]).await.unwrap();
        eventually("the loss is counted", async || (self.prometheus.value(lost).await > before).then_some(())).await;
    }
}

fn targets([command, projection, query]: [SocketAddr; 3]) -> [(&'static str, SocketAddr); 3] {
    [("command", command), ("projection", projection), ("query", query)]
}

/// Starts a replica that shows its figures at the address.
fn start(system: &System, service: &str, address: SocketAddr, arguments: &[&str]) -> Process {
    system.process(service, &[&["--metrics-address", &*address.to_string()], arguments].concat())
}

/// Something that shows itself as a replica built from another revision. The tests have only one build.
async fn replica_of_another_revision() -> (SocketAddr, AbortOnDropHandle<()>) {
    const REPLY: &str = "HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\n\r\n\
        watershed_build_info{service=\"query\",version=\"0.0.0\",revision=\"another\"} 1\n";
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = connection.read(&mut request).await;
            let _ = connection.write_all(REPLY.as_bytes()).await;
        }
    });
    (address, AbortOnDropHandle::new(serving))
}

/// Locks the journal's head, without which nothing can be written, until the connection rolls back.
async fn lock_head(system: &System) -> tokio_postgres::Client {
    let foreign = system.journal().await;
    foreign.batch_execute("begin; select from journal_head for update").await.unwrap();
    foreign
}

/// Takes the lock of the relay from the replica that holds it, until the connection is dropped.
async fn take_relay_lock(system: &System) -> tokio_postgres::Client {
    const HOLDER: &str = "
        select pid, (classid::bigint << 32) | objid::bigint
        from pg_locks
        where locktype = 'advisory' and granted
            and database = (select oid from pg_database where datname = current_database())";
    const WAITING: &str = "select from pg_locks where locktype = 'advisory' and not granted and pid = $1";
    let (foreign, journal) = (system.journal().await, system.journal().await);
    let holder = journal.query_one(HOLDER, &[]).await.unwrap();
    let (holder, key): (i32, i64) = (holder.get(0), holder.get(1));
    let own: i32 = foreign.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let taking = async { foreign.query("select pg_advisory_lock($1)", &[&key]).await.unwrap() };
    let ending = async {
        eventually("the lock is waited for", async || journal.query_opt(WAITING, &[&own]).await.unwrap()).await;
        journal.query("select pg_terminate_backend($1)", &[&holder]).await.unwrap()
    };
    tokio::join!(taking, ending);
    foreign
}

async fn collection(system: &System, view: &str) -> mongodb::Collection<Document> {
    system.views().await.collection(&layout::collection(view, 1))
}

/// Drops the indexes of the view of orders, without which its lists cannot be read.
async fn drop_indexes(system: &System) -> Vec<IndexModel> {
    let orders = collection(system, "orders").await;
    let indexes: Vec<IndexModel> = orders.list_indexes().await.unwrap().try_collect().await.unwrap();
    orders.drop_indexes().await.unwrap();
    indexes.into_iter().filter(|index| index.keys != doc! {"_id": 1}).collect()
}

async fn create_indexes(system: &System, indexes: Vec<IndexModel>) {
    collection(system, "orders").await.create_indexes(indexes).await.unwrap();
}

/// The expressions of the dashboard, with what Grafana puts into them.
fn panels() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().into_iter().flatten());
    targets.map(|target| target["expr"].as_str().unwrap().replace("$__rate_interval", "10s")).collect()
}

/// The figures of an alert's expression, whether or not they are as bad as the alert wants them.
fn figures(expression: &str) -> Vec<String> {
    let alternatives = expression.split(" or ").map(|figure| {
        // These demand that there is no data.
        let figure = figure.replace("absent(", "count(");
        [" > ", " < ", " == "]
            .iter()
            .fold(figure, |figure, comparison| figure.replace(comparison, &format!("{comparison}bool ")))
    });
    alternatives.collect()
}

/// The names of the figures in an expression.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !c.is_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("watershed_") || word.starts_with("process_"))
}

/// The families of figures in a reply of `/metrics`, each with the names of its samples.
fn families(metrics: &str) -> BTreeMap<String, Vec<String>> {
    let declared = metrics.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let with = |name: &str, suffixes: &[&str]| suffixes.iter().map(|suffix| format!("{name}{suffix}")).collect();
    let family = |(name, kind): (&str, &str)| match kind.trim() {
        "histogram" => (name.to_owned(), with(name, &["_bucket", "_sum", "_count"])),
        // In OpenMetrics, a family of counters has no suffix.
        "counter" if !name.ends_with("_total") => (format!("{name}_total"), with(name, &["_total"])),
        // `watershed_build` of the kind `info`.
        "info" => (format!("{name}_info"), with(name, &["_info"])),
        _ => (name.to_owned(), with(name, &[""])),
    };
    declared.map(family).collect()
}
