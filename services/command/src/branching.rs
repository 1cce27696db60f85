//! `ops.journal.branch`: the way back when PostgreSQL was restored to an older copy. The journal is declared the truth: it
//! goes on in a new branch, and the stream is made anew from it. Without `confirm` the operation only says what it would
//! do.
//!
//! The invariants: what is done is what was shown, since the request names the branch to leave and the position; while
//! it is done, no relay publishes, since the lock of the relay is taken first; another journal's stream is never
//! touched; and whoever is killed halfway can repeat the request, as the branch is recorded before the stream is
//! deleted.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow};
use async_nats::jetstream::{
    self, ErrorCode,
    context::GetStreamErrorKind,
    message::StreamMessage,
    stream::{Info, RawMessageErrorKind, Stream},
};
use domain::{Id, Malformed, Reason, Rejection};
use runtime::operations::Operation;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_postgres::Client;
use uuid::Uuid;
use wire::{Code, Failure, Lineage, mark_of};

use crate::{
    identity::{self, Misaligned},
    operations::{Context, gather_replicas},
    outbox::{self, Origin},
    postgres::{describe, with_timeout},
    relay,
};

/// How long to wait until the relay has given up its lock.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(50);
/// How many events of the stream that are not the journal's the plan shows.
const SHOWN_EVENTS: u64 = 10;
const MAX_REASON: usize = 500;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BranchJournal {
    /// Whether to do it. Otherwise the reply says what would be done.
    #[serde(default)]
    confirm: bool,
    /// The branch that the journal leaves, as it was shown.
    parent: Option<Id>,
    /// The last position that the journal shares with that branch, as it was shown.
    position: Option<u64>,
    /// Why the journal was restored. It is kept with the branch.
    reason: Option<String>,
    #[serde(skip)]
    actor: Option<String>,
}

/// What there is, and what would be done.
struct Plan {
    origin: Origin,
    /// The last position of the journal.
    head: u64,
    stream: Option<Info>,
    /// What the stream's metadata say, if they do.
    stream_lineage: Option<Lineage>,
    /// The last position up to which the stream has the journal's events; `None` if it has no others.
    fork: Option<u64>,
    /// The branch is recorded, but the stream is not yet made anew.
    is_begun: bool,
    views: Vec<ViewState>,
}

/// A view as the replica that leads it shows it.
struct ViewState {
    view: String,
    position: u64,
    /// Whether it fits the stream; `None` if that was not compared.
    fits: Option<bool>,
}

/// A request to do it, which has everything that it needs.
struct Confirmed {
    parent: Uuid,
    position: u64,
    reason: String,
    actor: Option<String>,
}

impl Operation for BranchJournal {
    const NOUN: &'static str = "journal";
    const VERB: &'static str = "branch";
    const DESCRIPTION: &'static str =
        "Declares a journal that was restored to be the truth, and makes the stream anew; says first what it would do";
    type Context = Context;

    fn asked_by(self, actor: Option<String>) -> Self {
        Self { actor, ..self }
    }

    async fn run(self, context: &Context) -> Result<Value, Failure> {
        let confirmed = self.confirmed()?;
        let done = match &confirmed {
            None => plan(context).await,
            Some(confirmed) => branch(context, confirmed).await,
        };
        done.unwrap_or_else(|error| {
            tracing::warn!(reason = describe(&error), "the journal cannot be branched");
            Err(Failure::new(Code::Unavailable, "PostgreSQL or NATS does not answer: ask again"))
        })
    }
}

impl BranchJournal {
    /// The request to do it; `None` if it only asks what would be done.
    fn confirmed(self) -> Result<Option<Confirmed>, Failure> {
        let Self { confirm, parent, position, reason, actor } = self;
        if !confirm {
            return Ok(None);
        }
        let missing = |field| Malformed::new(field, Reason::Missing, "");
        let Id(parent) = parent.ok_or_else(|| missing("parent"))?;
        let position = position.ok_or_else(|| missing("position"))?;
        let reason = reason.ok_or_else(|| missing("reason"))?.trim().to_owned();
        if reason.is_empty() || reason.chars().count() > MAX_REASON || reason.chars().any(char::is_control) {
            let expected = format!("1 to {MAX_REASON} characters without control characters");
            return Err(Malformed::new("reason", Reason::Invalid, expected).into());
        }
        Ok(Some(Confirmed { parent, position, reason, actor }))
    }
}

