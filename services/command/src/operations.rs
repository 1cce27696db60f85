//! The operations of the command service.

use std::{sync::Arc, time::Duration};

use runtime::{
    Monitor, Nats, StreamState,
    micro::Endpoint,
    operations::{Operation, endpoint},
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;
use uuid::Uuid;
use wire::{Code, Failure};

use crate::{
    Config,
    branching::BranchJournal,
    journal::unsigned,
    postgres::{Postgres, describe, with_timeout},
    relay,
};

/// How long to wait for another replica to tell of itself after the last one.
const QUIET: Duration = Duration::from_millis(300);
/// How long to wait for all replicas.
const GATHER: Duration = Duration::from_millis(1_500);

/// The type of what the replicas answer (ADR-32).
const STATS: &str = "io.nats.micro.v1.stats_response";

/// What the operations work on.
pub struct Context {
    pub postgres: Postgres,
    pub nats: Nats,
    pub config: Config,
    pub monitor: Monitor,
}

/// All operations of the service, a line each.
pub fn endpoints(context: &Arc<Context>, tasks: &TaskTracker) -> Vec<Endpoint> {
    let subjects = &context.nats.subjects;
    vec![
        endpoint::<ShowJournal>(subjects, context, tasks),
        endpoint::<BranchJournal>(subjects, context, tasks),
        endpoint::<ListReplicas>(subjects, context, tasks),
    ]
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ShowJournal {}

impl Operation for ShowJournal {
    const NOUN: &'static str = "journal";
    const VERB: &'static str = "show";
    const DESCRIPTION: &'static str =
        "The journal's identity, branch and last position, the stream's, and who runs the relay";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let journal = read_journal(&context.postgres).await.map_err(|error| {
            tracing::warn!(reason = describe(&error), "the journal cannot be shown");
            Failure::new(Code::Unavailable, "the journal's database is unavailable")
        })?;
        let stream = context.nats.stream_state(&context.config.nats.stream).await.map_err(|error| {
            tracing::warn!(reason = describe(&error), "the stream cannot be shown");
            Failure::new(Code::Unavailable, "NATS does not tell the state of the stream")
        })?;
        let stream = stream.map(|StreamState { messages, bytes, last_sequence }| {
            json!({ "name": context.config.nats.stream, "position": last_sequence, "messages": messages, "bytes": bytes })
        });
        let Journal { identity, branch, position, relay } = journal;
        Ok(json!({ "journal": identity, "branch": branch, "position": position, "stream": stream, "relay": relay }))
    }
}

struct Journal {
    identity: Uuid,
    branch: Uuid,
    position: u64,
    /// The replica that holds the relay's lock.
    relay: Option<String>,
}

async fn read_journal(postgres: &Postgres) -> anyhow::Result<Journal> {
    let client = postgres.get().await?;
    let row = with_timeout(client.query_one(JOURNAL, &[&relay::LOCK])).await?;
    let connection: Option<String> = row.try_get(2)?;
    let relay = connection.and_then(|name| name.strip_prefix(relay::CONNECTION).map(str::to_owned));
    let position = unsigned(row.try_get(1)?);
    Ok(Journal { identity: row.try_get(0)?, branch: row.try_get(3)?, position, relay })
}

/// An advisory lock's 64-bit key is in two halves of `pg_locks`.
const JOURNAL: &str = "
    select journal, position, (
        select application_name
        from pg_locks join pg_stat_activity using (pid)
        where locktype = 'advisory' and granted and database = (select oid from pg_database where datname = current_database())
            and classid::bigint << 32 | objid::bigint = $1
        limit 1
    ), branch
    from journal_head";

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ListReplicas {}

impl Operation for ListReplicas {
    const NOUN: &'static str = "replica";
    const VERB: &'static str = "list";
    const DESCRIPTION: &'static str = "The replicas of all services that answer, with what each shows in $SRV.STATS";
    type Context = Context;

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let mut replicas = gather_replicas(context)
            .await
            .map_err(|_| Failure::new(Code::Unavailable, "the connection to NATS is closed"))?;
        replicas.sort_by_key(|replica| (replica["name"].to_string(), replica["id"].to_string()));
        replicas.dedup_by(|a, b| (&a["name"], &a["id"]) == (&b["name"], &b["id"]));
        let shown = |replica: &Value| {
            json!({
                "service": replica["name"], "replica": replica["id"], "version": replica["version"],
                "revision": replica["metadata"]["revision"], "started": replica["started"], "data": replica["data"],
            })
        };
        Ok(json!({ "replicas": replicas.iter().map(shown).collect::<Vec<_>>() }))
    }
}

/// What the replicas of all services of this installation say in `$SRV.STATS`.
///
/// # Errors
/// If the connection to NATS is closed.
pub async fn gather_replicas(context: &Context) -> anyhow::Result<Vec<Value>> {
    let replies = context.nats.gather("$SRV.STATS".to_owned(), QUIET, GATHER).await?;
    let own = context.monitor.metadata();
    let mut replicas: Vec<Value> =
        replies.iter().filter_map(|reply| serde_json::from_slice(&reply.payload).ok()).collect();
    // Other installations may share the NATS server, and others may answer to this inbox.
    replicas.retain(|replica| {
        replica["type"] == STATS && ["stream", "prefix"].iter().all(|field| replica["metadata"][field] == own[field])
    });
    Ok(replicas)
}
