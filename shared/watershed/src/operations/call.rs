//! `watershed call`: sends one request, and prints the reply as it is.

use std::{
    io::{self, Write},
    str::FromStr,
    time::Duration,
};

use async_nats::{HeaderMap, HeaderName, HeaderValue, Request, client::RequestErrorKind};

use crate::{
    Failure, Installation, Outcome,
    connection::{Connection, User},
};

/// Where the subjects begin that only the operator may use.
const OPERATIONS: &str = "ops.";

/// Send one request and print the reply: its headers on stderr, its body on stdout
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  watershed call cmd.user.register '{\"email\":\"ada@example.com\",\"name\":\"Ada Lovelace\"}'
  watershed call qry.user.list '{}' -H Min-Position:2
  watershed call ops.view.show '{\"view\":\"orders\"}'      (as the operator)

Exit codes:
  0  the request was accepted
  1  it was refused, or the NATS user may not send it
  2  the command line is wrong
  3  NATS cannot be reached, nobody serves the subject, or no reply has come in time")]
pub struct Call {
    /// The subject without the prefix, such as qry.user.list
    subject: String,
    /// The request
    #[arg(value_name = "JSON", default_value = "{}")]
    body: String,
    /// A header of the request; can be given several times
    #[arg(short = 'H', long = "header", value_name = "NAME:VALUE")]
    headers: Vec<Header>,
    /// How long to wait for the reply
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    timeout: Duration,
}

/// A header of a request.
#[derive(Clone)]
struct Header(HeaderName, HeaderValue);

impl FromStr for Header {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once(':').ok_or("expected a name, a colon and a value")?;
        let name = HeaderName::from_str(name.trim()).map_err(|error| error.to_string())?;
        let value = HeaderValue::from_str(value.trim()).map_err(|error| error.to_string())?;
        Ok(Self(name, value))
    }
}

impl Call {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let Self { subject, body, headers, timeout } = self;
        let mut request = Request::new().payload(body.into()).timeout(Some(timeout));
        if !headers.is_empty() {
            let mut map = HeaderMap::new();
            headers.into_iter().for_each(|Header(name, value)| map.append(name, value));
            request = request.headers(map);
        }
        let user = if subject.starts_with(OPERATIONS) { User::Operator } else { User::Client };
        let subject = installation.subject(&subject);
        let connection = Connection::open(installation, user).await?;
        // Not as a request of the client's own, which would leave out what it does not know.
        let sent = connection.client.nats().send_request(subject.clone(), request);
        let reply = connection.permitted(sent).await?;
        let reply = reply.map_err(|error| match error.kind() {
            RequestErrorKind::NoResponders => Failure::Unanswered(format!("nobody serves {subject}")),
            RequestErrorKind::TimedOut => {
                Failure::Unanswered(format!("no reply has come within {} s", timeout.as_secs_f64()))
            }
            RequestErrorKind::InvalidSubject => Failure::Usage(format!("{subject:?} is not a subject")),
            RequestErrorKind::MaxPayloadExceeded => {
                Failure::Refused("the request is larger than the server allows".to_owned())
            }
            RequestErrorKind::Other => Failure::Unanswered(format!("the request cannot be sent: {error}")),
        })?;
        let headers = reply.headers.unwrap_or_default();
        let mut stderr = io::stderr().lock();
        for (name, values) in headers.iter() {
            values.iter().try_for_each(|value| writeln!(stderr, "{name}: {}", value.as_str()))?;
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(&reply.payload)?;
        stdout.write_all(b"\n")?;
        Ok(if headers.get("Nats-Service-Error").is_some() { Outcome::Wrong } else { Outcome::Fine })
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected a number of seconds")?;
    let duration = Duration::try_from_secs_f64(seconds).ok().filter(|duration| !duration.is_zero());
    duration.ok_or_else(|| "expected more than 0 seconds".to_owned())
}