async fn plan(context: &Context) -> anyhow::Result<Result<Value, Failure>> {
    let client = context.postgres.get().await?;
    match Plan::read(context, &client).await? {
        Ok((plan, Some(stream))) => Ok(Ok(plan.json(context, plan.foreign_events(&stream).await?))),
        Ok((plan, None)) => Ok(Ok(plan.json(context, vec![]))),
        Err(failure) => Ok(Err(failure)),
    }
}

async fn branch(context: &Context, confirmed: &Confirmed) -> anyhow::Result<Result<Value, Failure>> {
    let mut client = relay::connect(&context.config, "branching the journal").await?;
    // The lock is held until the connection is dropped.
    take_over_relay(&client).await?;
    let (mut plan, stream) = match Plan::read(context, &client).await? {
        Ok(read) => read,
        Err(failure) => return Ok(Err(failure)),
    };
    let present = plan.origin.lineage.present();
    let recorded = plan.origin.lineage.branches().iter().find(|branch| branch.id == present);
    let is_recorded =
        recorded.is_some_and(|it| it.parent == Some(confirmed.parent) && it.position == confirmed.position);
    let is_done = is_recorded && plan.stream_lineage.as_ref().is_some_and(|lineage| lineage.present() == present);
    if !is_done {
        if !is_recorded {
            if let Err(failure) = plan.admits(confirmed) {
                return Ok(Err(failure));
            }
            record(&mut client, &plan, confirmed).await?;
            plan.origin = Origin::read(&client, &context.nats.subjects).await?;
        }
        let jetstream = jetstream::new(context.nats.client.clone());
        if stream.is_some() {
            jetstream.delete_stream(&context.config.nats.stream).await.context("the stream cannot be deleted")?;
        }
        let settings = relay::stream_config(&context.config, &plan.origin, plan.head);
        jetstream.create_stream(settings).await.context("the stream cannot be made")?;
    }
    let branch = plan.origin.lineage.present();
    tracing::info!(%branch, parent = %confirmed.parent, position = confirmed.position, "the journal is in a new branch");
    Ok(Ok(json!({ "branch": branch, "parent": confirmed.parent, "position": confirmed.position, "done": true })))
}

/// Ends the connection by which a relay holds its lock, and takes the lock.
async fn take_over_relay(client: &Client) -> anyhow::Result<()> {
    let began = Instant::now();
    while !relay::try_lock(client).await? {
        anyhow::ensure!(began.elapsed() < LOCK_PATIENCE, "the relay's lock cannot be taken");
        with_timeout(client.execute(END_RELAY, &[&relay::LOCK])).await?;
        tokio::time::sleep(LOCK_POLL).await;
    }
    Ok(())
}

/// An advisory lock's 64-bit key is in two halves of `pg_locks`.
const END_RELAY: &str = "
    select pg_terminate_backend(pid)
    from pg_locks
    where locktype = 'advisory' and granted and pid <> pg_backend_pid()
        and database = (select oid from pg_database where datname = current_database())
        and classid::bigint << 32 | objid::bigint = $1";

/// Records the new branch, and those of the stream that a journal which was restored does not know any more.
async fn record(client: &mut Client, plan: &Plan, confirmed: &Confirmed) -> anyhow::Result<()> {
    let Confirmed { parent, position, reason, actor } = confirmed;
    let transaction = with_timeout(client.transaction()).await?;
    for known in plan.stream_lineage.iter().flat_map(Lineage::branches) {
        let position = i64::try_from(known.position)?;
        let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&known.id, &known.parent, &position];
        with_timeout(transaction.execute(KNOWN, &values)).await?;
    }
    let (branch, position) = (Uuid::now_v7(), i64::try_from(*position)?);
    with_timeout(transaction.execute(NEW, &[&branch, parent, &position, actor, reason])).await?;
    with_timeout(transaction.execute("update journal_head set branch = $1", &[&branch])).await?;
    with_timeout(transaction.commit()).await
}

