//! The bare parts, to which Watershed is compared: the servers themselves with the same rows, messages and documents,
//! but without a domain. Each does the same work in the fewest round trips that its driver allows.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::SystemTime,
};

use async_nats::{HeaderMap, HeaderValue, Subscriber, jetstream};
use bson::{Document, RawDocumentBuf, doc};
use bytes::Bytes;
use deadpool_postgres::{Manager, Pool};
use futures_util::{StreamExt, TryStreamExt, join};
use mongodb::{
    Client, Collection, Database, IndexModel,
    options::{ClientOptions, Hint, WriteConcern},
};
use tokio_postgres::{NoTls, types::ToSql};
use uuid::Uuid;

use super::load::random;
use crate::System;

/// Orders in one batch.
pub const BATCH: usize = 256;
/// Events of an order with two lines.
pub const EVENTS: u64 = 3;

/// PostgreSQL, with copies of the journal's tables.
#[derive(Clone)]
pub struct Postgres {
    pool: Pool,
    users: Vec<Uuid>,
    products: Vec<Uuid>,
    /// JSON of the same length as the state and the three events of an order with two lines.
    state: String,
    payloads: [String; 3],
}

impl Postgres {
    pub async fn new(system: &System, connections: usize, users: &[Uuid], products: &[Uuid]) -> Self {
        let manager = Manager::new(system.postgres_url().parse().expect("the URL can be read"), NoTls);
        let pool = Pool::builder(manager).max_size(connections).build().expect("a pool");
        let client = pool.get().await.expect("a connection");
        client.batch_execute(TABLES).await.expect("the tables can be made");
        let order = client.query_one(SAMPLE, &[]).await.expect("there is an order");
        let payload = |index| order.get::<_, String>(index);
        let (state, payloads) = (payload(0), [payload(1), payload(2), payload(2)]);
        drop(client);
        Self { pool, users: users.to_vec(), products: products.to_vec(), state, payloads }
    }

    /// Takes two products out of stock, and writes an order, its three events and the head, in one transaction and two
    /// round trips.
    pub async fn order(&self) {
        let client = self.pool.get().await.expect("a connection");
        let lock = client.prepare_cached(LOCK).await.expect("prepared");
        let write = client.prepare_cached(WRITE).await.expect("prepared");
        let (user, orders) = (self.users[random(self.users.len())], [Uuid::now_v7()]);
        let taken = self.taken(1);
        let touched = vec![user, taken[0], taken[1]];
        let locked: [&(dyn ToSql + Sync); 1] = [&touched];
        let (begun, locked) = join!(client.batch_execute("begin"), client.query(&lock, &locked));
        begun.expect("begun");
        locked.expect("locked");
        let rows = self.rows(&orders, &taken);
        let parameters = rows.parameters();
        let (written, committed) = join!(client.execute(&write, &parameters), client.batch_execute("commit"));
        assert_eq!(written.expect("written"), EVENTS);
        committed.expect("committed");
    }

    /// Writes the same rows for 256 orders, in one transaction and one round trip.
    pub async fn batch(&self) {
        let client = self.pool.get().await.expect("a connection");
        let write = client.prepare_cached(WRITE).await.expect("prepared");
        let orders: Vec<Uuid> = (0..BATCH).map(|_| Uuid::now_v7()).collect();
        let taken = self.taken(BATCH);
        let rows = self.rows(&orders, &taken);
        let parameters = rows.parameters();
        let (begun, written, committed) =
            join!(client.batch_execute("begin"), client.execute(&write, &parameters), client.batch_execute("commit"));
        begun.expect("begun");
        assert_eq!(written.expect("written"), BATCH as u64 * EVENTS);
        committed.expect("committed");
    }

    /// Two products for each order. They are sorted, so that no two transactions deadlock.
    fn taken(&self, orders: usize) -> Vec<Uuid> {
        let mut taken: Vec<Uuid> = (0..2 * orders).map(|_| self.products[random(self.products.len())]).collect();
        taken.sort_unstable();
        taken
    }

