//! `watershed events`: reads the stream, one line for each event, in the order of positions. Invariant: it knows nothing
//! of the domain, so that it shows the events of any version, and messages that are none.

use std::io::{self, Write};

use async_nats::{
    HeaderMap,
    jetstream::{
        self, ErrorCode,
        consumer::{DeliverPolicy, pull},
        context::GetStreamErrorKind,
    },
};
use domain::Id;
use futures_util::StreamExt;
use serde::Serialize;
use serde_json::{
    Value,
    value::{RawValue, to_raw_value},
};
use wire::{ACTOR, AGGREGATE_ID, AGGREGATE_VERSION, COMMAND_ID, RECORDED_AT, Subjects};

use crate::{
    Failure, Installation, Outcome,
    connection::{Connection, User, name_operator},
};

/// Show events in the order of their positions: as they happen, or from a position on
#[derive(clap::Args)]
#[command(after_help = "\
A line has the position, the time, the aggregate and the event, the aggregate's id and version, and
the payload. The stream is read as the NATS user `operator`, with the URL in NATS_OPERATOR_URL.

Examples:
  watershed events
  watershed events --from 1 --aggregate order --no-follow
  watershed events --from 1 --id 01900000-0000-7000-8000-000000000002 --json

Exit codes:
  0  the events were shown
  1  there is no such stream, or the NATS user may not read it
  2  the command line is wrong
  3  NATS cannot be reached, or does not answer")]
pub struct Events {
    /// The first position to show [default: only what happens from now on]
    #[arg(long, value_name = "POSITION", value_parser = clap::value_parser!(u64).range(1..))]
    from: Option<u64>,
    /// Only events of this kind of aggregate, such as order
    #[arg(long, value_parser = token)]
    aggregate: Option<String>,
    /// Only events of the aggregate with this id
    #[arg(long)]
    id: Option<Id>,
    /// End after so many events
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// End at the last event, instead of waiting for more until Ctrl-C
    #[arg(long, requires = "from")]
    no_follow: bool,
    /// Print one JSON object per line
    #[arg(long)]
    json: bool,
}

/// An event as it is printed. What a message does not say is `null`.
#[derive(Debug, Serialize)]
struct Line {
    position: u64,
    recorded_at: Option<String>,
    aggregate: Option<String>,
    event: Option<String>,
    id: Option<String>,
    version: Option<u64>,
    actor: Option<String>,
    command_id: Option<String>,
    payload: Box<RawValue>,
}

impl Events {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let connection = Connection::open(installation, User::Operator).await?;
        let context = jetstream::new(connection.client.nats().clone());
        tokio::select! {
            read = connection.permitted(self.read(installation, context)) => read.map_err(|failure| name_operator(failure, "Events are read"))?,
            _ = tokio::signal::ctrl_c() => Ok(()),
        }?;
        Ok(Outcome::Fine)
    }

    async fn read(&self, installation: &Installation, context: jetstream::Context) -> Result<(), Failure> {
        let subjects = installation.subjects();
        let stream = &installation.stream;
        let found = context.get_stream(stream).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {
                Failure::Refused(format!("there is no stream {stream}; the command service makes it when it starts"))
            }
            GetStreamErrorKind::InvalidStreamName | GetStreamErrorKind::EmptyName => {
                Failure::Usage(format!("{stream:?} is not the name of a stream"))
            }
            _ => no_answer(error),
        })?;
        let config = pull::OrderedConfig {
            deliver_policy: self
                .from
                .map_or(DeliverPolicy::New, |position| DeliverPolicy::ByStartSequence { start_sequence: position }),
            filter_subject: match &self.aggregate {
                Some(aggregate) => subjects.event(aggregate, ">"),
                None => String::new(),
            },
            ..Default::default()
        };
        let consumer = found.create_consumer(config).await.map_err(no_answer)?;
        if self.no_follow && consumer.cached_info().num_pending == 0 {
            return Ok(());
        }
        let mut left = self.limit;
        let mut messages = consumer.messages().await.map_err(no_answer)?;
        while let Some(message) = messages.next().await {
            let message = message.map_err(no_answer)?;
            let info = message.info().map_err(no_answer)?;
            let line = Line::read(
                info.stream_sequence,
                &message.subject,
                message.headers.as_ref(),
                &message.payload,
                &subjects,
            );
            if self.id.is_none_or(|id| line.id.as_deref() == Some(&id.to_string())) {
                self.print(&line)?;
                left = left.map(|left| left - 1);
            }
            if left == Some(0) || self.no_follow && info.pending == 0 {
                return Ok(());
            }
        }
        Err(Failure::Unanswered("the stream is no longer there".to_owned()))
    }

    fn print(&self, line: &Line) -> io::Result<()> {
        let text = if self.json { serde_json::to_string(line)? } else { line.text() };
        writeln!(io::stdout(), "{text}")
    }
}

