//! The schema's migrations, each run once, whoever comes first: replicas that start together wait for one another.

use tokio_postgres::Client;

/// In order; what has been released is never changed, only added to.
const MIGRATIONS: &[(i32, &str)] =
    &[(1, include_str!("../migrations/0001_journal.sql")), (2, include_str!("../migrations/0002_identity.sql"))];

/// Any number, the same for all replicas.
const LOCK: i64 = 0x7761_7465_7273;

/// # Errors
/// If a statement fails; then nothing of this run has been applied.
pub async fn migrate(client: &mut Client) -> Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    // A table may be large, and another replica may be at it.
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
    let applied: i32 = transaction.query_one("select coalesce(max(version), 0) from migrations", &[]).await?.get(0);
    for (version, statements) in MIGRATIONS.iter().filter(|(version, _)| *version > applied) {
        transaction.batch_execute(statements).await?;
        transaction.execute("insert into migrations (version) values ($1)", &[version]).await?;
        tracing::info!(version, "schema migrated");
    }
    transaction.commit().await
}
