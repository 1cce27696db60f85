//! The SQL of the write side. Each method sends one statement the first time that it is polled, so statements whose
//! futures are joined are pipelined in the order in which they are joined: a commit never overtakes the writes before
//! it.

use std::{collections::HashSet, time::SystemTime};

use deadpool_postgres::Object;
use domain::{Claim, Id};
use tokio_postgres::{
    Error, Row, Statement,
    types::{Json, ToSql},
};
use uuid::Uuid;
use wire::{Accepted, Failure};

/// A connection on which all statements are already prepared. Preparing one later would wait for the server, and
/// statements that were joined after it would overtake it.
pub struct Session {
    client: Object,
    pub backend: Backend,
    ledger: Statement,
    peek: Statement,
    lock: Statement,
    locked: Statement,
    holders: Statement,
    events: Statement,
    store: Statement,
    release: Statement,
    claim: Statement,
    append: Statement,
    append_with_ledger: Statement,
}

/// The server process behind a connection.
#[derive(Clone, Debug)]
pub struct Backend {
    pub pid: i32,
    /// When the process started, which distinguishes it from a later one with the same identifier.
    pub started: String,
}

/// A row of `events`, to be written.
#[derive(Debug)]
pub struct EventRow {
    pub aggregate: &'static str,
    pub id: Uuid,
    pub version: u64,
    pub name: &'static str,
    pub schema: i16,
    /// The event as JSON.
    pub payload: String,
    pub actor: Option<String>,
    pub command_id: Option<String>,
    pub traceparent: Option<String>,
}

/// A row of `aggregates`, to be written.
#[derive(Debug)]
pub struct AggregateRow {
    pub id: Uuid,
    pub kind: &'static str,
    /// The version that is stored at present; 0 for a new aggregate.
    pub stored_version: u64,
    pub version: u64,
    /// The version of the state's form.
    pub form: i16,
    /// The state as JSON.
    pub state: String,
}

/// Rows of `aggregates`, one array per column.
struct AggregateColumns<'a> {
    ids: Vec<Uuid>,
    kinds: Vec<&'static str>,
    versions: Vec<i64>,
    forms: Vec<i16>,
    states: Vec<&'a str>,
}

/// The changes of a batch to aggregates, and the conditions under which they may be written. Each list is in the
/// order of the identifiers, the same in every batch.
#[derive(Debug, Default)]
pub struct Changes {
    pub created: Vec<AggregateRow>,
    pub updated: Vec<AggregateRow>,
    /// Aggregates that are not written, but must be at these versions.
    pub expected: Vec<(Id, u64)>,
    /// Identifiers of which there must be no aggregate, and which are not created either.
    pub absent: Vec<Id>,
}

/// A row of `aggregates`, as it was read.
pub struct StoredAggregate {
    pub id: Id,
    pub kind: String,
    pub version: u64,
    /// The version of the state's form.
    pub form: i16,
    /// The state as JSON.
    pub state: String,
}

/// The events of an aggregate that follow the version `after`, up to the version `last`.
pub struct EventRange {
    pub id: Id,
    pub after: u64,
    pub last: u64,
}

/// A row of `events`, as it was read.
pub struct StoredEvent {
    pub id: Id,
    pub version: u64,
    pub aggregate: String,
    pub name: String,
    pub schema: i16,
    /// The event as JSON.
    pub payload: String,
}

/// The ledger's record of a command that had an idempotency key.
#[derive(Clone, Debug)]
pub struct LedgerEntry {
    pub key: String,
    pub fingerprint: [u8; 32],
    pub answer: LedgerAnswer,
}

#[derive(Clone, Debug)]
pub enum LedgerAnswer {
    /// Until the entry is written, the position is relative to the journal's head.
    Accepted(Accepted),
    Refused(Failure),
}

/// How long a transaction waits for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockTimeout {
    /// Longer than any other lane holds a lock.
    Usual,
    /// Much shorter, for batches that may need a lock which a foreign transaction has held for a long time.
    Short,
}

/// The rows that other transactions have locked.
pub struct LockedRows {
    pub ids: HashSet<Id>,
    /// Whether the journal's head is locked, without which nothing can be written.
    pub head: bool,
}