    fn rows<'a>(&'a self, orders: &'a [Uuid], taken: &'a [Uuid]) -> Rows<'a> {
        let (placed, stock) = (orders.iter().map(|id| (*id, 0)), taken.iter().map(|id| (*id, 1)));
        let events = placed.chain(stock);
        let (ids, payloads) = events.map(|(id, payload)| (id, self.payloads[payload].as_str())).unzip();
        Rows { ids, payloads, now: SystemTime::now(), orders, taken, state: &self.state, stock: &self.payloads[1] }
    }
}

struct Rows<'a> {
    ids: Vec<Uuid>,
    payloads: Vec<&'a str>,
    now: SystemTime,
    orders: &'a [Uuid],
    taken: &'a [Uuid],
    state: &'a str,
    stock: &'a str,
}

impl Rows<'_> {
    fn parameters(&self) -> [&(dyn ToSql + Sync); 7] {
        [&self.ids, &self.payloads, &self.now, &self.orders, &self.taken, &self.state, &self.stock]
    }
}

const TABLES: &str = "
    create table if not exists bare_head (position bigint not null) with (fillfactor = 10);
    insert into bare_head select 0 where not exists (select from bare_head);
    create table if not exists bare_events (like events including all);
    create table if not exists bare_aggregates (like aggregates including all);
    alter table bare_aggregates set (fillfactor = 70);
    insert into bare_aggregates select * from aggregates where kind <> 'order' on conflict do nothing";

const SAMPLE: &str = "
    select aggregates.state::text, placed.payload::text, taken.payload::text
    from aggregates
    join events placed using (id)
    join events taken on taken.position = placed.position + 1
    where aggregates.kind = 'order'
    limit 1";

const LOCK: &str =
    "select id, kind, version, state::text from bare_aggregates where id = any($1) order by id for update";

const WRITE: &str = "
    with taken as (
        update bare_aggregates set version = version + 1, state = $7::text::json where id = any($5)
    ), made as (
        insert into bare_aggregates (id, kind, version, state)
        select id, 'order', 1, $6::text::json from unnest($4::uuid[]) as made (id)
    ), head as (
        update bare_head set position = position + cardinality($1::uuid[])
        returning position - cardinality($1::uuid[]) as base
    )
    insert into bare_events (position, aggregate, id, version, type, schema, payload, at)
    select head.base + ordinal, 'order', id, head.base + ordinal, 'placed', 1, payload::json, $3
    from head, unnest($1::uuid[], $2::text[]) with ordinality as event (id, payload, ordinal)";

/// JetStream, with a stream of its own.
pub struct Stream {
    nats: async_nats::Client,
    jetstream: jetstream::Context,
    subject: String,
    headers: HeaderMap,
    payloads: [Bytes; 3],
    last: AtomicU64,
}

impl Stream {
    pub async fn new(system: &System, postgres: &Postgres) -> Self {
        let nats = system.operator().await;
        let jetstream = jetstream::new(nats.clone());
        let subject = format!("bare.{}", Uuid::now_v7().simple());
        let config = jetstream::stream::Config {
            name: subject.replace('.', "_"),
            subjects: vec![subject.clone()],
            allow_atomic_publish: true,
            ..jetstream::stream::Config::default()
        };
        jetstream.create_stream(config).await.expect("a stream");
        let mut headers = HeaderMap::new();
        headers.insert("Aggregate-Id", Uuid::now_v7().to_string());
        headers.insert("Aggregate-Version", "1");
        headers.insert("Event-Schema", "1");
        headers.insert("Recorded-At", "2026-01-31T09:30:00.125Z");
        let payloads = postgres.payloads.clone().map(Bytes::from);
        Self { nats, jetstream, subject, headers, payloads, last: AtomicU64::new(0) }
    }

    /// Publishes the events of 256 orders as one atomic batch that expects the stream's last sequence.
    pub async fn batch(&self) {
        use async_nats::header::{NATS_BATCH_COMMIT, NATS_BATCH_ID, NATS_BATCH_SEQUENCE, NATS_EXPECTED_LAST_SEQUENCE};

        let id = Uuid::now_v7().simple().to_string();
        let (events, last) = (BATCH as u64 * EVENTS, self.last.load(Relaxed));
        for sequence in 1..=events {
            let mut headers = self.headers.clone();
            headers.insert(NATS_BATCH_ID, id.as_str());
            headers.insert(NATS_BATCH_SEQUENCE, HeaderValue::from(sequence));
            if sequence == 1 {
                headers.insert(NATS_EXPECTED_LAST_SEQUENCE, HeaderValue::from(last));
            }
            let payload = self.payloads[(sequence % EVENTS) as usize].clone();
            if sequence < events {
                self.nats.publish_with_headers(self.subject.clone(), headers, payload).await.expect("published");
                continue;
            }
            headers.insert(NATS_BATCH_COMMIT, "1");
            let published = self.jetstream.publish_with_headers(self.subject.clone(), headers, payload).await;
            let acknowledged = published.expect("published").await.expect("the stream takes the batch");
            assert_eq!(acknowledged.sequence, last + events);
            self.last.store(acknowledged.sequence, Relaxed);
        }
    }
}