const KNOWN: &str = "
    insert into journal_branches (branch, parent, position, reason)
    values ($1, $2, $3, 'known from the stream')
    on conflict (branch) do nothing";

const NEW: &str = "
    insert into journal_branches (branch, parent, position, actor, reason)
    values ($1, $2, $3, $4, $5)";

impl Plan {
    async fn read(context: &Context, client: &Client) -> anyhow::Result<Result<(Self, Option<Stream<Info>>), Failure>> {
        let name = &context.config.nats.stream;
        let origin = Origin::read(client, &context.nats.subjects).await?;
        let head = with_timeout(outbox::head(client)).await?;
        anyhow::ensure!(context.nats.is_up(), "NATS does not answer");
        let stream = match jetstream::new(context.nats.client.clone()).get_stream(name).await {
            Ok(stream) => Some(stream),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => None,
                _ => return Err(error.into()),
            },
        };
        let (mut is_begun, mut fork, mut stream_lineage) = (false, None, None);
        if let Some(stream) = &stream {
            let info = stream.cached_info();
            stream_lineage = Lineage::from_metadata(&info.config.metadata).ok().flatten();
            match identity::check_metadata(name, &info.config.metadata, &origin.lineage) {
                Err(other @ (Misaligned::OtherJournal { .. } | Misaligned::Unreadable { .. })) => {
                    return Ok(Err(other_journal(&other)));
                }
                Err(Misaligned::FormerBranch { .. }) => is_begun = true,
                Ok(known) if info.state.messages > 0 => {
                    let last = stream.get_raw_message(info.state.last_sequence).await?;
                    let stranger = known.ahead(info.state.last_sequence, head, &last);
                    if let Misaligned::OtherJournal { .. } = stranger {
                        return Ok(Err(other_journal(&stranger)));
                    }
                }
                Ok(_) | Err(_) => {}
            }
            fork = find_fork(client, &origin, stream, head).await?;
        }
        let info = stream.as_ref().map(|stream| stream.cached_info().clone());
        let views = views(context).await?;
        Ok(Ok((Self { origin, head, stream: info, stream_lineage, fork, is_begun, views }, stream)))
    }

    /// The branch to leave, and the last position that the journal shares with it; `None` if nothing shows that the
    /// journal was restored.
    fn proposal(&self) -> (Uuid, Option<u64>) {
        let lineage = &self.origin.lineage;
        if self.is_begun
            && let Some(begun) = lineage.branches().iter().find(|branch| branch.id == lineage.present())
        {
            return (begun.parent.unwrap_or(begun.id), Some(begun.position));
        }
        (lineage.present(), lowest(self.fork, self.fork_by_views()))
    }

    /// Views that do not fit the stream, which has the journal's events, come from another history. What they share
    /// with the journal is at least what those that fit have seen.
    fn fork_by_views(&self) -> Option<u64> {
        let refused = self.views.iter().filter(|view| view.fits == Some(false)).map(|view| view.position).min()?;
        let fitting = self.views.iter().filter(|view| view.fits == Some(true)).map(|view| view.position);
        Some(fitting.filter(|position| *position < refused).max().unwrap_or(0))
    }

    /// # Errors
    /// If the request is not what would have been shown.
    fn admits(&self, confirmed: &Confirmed) -> Result<(), Failure> {
        let present = self.origin.lineage.present();
        if self.is_begun || confirmed.parent != present {
            let (parent, position) = self.proposal();
            let message = "the journal has changed since: ask again for what is to be done";
            return Err(Rejection::conflict("plan_outdated", message)
                .with("parent", parent.to_string())
                .with("position", position)
                .into());
        }
        let highest = lowest(self.fork, Some(self.head)).unwrap_or(self.head);
        if confirmed.position > highest {
            let expected = format!("at most {highest}, as the journal shares no more with the stream");
            return Err(Malformed::new("position", Reason::OutOfBounds, expected).into());
        }
        Ok(())
    }

    /// The first events of the stream that are not the journal's.
    async fn foreign_events(&self, stream: &Stream<Info>) -> anyhow::Result<Vec<Value>> {
        let (Some(fork), Some(info)) = (self.fork, &self.stream) else { return Ok(vec![]) };
        let mut events = Vec::new();
        for position in fork + 1..=info.state.last_sequence.min(fork + SHOWN_EVENTS) {
            let Some(message) = message(stream, position).await? else { continue };
            let event = self.origin.subjects.parse_event(&message.subject).map(|(kind, name)| format!("{kind}.{name}"));
            let mark = mark_of(Some(&message.headers));
            events.push(json!({
                "position": position, "event": event, "id": mark.map(|mark| mark.aggregate),
                "version": mark.map(|mark| mark.version), "recorded_at": mark.map(|mark| mark.at),
            }));
        }
        Ok(events)
    }

    fn json(&self, context: &Context, events: Vec<Value>) -> Value {
        let (parent, position) = self.proposal();
        let beyond = |view: &&ViewState| position.is_some_and(|position| view.position > position);
        let views = self.views.iter().filter(beyond);
        let views: Vec<_> = views.map(|view| json!({ "view": view.view, "position": view.position })).collect();
        let stream = self.stream.as_ref().map(|info| {
            let branch = self.stream_lineage.as_ref().map(Lineage::present);
            json!({ "name": context.config.nats.stream, "position": info.state.last_sequence, "branch": branch })
        });
        let foreign = self.fork.zip(self.stream.as_ref()).map_or(0, |(fork, info)| info.state.last_sequence - fork);
        json!({
            "journal": self.origin.lineage.journal(), "head": self.head, "stream": stream, "parent": parent,
            "position": position, "foreign_events": foreign, "events": events, "views": views, "begun": self.is_begun, "done": false,
        })
    }
}