impl Session {
    /// # Errors
    /// If a statement cannot be prepared.
    pub async fn open(client: Object) -> Result<Self, Error> {
        let backend = client.query_one(BACKEND, &[]).await?;
        Ok(Self {
            backend: Backend { pid: backend.try_get(0)?, started: backend.try_get(1)? },
            ledger: client.prepare_cached(LEDGER).await?,
            peek: client.prepare_cached(PEEK).await?,
            lock: client.prepare_cached(LOCK).await?,
            locked: client.prepare_cached(LOCKED).await?,
            holders: client.prepare_cached(HOLDERS).await?,
            events: client.prepare_cached(EVENTS).await?,
            store: client.prepare_cached(STORE).await?,
            release: client.prepare_cached(RELEASE).await?,
            claim: client.prepare_cached(CLAIM).await?,
            append: client.prepare_cached(&append(false)).await?,
            append_with_ledger: client.prepare_cached(&append(true)).await?,
            client,
        })
    }

    /// Closes the connection, whose state is unknown.
    pub fn discard(self) {
        drop(Object::take(self.client));
    }

    pub fn is_lost(&self) -> bool {
        self.client.is_closed()
    }

    pub async fn begin(&self, lock_timeout: LockTimeout) -> Result<(), Error> {
        let begin = match lock_timeout {
            LockTimeout::Usual => "begin",
            LockTimeout::Short => "begin; set local lock_timeout = '50ms'",
        };
        self.client.batch_execute(begin).await
    }

    pub async fn commit(&self) -> Result<(), Error> {
        self.client.batch_execute("commit").await
    }

    pub async fn rollback(&self) -> Result<(), Error> {
        self.client.batch_execute("rollback").await
    }

    /// The ledger's entries for these keys.
    pub async fn ledger(&self, keys: &[&str]) -> Result<Vec<LedgerEntry>, Error> {
        if keys.is_empty() {
            return Ok(vec![]);
        }
        self.client.query(&self.ledger, &[&keys]).await?.iter().map(ledger_entry).collect()
    }

    /// Reads aggregates without locking them.
    pub async fn peek(&self, ids: &[Id]) -> Result<Vec<StoredAggregate>, Error> {
        self.aggregates(&self.peek, ids).await
    }

    /// Reads aggregates, and locks them until the end of the transaction. All batches lock in the order of the
    /// identifiers, so that no two of them deadlock.
    pub async fn lock(&self, ids: &[Id]) -> Result<Vec<StoredAggregate>, Error> {
        self.aggregates(&self.lock, ids).await
    }