/// MongoDB, with copies of the views' collections and indexes.
#[derive(Clone)]
pub struct Mongo {
    /// The database of the views themselves.
    pub views: Database,
    client: Client,
    name: String,
    /// A document of the view `orders`.
    sample: Document,
    /// Identifiers of documents of the other views.
    users: Vec<String>,
    products: Vec<String>,
    sales: Vec<String>,
}

impl Mongo {
    /// A database without documents.
    pub async fn empty(system: &System) -> Self {
        let mut options = ClientOptions::parse(system.stack.url("MONGODB_URL")).await.expect("the URL can be read");
        options.max_pool_size = Some(64);
        options.write_concern = Some(WriteConcern::majority());
        let client = Client::with_options(options).expect("a client");
        let views = client.database(&system.prefix);
        let name = format!("{}_bare", system.prefix);
        let (sample, users, products, sales) = (Document::new(), vec![], vec![], vec![]);
        Self { views, client, name, sample, users, products, sales }
    }

    pub async fn new(system: &System) -> Self {
        let mut mongo = Self::empty(system).await;
        let sample = mongo.orders_collection().find_one(doc! {}).await.expect("MongoDB answers");
        mongo.sample = Document::try_from(&sample.expect("there is an order")).expect("a document");
        mongo.users = mongo.copy("users").await;
        mongo.products = mongo.copy("products").await;
        mongo.sales = mongo.copy("sales").await;
        mongo.orders(vec![]).await;
        mongo
    }

    pub fn orders_collection(&self) -> Collection<RawDocumentBuf> {
        self.views.collection("orders@1")
    }

    pub fn database(&self) -> Database {
        self.client.database(&self.name)
    }

    /// Copies a view with its indexes, and returns up to 1,000 identifiers.
    async fn copy(&self, view: &str) -> Vec<String> {
        let from = self.views.collection::<Document>(&format!("{view}@1"));
        let out = doc! { "$out": { "db": &self.name, "coll": view } };
        from.aggregate([out]).await.expect("copied");
        self.index(view).await;
        let find = from.find(doc! {}).projection(doc! { "_id": 1 }).limit(1_000);
        let ids: Vec<Document> = find.await.expect("found").try_collect().await.expect("read");
        ids.iter().map(|id| id.get_str("_id").expect("a string").to_owned()).collect()
    }

    /// Creates the indexes of a view.
    pub async fn index(&self, view: &str) {
        let from = self.views.collection::<Document>(&format!("{view}@1"));
        let indexes: Vec<IndexModel> = from.list_indexes().await.expect("listed").try_collect().await.expect("read");
        let indexes = indexes.into_iter().filter(|index| !index.keys.contains_key("_id") || index.keys.len() > 1);
        let to = self.database().collection::<Document>(view);
        to.create_indexes(indexes).await.expect("the indexes can be made");
    }

    /// Empties the collection of orders, and creates the indexes of the view.
    async fn orders(&self, first: Vec<Document>) {
        let orders = self.database().collection::<Document>("orders");
        orders.drop().await.expect("dropped");
        if !first.is_empty() {
            orders.insert_many(first).await.expect("inserted");
        }
        self.index("orders").await;
    }

    /// Order documents with new identifiers.
    fn documents(&self, number: usize) -> Vec<Document> {
        let document = |_| {
            let mut document = self.sample.clone();
            document.insert("_id", Uuid::now_v7().to_string());
            if !self.users.is_empty() {
                document.insert("user", &self.users[random(self.users.len())]);
            }
            document
        };
        (0..number).map(document).collect()
    }

