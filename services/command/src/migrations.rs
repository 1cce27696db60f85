//! The migrations of the schema. Each runs exactly once: replicas that start together wait for one another.

use domain::{Claim, Event, State, Undecodable};
use tokio_postgres::{Client, Error, Transaction};
use uuid::Uuid;

enum Migration {
    Statements(&'static str),
    /// Derives all claims from the aggregates' events again, by the present rules.
    RebuildClaims,
}

/// In order. A released migration is never changed; new ones are added.
const MIGRATIONS: &[(i32, Migration)] = &[
    (1, Migration::Statements(include_str!("../migrations/0001_journal.sql"))),
    (2, Migration::Statements(include_str!("../migrations/0002_identity.sql"))),
    // Addresses used to be compared in lower case, and SKUs as they were; now both are compared by how they look.
    (3, Migration::RebuildClaims),
    (4, Migration::Statements(include_str!("../migrations/0004_lineage.sql"))),
    (5, Migration::Statements(include_str!("../migrations/0005_forms.sql"))),
];

/// The key of the advisory lock that lets one replica migrate at a time. An arbitrary number.
const LOCK: i64 = 0x7761_7465_7273;

/// # Errors
/// If a statement fails; then nothing of this run has been applied.
pub async fn migrate(client: &mut Client) -> Result<(), Error> {
    let transaction = client.transaction().await?;
    // No time limits: a table may be large, and another replica may be migrating.
    transaction.batch_execute("set local statement_timeout = 0; set local lock_timeout = 0").await?;
    transaction.execute("select pg_advisory_xact_lock($1)", &[&LOCK]).await?;
    transaction
        .batch_execute(
            "create table if not exists migrations (
                 version integer primary key,
                 applied_at timestamptz not null default now()
             )",
        )
        .await?;
    let applied: Vec<i32> =
        transaction.query_one("select coalesce(array_agg(version), '{}') from migrations", &[]).await?.try_get(0)?;
    for (version, migration) in MIGRATIONS.iter().filter(|(version, _)| !applied.contains(version)) {
        match migration {
            Migration::Statements(statements) => transaction.batch_execute(statements).await?,
            Migration::RebuildClaims => rebuild_claims(&transaction).await?,
        }
        transaction.execute("insert into migrations (version) values ($1)", &[version]).await?;
        tracing::info!(version, "applied a schema migration");
    }
    transaction.commit().await
}

/// If two aggregates claim what is now the same value, the claim goes to the one that has the value in its present
/// form, otherwise to the older one. The other keeps its address or SKU without a claim.
async fn rebuild_claims(transaction: &Transaction<'_>) -> Result<(), Error> {
    let (mut scopes, mut values, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for row in transaction.query(CLAIMANTS, &[]).await? {
        let (id, kind): (Uuid, &str) = (row.try_get(0)?, row.try_get(1)?);
        // The stored state may be of a form that this program does not read.
        let mut folded: Result<Option<State>, Undecodable> = Ok(None);
        for event in transaction.query(EVENTS, &[&id]).await? {
            let (name, schema, payload): (&str, i16, &str) = (event.try_get(0)?, event.try_get(1)?, event.try_get(2)?);
            folded = folded.and_then(|before| {
                Event::decode(kind, name, schema, payload.as_bytes()).map(|event| State::evolve(before, &event))
            });
        }
        match folded {
            Ok(state) => state.iter().flat_map(State::claims).for_each(|Claim { scope, value }| {
                scopes.push(scope);
                values.push(value);
                ids.push(id);
            }),
            Err(error) => {
                tracing::error!(%id, kind, %error, "the events of an aggregate cannot be read: its claims are lost");
            }
        }
    }
    transaction.execute("delete from claims where octet_length(value) > char_length(value)", &[]).await?;
    transaction.execute(CLAIM, &[&scopes, &values, &ids]).await?;
    Ok(())
}

/// The holders of values that are not ASCII, in the order of their first events. ASCII values are compared as before.
const CLAIMANTS: &str = "
    select aggregates.id, kind
    from aggregates
    join events on events.id = aggregates.id and events.version = 1
    where aggregates.id in (select id from claims where octet_length(value) > char_length(value))
    order by events.position";

const EVENTS: &str = "
    select type, schema, payload::text
    from events
    where id = $1
    order by version";

const CLAIM: &str = "
    insert into claims (scope, value, id)
    select scope, value, id
    from unnest($1::text[], $2::text[], $3::uuid[]) with ordinality as claimed (scope, value, id, ordinal)
    order by ordinal
    on conflict do nothing";