    /// Those of the aggregates that other transactions have locked.
    pub async fn locked(&self, ids: &[Id]) -> Result<LockedRows, Error> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        let rows = self.client.query(&self.locked, &[&ids]).await?;
        let ids = rows.iter().map(|row| Ok(Id(row.try_get(0)?))).collect::<Result<_, Error>>()?;
        let head = self.client.query(HEAD, &[]).await?.is_empty();
        Ok(LockedRows { ids, head })
    }

    async fn aggregates(&self, statement: &Statement, ids: &[Id]) -> Result<Vec<StoredAggregate>, Error> {
        let ids: Vec<Uuid> = ids.iter().map(|id| id.0).collect();
        self.client.query(statement, &[&ids]).await?.iter().map(stored_aggregate).collect()
    }

    /// Those of the claims that are held, each with its holder.
    pub async fn holders(&self, claims: &[Claim]) -> Result<Vec<(Claim, Id)>, Error> {
        if claims.is_empty() {
            return Ok(vec![]);
        }
        let (scopes, values) = columns(claims.iter());
        let rows = self.client.query(&self.holders, &[&scopes, &values]).await?;
        rows.iter()
            .map(|row| {
                let index: i64 = row.try_get(0)?;
                // `with ordinality` counts from 1.
                let claim = claims[usize::try_from(index - 1).unwrap_or_default()].clone();
                Ok((claim, Id(row.try_get(1)?)))
            })
            .collect()
    }

    /// The next events of each range, in the order of the ranges and the versions. Of each range, this is one event at
    /// least, and not more than so many events and bytes of payload but for the last.
    pub async fn events(&self, ranges: &[EventRange], events: usize, bytes: usize) -> Result<Vec<StoredEvent>, Error> {
        let ids: Vec<Uuid> = ranges.iter().map(|range| range.id.0).collect();
        let (after, last): (Vec<i64>, Vec<i64>) =
            ranges.iter().map(|range| (signed(range.after), signed(range.last))).unzip();
        let [events, bytes] = [events, bytes].map(|limit| i64::try_from(limit).unwrap_or(i64::MAX));
        let rows = self.client.query(&self.events, &[&ids, &after, &last, &events, &bytes]).await?;
        rows.iter().map(stored_event).collect()
    }

    /// Writes aggregates. Fails with a division by zero if one of them, or one that is only expected, is not at the
    /// version at which it should be stored, or if one exists that should not; and with a unique violation if another
    /// batch was first to create one.
    pub async fn store(&self, changes: &Changes) -> Result<(), Error> {
        if changes.is_empty() {
            return Ok(());
        }
        let Changes { created, updated, expected, absent } = changes;
        let updated_from: Vec<i64> = updated.iter().map(|aggregate| signed(aggregate.stored_version)).collect();
        let [created, updated] = [created, updated].map(|rows| AggregateColumns::of(rows));
        let (expected_ids, expected_versions): (Vec<Uuid>, Vec<i64>) =
            expected.iter().map(|(id, version)| (id.0, signed(*version))).unzip();
        let absent: Vec<Uuid> = absent.iter().map(|id| id.0).collect();
        let parameters: [&(dyn ToSql + Sync); 13] = [
            &created.ids,
            &created.kinds,
            &created.versions,
            &created.forms,
            &created.states,
            &updated.ids,
            &updated_from,
            &updated.versions,
            &updated.forms,
            &updated.states,
            &expected_ids,
            &expected_versions,
            &absent,
        ];
        self.client.execute(&self.store, &parameters).await?;
        Ok(())
    }

    /// Releases claims, except those that another aggregate holds by now.
    pub async fn release(&self, claims: &[(Claim, Id)]) -> Result<(), Error> {
        if claims.is_empty() {
            return Ok(());
        }
        let (scopes, values) = columns(claims.iter().map(|(claim, _)| claim));
        let ids: Vec<Uuid> = claims.iter().map(|(_, id)| id.0).collect();
        self.client.execute(&self.release, &[&scopes, &values, &ids]).await?;
        Ok(())
    }

    /// Takes claims. Fails with a unique violation if another batch was first to take one.
    pub async fn claim(&self, claims: &[(Claim, Id)]) -> Result<(), Error> {
        if claims.is_empty() {
            return Ok(());
        }
        let (scopes, values) = columns(claims.iter().map(|(claim, _)| claim));
        let ids: Vec<Uuid> = claims.iter().map(|(_, id)| id.0).collect();
        self.client.execute(&self.claim, &[&scopes, &values, &ids]).await?;
        Ok(())
    }

    /// Takes the journal's head, and writes the events at the positions that follow it, together with the ledger
    /// entries. The head is locked from here to the commit.
    pub async fn append(
        &self,
        events: &[EventRow],
        answers: &[LedgerEntry],
        at: SystemTime,
    ) -> Result<Appended, Error> {
        let number = i64::try_from(events.len()).unwrap_or_default();
        let aggregates: Vec<&str> = events.iter().map(|event| event.aggregate).collect();
        let ids: Vec<Uuid> = events.iter().map(|event| event.id).collect();
        let versions: Vec<i64> = events.iter().map(|event| signed(event.version)).collect();
        let names: Vec<&str> = events.iter().map(|event| event.name).collect();
        let schemas: Vec<i16> = events.iter().map(|event| event.schema).collect();
        let payloads: Vec<&str> = events.iter().map(|event| event.payload.as_str()).collect();
        let actors: Vec<Option<&str>> = events.iter().map(|event| event.actor.as_deref()).collect();
        let command_ids: Vec<Option<&str>> = events.iter().map(|event| event.command_id.as_deref()).collect();
        let traces: Vec<Option<&str>> = events.iter().map(|event| event.traceparent.as_deref()).collect();
        let keys: Vec<&str> = answers.iter().map(|entry| entry.key.as_str()).collect();
        let fingerprints: Vec<&[u8]> = answers.iter().map(|entry| &entry.fingerprint[..]).collect();
        let accepted: Vec<Option<Accepted>> = answers.iter().map(|entry| entry.answer.accepted()).collect();
        let answered_ids: Vec<Option<Uuid>> = accepted.iter().map(|accepted| accepted.map(|it| it.id.0)).collect();
        let answered_versions: Vec<Option<i64>> =
            accepted.iter().map(|accepted| accepted.map(|it| signed(it.version))).collect();
        let offsets: Vec<Option<i64>> =
            accepted.iter().map(|accepted| accepted.map(|it| signed(it.position))).collect();
        let failures: Vec<Option<Json<&Failure>>> =
            answers.iter().map(|entry| entry.answer.failure().map(Json)).collect();
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![
            &number,
            &at,
            &aggregates,
            &ids,
            &versions,
            &names,
            &schemas,
            &payloads,
            &actors,
            &command_ids,
            &traces,
        ];
        let ledger_entries: [&(dyn ToSql + Sync); 6] =
            [&keys, &fingerprints, &answered_ids, &answered_versions, &offsets, &failures];
        let statement = if answers.is_empty() {
            &self.append
        } else {
            parameters.extend(ledger_entries);
            &self.append_with_ledger
        };
        let row = self.client.query_one(statement, &parameters).await?;
        Ok(Appended { base: row.try_get(0)?, transaction: row.try_get(1)? })
    }
}