    /// Writes as many documents as the views do for 256 orders, in one transaction: the orders, and one change for each
    /// of the users, the products, the day and its products.
    pub async fn batch(&self) {
        let mut session = self.client.start_session().await.expect("a session");
        session.start_transaction().write_concern(WriteConcern::majority()).await.expect("begun");
        let database = self.database();
        let insert = doc! { "insert": "orders", "documents": self.documents(BATCH) };
        checked(database.run_command(insert).session(&mut session).await, BATCH);
        let pick = |from: &[String], number: usize| {
            let mut ids: Vec<&String> = (0..number).map(|_| &from[random(from.len())]).collect();
            ids.sort_unstable();
            ids.dedup();
            ids.into_iter().cloned().collect::<Vec<_>>()
        };
        let changes = [
            ("users", pick(&self.users, BATCH), doc! { "$inc": { "orders": 1_i64 } }),
            (
                "products",
                pick(&self.products[..self.products.len().min(500)], 2 * BATCH),
                doc! { "$inc": { "stock": -1_i64 } },
            ),
            ("sales", pick(&self.sales[..self.sales.len().min(500)], 2 * BATCH), doc! { "$inc": { "units": 1_i64 } }),
        ];
        for (collection, ids, change) in changes {
            let updates: Vec<Document> =
                ids.iter().map(|id| doc! { "q": { "_id": id }, "u": change.clone() }).collect();
            let update = doc! { "update": collection, "updates": updates };
            checked(database.run_command(update).session(&mut session).await, ids.len());
        }
        session.commit_transaction().await.expect("committed");
    }

    /// Inserts the documents, 1,000 at a time.
    pub async fn bulk(&self, collection: &str, documents: Vec<RawDocumentBuf>) {
        let collection = self.database().collection::<RawDocumentBuf>(collection);
        for documents in documents.chunks(UPSERTS) {
            collection.insert_many(documents).ordered(false).await.expect("inserted");
        }
    }

    /// Upserts 1,000 orders.
    pub async fn upserts(&self) {
        let updates: Vec<Document> = self
            .documents(UPSERTS)
            .into_iter()
            .map(|document| doc! { "q": { "_id": document.get("_id") }, "u": document, "upsert": true })
            .collect();
        let update = doc! { "update": "orders", "updates": updates, "writeConcern": { "w": "majority" } };
        checked(self.database().run_command(update).await, UPSERTS);
    }

    /// Inserts one document, committed by a majority.
    pub async fn insert(&self) {
        let document = self.documents(1).remove(0);
        self.database().collection::<Document>("orders").insert_one(document).await.expect("inserted");
    }

    /// Reads the documents of a page without decoding them, and returns their number.
    pub async fn page(&self, collection: &str, list: views::List) -> usize {
        let collection = self.views.collection::<RawDocumentBuf>(collection);
        let find = collection.find(list.filter).sort(list.sort).hint(Hint::Keys(list.hint)).limit(list.limit);
        let batch_size = u32::try_from(list.limit + 1).expect("a small page");
        let mut replies = find.batch_size(batch_size).batch().await.expect("found");
        let mut documents = 0;
        while let Some(reply) = replies.next().await {
            documents += reply.expect("read").doc_slices().expect("documents").into_iter().count();
        }
        documents
    }
}

/// Documents in one command of [`Mongo::upserts`] and [`Mongo::bulk`].
pub const UPSERTS: usize = 1_000;

fn checked(reply: mongodb::error::Result<Document>, documents: usize) {
    let reply = reply.expect("MongoDB takes the command");
    assert_eq!(reply.get("writeErrors"), None);
    assert_eq!(reply.get_i32("n").ok(), i32::try_from(documents).ok());
}

/// Answers every request with this many bytes until the process is killed, as a service without any logic would.
///
/// # Errors
/// If NATS is unavailable.
pub async fn echo(url: &str, subject: String, bytes: usize) -> anyhow::Result<()> {
    let (options, servers) = wire::nats_options(url)?;
    let client = options.connect(servers).await?;
    let mut requests: Subscriber = client.subscribe(subject).await?;
    let body = Bytes::from(vec![b'x'; bytes]);
    while let Some(request) = requests.next().await {
        if let Some(reply) = request.reply {
            client.publish(reply, body.clone()).await?;
        }
    }
    Ok(())
}
