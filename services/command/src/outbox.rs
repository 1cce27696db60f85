//! The outbox is the journal as the relay reads it: events as the messages that the stream stores, always byte for
//! byte the same, whether they were handed over or read.

use std::time::SystemTime;

use anyhow::Context;
use async_nats::{HeaderMap, HeaderName, jetstream::message::StreamMessage};
use bytes::Bytes;
use domain::{Id, Timestamp};
use tokio_postgres::{Client, Error, Row};
use wire::{BRANCH, Branch, Envelope, Lineage, Subjects, event_headers};

use crate::{handover::Committed, journal::unsigned, postgres::with_timeout};

/// The largest number of events that are read at once.
const MOST_EVENTS: i64 = 500;
/// Bytes of payload that are read at once; a single event may have more.
const MOST_BYTES: i64 = 4 << 20;

/// An event as a message for the stream.
#[derive(Debug)]
pub struct OutgoingEvent {
    pub position: u64,
    pub subject: String,
    pub headers: HeaderMap,
    pub payload: Bytes,
}

impl OutgoingEvent {
    /// Whether the stream's message is this event. Headers that only controlled its publishing are ignored. A message
    /// from before there were branches names none.
    pub fn matches(&self, message: &StreamMessage) -> bool {
        let branch = message.headers.get(BRANCH);
        self.is_same_event(message) && (branch.is_none() || branch == self.headers.get(BRANCH))
    }

    /// Whether the stream's message is this event, in whichever branch of the journal.
    pub fn is_same_event(&self, message: &StreamMessage) -> bool {
        let is_branch = |name: &HeaderName| AsRef::<str>::as_ref(name) == BRANCH;
        let same = |name: &HeaderName| self.headers.get(name.clone()) == message.headers.get(name.clone());
        *self.subject == *message.subject
            && self.payload == message.payload
            && self.headers.iter().all(|(name, _)| is_branch(name) || same(name))
    }
}

/// What all messages of one journal have in common.
#[derive(Clone, Debug)]
pub struct Origin {
    pub lineage: Lineage,
    pub subjects: Subjects,
}

impl Origin {
    pub async fn read(client: &Client, subjects: &Subjects) -> anyhow::Result<Self> {
        let rows = with_timeout(client.query(LINEAGE, &[])).await?;
        let first = rows.first().context("the journal has no branch")?;
        let branch = |row: &Row| {
            Ok(Branch { id: row.try_get(2)?, parent: row.try_get(3)?, position: unsigned(row.try_get(4)?) })
        };
        let branches = rows.iter().map(branch).collect::<Result<_, Error>>()?;
        let lineage = Lineage::new(first.try_get(0)?, first.try_get(1)?, branches)?;
        Ok(Self { lineage, subjects: subjects.clone() })
    }
}

const LINEAGE: &str = "
    select journal, journal_head.branch, known.branch, known.parent, known.position
    from journal_head, journal_branches as known
    order by known.number";

/// The last position of the journal.
pub async fn head(client: &Client) -> Result<u64, Error> {
    client.query_one("select position from journal_head", &[]).await?.try_get(0).map(unsigned)
}

/// The next events after the position.
pub async fn read(client: &Client, origin: &Origin, after: u64) -> Result<Vec<OutgoingEvent>, Error> {
    read_at_most(client, origin, after, MOST_EVENTS).await
}

/// The event at the position; `None` if the journal does not have it.
pub async fn read_one(client: &Client, origin: &Origin, position: u64) -> Result<Option<OutgoingEvent>, Error> {
    let read = read_at_most(client, origin, position.saturating_sub(1), 1).await?;
    Ok(read.into_iter().find(|event| event.position == position))
}

async fn read_at_most(client: &Client, origin: &Origin, after: u64, most: i64) -> Result<Vec<OutgoingEvent>, Error> {
    let after = i64::try_from(after).unwrap_or(i64::MAX);
    let rows = client.query(NEXT, &[&after, &most, &MOST_BYTES]).await?;
    rows.iter().map(|row| outgoing(row, origin)).collect()
}

/// Converts events that this replica has committed to the same messages as if they had been read.
pub fn from_committed(committed: Committed, origin: &Origin) -> impl Iterator<Item = OutgoingEvent> {
    let Committed { at, events, after } = committed;
    (after + 1..).zip(events).map(move |(position, event)| {
        let envelope = Envelope {
            journal: origin.lineage.journal(),
            branch: origin.lineage.branch_at(position),
            position,
            id: Id(event.id),
            version: event.version,
            schema: event.schema,
            at,
            actor: event.actor.as_deref(),
            command_id: event.command_id.as_deref(),
            traceparent: event.traceparent.as_deref(),
        };
        OutgoingEvent {
            position,
            subject: origin.subjects.event(event.aggregate, event.name),
            headers: event_headers(&envelope),
            payload: event.payload.into(),
        }
    })
}

const NEXT: &str = "
    select aggregate, id, version, type, schema, payload, at, actor, command_id, traceparent, position
    from (
        select aggregate, id, version, type, schema, payload::text, at, actor, command_id, traceparent, position,
            sum(octet_length(payload::text)) over (order by position) - octet_length(payload::text) as bytes_before
        from events
        where position > $1
        order by position
        limit $2
    ) as next
    where bytes_before < $3
    order by position";

fn outgoing(row: &Row, origin: &Origin) -> Result<OutgoingEvent, Error> {
    let at: SystemTime = row.try_get(6)?;
    let millis = at.duration_since(SystemTime::UNIX_EPOCH).map(|since| since.as_millis()).unwrap_or_default();
    let position = unsigned(row.try_get(10)?);
    let envelope = Envelope {
        journal: origin.lineage.journal(),
        branch: origin.lineage.branch_at(position),
        position,
        id: Id(row.try_get(1)?),
        version: unsigned(row.try_get(2)?),
        schema: row.try_get(4)?,
        at: Timestamp::from_unix_millis(i64::try_from(millis).unwrap_or_default()).unwrap_or_default(),
        actor: row.try_get(7)?,
        command_id: row.try_get(8)?,
        traceparent: row.try_get(9)?,
    };
    Ok(OutgoingEvent {
        position,
        subject: origin.subjects.event(row.try_get(0)?, row.try_get(3)?),
        headers: event_headers(&envelope),
        payload: Bytes::copy_from_slice(row.try_get::<_, &str>(5)?.as_bytes()),
    })
}