/// The result of appending events.
pub struct Appended {
    /// The position before the first event.
    pub base: i64,
    /// PostgreSQL's identifier of the transaction, to find out what became of it if the connection is lost.
    pub transaction: String,
}

impl Changes {
    fn is_empty(&self) -> bool {
        let Self { created, updated, expected, absent } = self;
        created.is_empty() && updated.is_empty() && expected.is_empty() && absent.is_empty()
    }
}

impl LedgerAnswer {
    fn accepted(&self) -> Option<Accepted> {
        match self {
            Self::Accepted(accepted) => Some(*accepted),
            Self::Refused(_) => None,
        }
    }

    fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Accepted(_) => None,
            Self::Refused(failure) => Some(failure),
        }
    }
}

const LEDGER: &str = "
    select key, request, id, version, position, failure
    from commands
    where key = any($1)";

const PEEK: &str = "
    select id, kind, version, form, state::text
    from aggregates
    where id = any($1)";

const LOCK: &str = "
    select id, kind, version, form, state::text
    from aggregates
    where id = any($1)
    order by id
    for update";

/// Each row that is free is locked for an instant. Nobody has to wait longer than that, and the query never waits.
const LOCKED: &str = "
    with free as (
        select id
        from aggregates
        where id = any($1)
        for update skip locked
    )
    select id
    from aggregates
    where id = any($1) and id not in (select id from free)";

const HEAD: &str = "
    select
    from journal_head
    for update skip locked";

const HOLDERS: &str = "
    select wanted.ordinal, claims.id
    from unnest($1::text[], $2::text[]) with ordinality as wanted (scope, value, ordinal)
    join claims using (scope, value)";

/// Each range is read by the index of the aggregate's versions, no further than the limits.
const EVENTS: &str = "
    select range.id, version, aggregate, type, schema, payload
    from unnest($1::uuid[], $2::bigint[], $3::bigint[]) with ordinality as range (id, after, last, ordinal)
    cross join lateral (
        select version, aggregate, type, schema, payload,
            sum(octet_length(payload)) over (order by version) - octet_length(payload) as bytes_before
        from (
            select version, aggregate, type, schema, payload::text
            from events
            where events.id = range.id and version > range.after and version <= range.last
            order by version
            limit $4
        ) as next
    ) as event
    where bytes_before < $5
    order by ordinal, version";

const BACKEND: &str = "
    select pid, backend_start::text
    from pg_stat_activity
    where pid = pg_backend_pid()";

/// Expected aggregates are locked against changes until the end of the transaction. Statements after this one have
/// been sent already, so only an error can stop them.
const STORE: &str = "
    with created as (
        insert into aggregates (id, kind, version, form, state)
        select id, kind, version, form, state::json
        from unnest($1::uuid[], $2::text[], $3::bigint[], $4::smallint[], $5::text[])
            as created (id, kind, version, form, state)
    ), updated as (
        update aggregates
        set version = updated.version, form = updated.form, state = updated.state::json
        from unnest($6::uuid[], $7::bigint[], $8::bigint[], $9::smallint[], $10::text[])
            as updated (id, stored, version, form, state)
        where aggregates.id = updated.id and aggregates.version = updated.stored
        returning 1
    ), expected as (
        select aggregates.id
        from aggregates
        join unnest($11::uuid[], $12::bigint[]) as expected (id, version) using (id, version)
        order by aggregates.id
        for share of aggregates
    )
    select 1 / (
        (select count(*) from updated) = cardinality($6)
        and (select count(*) from expected) = cardinality($11)
        and not exists (select from aggregates where id = any($13::uuid[]))
    )::int";

