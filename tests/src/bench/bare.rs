//! The bare part that an order is held against: one PostgreSQL transaction per order that writes the same rows, pipelined
//! in two round trips, without NATS and without a domain.

use std::time::SystemTime;

use deadpool_postgres::{Manager, Pool};
use futures_util::join;
use tokio_postgres::{NoTls, types::ToSql};
use uuid::Uuid;

use super::load::random;

pub struct Bare {
    pool: Pool,
}

impl Bare {
    /// Has tables of its own, like the journal's.
    pub async fn new(url: &str, connections: usize) -> Self {
        let manager = Manager::new(url.parse().expect("the URL can be read"), NoTls);
        let pool = Pool::builder(manager).max_size(connections).build().expect("a pool");
        let client = pool.get().await.expect("a connection");
        client.batch_execute(TABLES).await.expect("the tables can be made");
        Self { pool }
    }

    /// Takes the pieces of two products, and writes an order, its three events and the head.
    pub async fn order(&self, users: &[Uuid], products: &[Uuid]) {
        let client = self.pool.get().await.expect("a connection");
        let (lock, write) = (client.prepare_cached(LOCK).await, client.prepare_cached(WRITE).await);
        let (lock, write) = (lock.expect("prepared"), write.expect("prepared"));
        let (user, order) = (users[random(users.len())], Uuid::now_v7());
        let mut taken = vec![products[random(products.len())], products[random(products.len())]];
        taken.sort_unstable();
        let touched = vec![user, taken[0], taken[1]];
        let locked: [&(dyn ToSql + Sync); 1] = [&touched];
        let (begun, locked) = join!(client.batch_execute("begin"), client.query(&lock, &locked));
        begun.expect("begun");
        locked.expect("locked");
        let ids = vec![order, taken[0], taken[1]];
        // As long as those of an order of two lines.
        let (placed, stock) = ("x".repeat(420), "x".repeat(90));
        let payload = |text: &str| format!("{{\"text\":\"{text}\"}}");
        let payloads = vec![payload(&placed), payload(&stock), payload(&stock)];
        let now = SystemTime::now();
        let rows: [&(dyn ToSql + Sync); 5] = [&ids, &payloads, &now, &order, &taken];
        let (written, committed) = join!(client.execute(&write, &rows), client.batch_execute("commit"),);
        written.expect("written");
        committed.expect("committed");
    }
}

const TABLES: &str = "
    create table if not exists bare_head (position bigint not null) with (fillfactor = 10);
    insert into bare_head select 0 where not exists (select from bare_head);
    create table if not exists bare_events (like events including all);
    create table if not exists bare_aggregates (like aggregates including all);
    insert into bare_aggregates select * from aggregates on conflict do nothing;
    alter table bare_aggregates set (fillfactor = 70)";

const LOCK: &str =
    "select id, kind, version, state::text from bare_aggregates where id = any($1) order by id for update";

const WRITE: &str = "
    with taken as (
        update bare_aggregates set version = version + 1 where id = any($5)
    ), made as (
        insert into bare_aggregates (id, kind, version, state) select $4, 'order', 1, ($2::text[])[1]::json
    ), head as (
        update bare_head set position = position + 3 returning position - 3 as base
    )
    insert into bare_events (position, aggregate, id, version, type, schema, payload, at)
    select head.base + ordinal, 'order', id, head.base + ordinal, 'placed', 1, payload::json, $3
    from head, unnest($1::uuid[], $2::text[]) with ordinality as event (id, payload, ordinal)";