impl Line {
    fn read(position: u64, subject: &str, headers: Option<&HeaderMap>, payload: &[u8], subjects: &Subjects) -> Self {
        let header = |name: &str| headers.and_then(|headers| Some(headers.get(name)?.as_str().to_owned()));
        let (aggregate, event) = subjects.parse_event(subject).unzip();
        Self {
            position,
            recorded_at: header(RECORDED_AT),
            aggregate: aggregate.map(str::to_owned),
            event: event.map(str::to_owned),
            id: header(AGGREGATE_ID),
            version: header(AGGREGATE_VERSION).and_then(|version| version.parse().ok()),
            actor: header(ACTOR),
            command_id: header(COMMAND_ID),
            payload: json_of(payload),
        }
    }

    fn text(&self) -> String {
        let shown = |text: &Option<String>| text.clone().unwrap_or_else(|| "?".to_owned());
        let kind = format!("{}.{}", shown(&self.aggregate), shown(&self.event));
        let version = self.version.map_or_else(|| "?".to_owned(), |version| version.to_string());
        let (position, time, id) = (self.position, shown(&self.recorded_at), shown(&self.id));
        let payload = self.payload.get();
        let line = format!("{position:>8}  {time:<24}  {kind:<18}  {id:<36}  v{version:<4} {payload}");
        // A message could hold what a terminal takes for a command.
        line.replace(char::is_control, "\u{fffd}")
    }
}

/// The payload as it is, or as a string if it is not JSON on one line.
fn json_of(payload: &[u8]) -> Box<RawValue> {
    let text = String::from_utf8_lossy(payload).into_owned();
    match RawValue::from_string(text.clone()) {
        Ok(json) if !text.contains(char::is_control) => json,
        _ => to_raw_value(&Value::String(text)).unwrap_or_default(),
    }
}

fn no_answer(error: impl std::fmt::Display) -> Failure {
    Failure::Unanswered(format!("cannot read the stream: {error}"))
}

fn token(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !text.is_empty() && text.chars().all(plain) {
        return Ok(text.to_owned());
    }
    Err("expected letters, digits, '-' or '_'".to_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(subject: &str, headers: &[(&str, &str)], payload: &[u8]) -> Line {
        let mut map = HeaderMap::new();
        headers.iter().for_each(|(name, value)| map.insert(*name, *value));
        Line::read(1042, subject, Some(&map), payload, &Subjects::default())
    }

    #[test]
    fn an_event_is_one_line() {
        let headers = [
            ("Aggregate-Id", "01900000-0000-7000-8000-000000000002"),
            ("Aggregate-Version", "3"),
            ("Recorded-At", "2026-01-31T09:30:00.125Z"),
            ("Actor", "Zo%C3%AB"),
        ];
        let line = line("evt.order.placed", &headers, br#"{"user":"x"}"#);
        let expected = "    1042  2026-01-31T09:30:00.125Z  order.placed        01900000-0000-7000-8000-000000000002  v3    {\"user\":\"x\"}";
        assert_eq!(line.text(), expected);
        let json = json!({
            "position": 1042, "recorded_at": "2026-01-31T09:30:00.125Z", "aggregate": "order", "event": "placed",
            "id": "01900000-0000-7000-8000-000000000002", "version": 3, "actor": "Zo%C3%AB", "command_id": null,
            "payload": {"user": "x"},
        });
        assert_eq!(json!(line), json);
    }

    #[test]
    fn a_message_that_is_no_event_is_shown_and_cannot_harm_a_terminal() {
        let line = line("evt.order", &[], b"\x1b[2J\xff");
        let expected = "    1042  ?                         ?.?                 ?                                     v?    \"\\u001b[2J\u{fffd}\"";
        assert_eq!(line.text(), expected);
    }
}