const RELEASE: &str = "
    delete from claims
    using unnest($1::text[], $2::text[], $3::uuid[]) as released (scope, value, id)
    where claims.scope = released.scope and claims.value = released.value and claims.id = released.id";

const CLAIM: &str = "
    insert into claims (scope, value, id)
    select scope, value, id
    from unnest($1::text[], $2::text[], $3::uuid[]) as taken (scope, value, id)";

/// The statement that appends events. The part for the ledger is left out where no command has a key, as in most
/// batches.
fn append(with_ledger: bool) -> String {
    let ledger_entries = if with_ledger { LEDGER_ENTRIES } else { "" };
    format!(
        "with head as (
            update journal_head
            set position = position + $1
            returning position - $1 as base
        ), appended as (
            insert into events
                (position, aggregate, id, version, type, schema, payload, at, actor, command_id, traceparent)
            select head.base + ordinal, aggregate, id, version, type, schema, payload::json, $2,
                actor, command_id, traceparent
            from head, unnest(
                $3::text[], $4::uuid[], $5::bigint[], $6::text[], $7::smallint[], $8::text[],
                $9::text[], $10::text[], $11::text[]
            ) with ordinality as event
                (aggregate, id, version, type, schema, payload, actor, command_id, traceparent, ordinal)
        ) {ledger_entries}
        select base, pg_current_xact_id()::text from head"
    )
}

const LEDGER_ENTRIES: &str = ", answered as (
            insert into commands (key, request, id, version, position, failure, at)
            select key, request, id, version, head.base + events, failure, $2
            from head, unnest($12::text[], $13::bytea[], $14::uuid[], $15::bigint[], $16::bigint[], $17::json[])
                as answer (key, request, id, version, events, failure)
        )";

fn stored_aggregate(row: &Row) -> Result<StoredAggregate, Error> {
    Ok(StoredAggregate {
        id: Id(row.try_get(0)?),
        kind: row.try_get(1)?,
        version: unsigned(row.try_get(2)?),
        form: row.try_get(3)?,
        state: row.try_get(4)?,
    })
}

fn stored_event(row: &Row) -> Result<StoredEvent, Error> {
    Ok(StoredEvent {
        id: Id(row.try_get(0)?),
        version: unsigned(row.try_get(1)?),
        aggregate: row.try_get(2)?,
        name: row.try_get(3)?,
        schema: row.try_get(4)?,
        payload: row.try_get(5)?,
    })
}

fn ledger_entry(row: &Row) -> Result<LedgerEntry, Error> {
    let fingerprint: &[u8] = row.try_get(1)?;
    let answer = match row.try_get::<_, Option<Json<Failure>>>(5)? {
        Some(Json(failure)) => LedgerAnswer::Refused(failure),
        None => LedgerAnswer::Accepted(Accepted {
            id: Id(row.try_get(2)?),
            version: unsigned(row.try_get(3)?),
            position: unsigned(row.try_get(4)?),
        }),
    };
    Ok(LedgerEntry { key: row.try_get(0)?, fingerprint: fingerprint.try_into().unwrap_or_default(), answer })
}

fn columns<'a>(claims: impl Iterator<Item = &'a Claim>) -> (Vec<&'static str>, Vec<&'a str>) {
    claims.map(|claim| (claim.scope, claim.value.as_str())).unzip()
}

impl<'a> AggregateColumns<'a> {
    fn of(rows: &'a [AggregateRow]) -> Self {
        Self {
            ids: rows.iter().map(|row| row.id).collect(),
            kinds: rows.iter().map(|row| row.kind).collect(),
            versions: rows.iter().map(|row| signed(row.version)).collect(),
            forms: rows.iter().map(|row| row.form).collect(),
            states: rows.iter().map(|row| &*row.state).collect(),
        }
    }
}

/// PostgreSQL has no unsigned numbers; versions and positions count from 1 and never come near the end of `bigint`.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