/// The last position up to which the stream has the journal's events; `None` if the stream has no others. Two histories
/// that have parted have no event in common any more, so that half of what is left can be left out with each event.
async fn find_fork(client: &Client, origin: &Origin, stream: &Stream<Info>, head: u64) -> anyhow::Result<Option<u64>> {
    let state = &stream.cached_info().state;
    let (first, last) = (state.first_sequence.max(1), state.last_sequence);
    if last < first {
        return Ok(None);
    }
    let is_same = async |position: u64| {
        let recorded = with_timeout(outbox::read_one(client, origin, position)).await?;
        let published = message(stream, position).await?;
        anyhow::Ok(recorded.zip(published).is_some_and(|(recorded, published)| recorded.is_same_event(&published)))
    };
    let both = last.min(head);
    if both < first || is_same(both).await? {
        return Ok((last > head).then_some(head));
    }
    let (mut same, mut other) = (first - 1, both);
    while other - same > 1 {
        let middle = same + (other - same) / 2;
        if is_same(middle).await? { same = middle } else { other = middle }
    }
    // What the stream does not hold any more cannot be compared.
    Ok(Some(if same < first { 0 } else { same }))
}

/// A message of the stream, if it has one at the position.
async fn message(stream: &Stream<Info>, position: u64) -> anyhow::Result<Option<StreamMessage>> {
    match stream.get_raw_message(position).await {
        Ok(message) => Ok(Some(message)),
        Err(error) if error.kind() == RawMessageErrorKind::NoMessageFound => Ok(None),
        Err(error) => Err(anyhow!("message {position} of the stream cannot be read: {error}")),
    }
}

/// The views as the replicas of the projection service show them.
async fn views(context: &Context) -> anyhow::Result<Vec<ViewState>> {
    let replicas = gather_replicas(context).await?;
    let mut views = BTreeMap::new();
    for shown in replicas.iter().filter_map(|replica| replica["data"]["views"].as_array()).flatten() {
        // The query service shows views, too, but knows nothing of the stream.
        if let (Some(view), Some(position), Some(fits)) =
            (shown["view"].as_str(), shown["position"].as_u64(), shown.get("fits"))
        {
            views.insert(view.to_owned(), (position, fits.as_bool()));
        }
    }
    Ok(views.into_iter().map(|(view, (position, fits))| ViewState { view, position, fits }).collect())
}

fn lowest(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    [one, other].into_iter().flatten().min()
}

fn other_journal(reason: &Misaligned) -> Failure {
    Rejection::refused("another_journal", reason.to_string()).into()
}
