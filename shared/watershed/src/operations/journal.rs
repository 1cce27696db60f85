//! `watershed journal`: what an operator does with the journal. Invariant: nothing is changed that was not shown and
//! confirmed before.

use std::{
    env,
    io::{self, IsTerminal, Write},
    time::Duration,
};

use async_nats::{HeaderMap, HeaderValue, Request, client::RequestErrorKind};
use serde_json::{Value, json};

use crate::{
    Failure, Installation, Outcome,
    connection::{Connection, User},
};

/// How long to wait for the reply. The relay may have to give up its lock first.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Go on with a journal that was restored to an older copy
#[derive(clap::Args)]
#[command(after_help = "\
Exit codes:
  0  it was done, or there is nothing to do
  1  it was refused, or not confirmed
  2  the command line is wrong
  3  NATS cannot be reached, nobody serves the operation, or no reply has come in time")]
pub struct Journal {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Declare that PostgreSQL has the truth: the stream, and views beyond it, are made anew
    Branch(Branch),
}

#[derive(clap::Args)]
#[command(after_help = "\
It shows what it would do, and asks. Without a terminal, it only shows it, unless --yes is given.

Examples:
  watershed journal branch
  watershed journal branch --reason 'the disk was lost, restored the copy of 03:00' --yes

Exit codes:
  0  it was done, or there is nothing to do
  1  it was refused, or not confirmed
  2  the command line is wrong
  3  NATS cannot be reached, nobody serves the operation, or no reply has come in time")]
struct Branch {
    /// Why the journal was restored; it is kept with the branch
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// The last position that the journal shares with what was published, if it is lower than shown
    #[arg(long, value_name = "POSITION")]
    position: Option<u64>,
    /// Who does it, kept with the branch [default: $USER]
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Do it without asking
    #[arg(long, requires = "reason")]
    yes: bool,
}

impl Journal {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let Action::Branch(branch) = self.action;
        branch.run(installation).await
    }
}

impl Branch {
    async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let connection = Connection::open(installation, User::Operator).await?;
        let subject = installation.subject("ops.journal.branch");
        let actor = self.actor.or_else(|| env::var("USER").ok()).filter(|actor| !actor.is_empty());
        let ask = async |body: Value| ask(&connection, &subject, actor.as_deref(), body).await;
        let plan = ask(json!({})).await?;
        let position = self.position.or(plan["position"].as_u64());
        let mut stdout = io::stdout().lock();
        stdout.write_all(shown(&plan, position).as_bytes())?;
        let Some(position) = position else { return Ok(Outcome::Fine) };
        let reason = match self.reason {
            Some(reason) => reason,
            None if io::stdin().is_terminal() => prompt("Why was the journal restored? ")?,
            None => return Ok(Outcome::Wrong),
        };
        let is_confirmed = self.yes || io::stdin().is_terminal() && prompt("Do this? Type yes: ")? == "yes";
        if !is_confirmed {
            writeln!(stdout, "Nothing was done.")?;
            return Ok(Outcome::Wrong);
        }
        let request = json!({ "confirm": true, "parent": plan["parent"], "position": position, "reason": reason });
        let done = ask(request).await?;
        writeln!(stdout, "The journal goes on in the branch {}.", text(&done["branch"]))?;
        Ok(Outcome::Fine)
    }
}

async fn ask(connection: &Connection, subject: &str, actor: Option<&str>, body: Value) -> Result<Value, Failure> {
    let mut request = Request::new().payload(body.to_string().into()).timeout(Some(TIMEOUT));
    if let Some(actor) = actor {
        let actor: HeaderValue = actor.parse().map_err(|_| Failure::Usage("the actor cannot be sent".to_owned()))?;
        let mut headers = HeaderMap::new();
        headers.insert(wire::ACTOR, actor);
        request = request.headers(headers);
    }
    let sent = connection.client.nats().send_request(subject.to_owned(), request);
    let reply = connection.permitted(sent).await?;
    let reply = reply.map_err(|error| match error.kind() {
        RequestErrorKind::NoResponders => Failure::Unanswered(format!("nobody serves {subject}")),
        RequestErrorKind::TimedOut => Failure::Unanswered("no reply has come in time".to_owned()),
        _ => Failure::Unanswered(format!("the request cannot be sent: {error}")),
    })?;
    let body: Value = serde_json::from_slice(&reply.payload)
        .map_err(|_| Failure::Unanswered("the reply cannot be read".to_owned()))?;
    match &body["error"]["message"] {
        Value::String(message) => Err(Failure::Refused(message.clone())),
        _ => Ok(body),
    }
}

/// What would be done, for people.
fn shown(plan: &Value, position: Option<u64>) -> String {
    let stream = match &plan["stream"]["position"] {
        Value::Null => "there is no stream".to_owned(),
        position => format!("the stream ends at {position}"),
    };
    let mut lines = vec![format!("The journal ends at position {}; {stream}.", plan["head"])];
    let Some(position) = position else {
        lines.push(
            "The stream has the journal's events, and no view says otherwise: there is nothing to do.".to_owned(),
        );
        return lines.join("\n") + "\n";
    };
    let foreign = plan["foreign_events"].as_u64().unwrap_or_default();
    if foreign > 0 {
        lines.push(format!("{foreign} events of the stream are not the journal's; the first of them:"));
    }
    for event in plan["events"].as_array().into_iter().flatten() {
        let words = ["recorded_at", "event", "id"].map(|name| text(&event[name]).to_owned());
        lines.push(format!("  {}  {}  v{}", event["position"], words.join("  "), event["version"]));
    }
    lines.push(match plan["begun"].as_bool() {
        Some(true) => format!("The journal has left the branch {} at position {position}.", text(&plan["parent"])),
        _ => format!("The journal leaves the branch {} at position {position}.", text(&plan["parent"])),
    });
    lines.push("The stream is deleted, and filled again from the journal.".to_owned());
    lines.push(match plan["views"].as_array() {
        Some(views) if !views.is_empty() => {
            let views = views.iter().map(|view| format!("{} ({})", text(&view["view"]), view["position"]));
            format!("Built anew, and unavailable meanwhile: {}.", views.collect::<Vec<_>>().join(", "))
        }
        _ => "All views whose position is known are kept.".to_owned(),
    });
    lines.join("\n") + "\n"
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn prompt(question: &str) -> Result<String, Failure> {
    let mut stderr = io::stderr().lock();
    stderr.write_all(question.as_bytes())?;
    stderr.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(answer.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_shown_with_what_is_lost_and_what_is_built_anew() {
        let plan = json!({
            "head": 4, "stream": {"position": 3}, "parent": "b1", "position": 1, "foreign_events": 2, "begun": false,
            "events": [{"position": 2, "event": "product.created", "id": "p", "version": 1, "recorded_at": "2026"}],
            "views": [{"view": "orders", "position": 3}],
        });
        assert_eq!(
            shown(&plan, Some(1)),
            "The journal ends at position 4; the stream ends at 3.\n\
             2 events of the stream are not the journal's; the first of them:\n  \
             2  2026  product.created  p  v1\n\
             The journal leaves the branch b1 at position 1.\n\
             The stream is deleted, and filled again from the journal.\n\
             Built anew, and unavailable meanwhile: orders (3).\n"
        );
        let nothing = json!({"head": 4, "stream": {"position": 4}, "position": null});
        assert!(shown(&nothing, None).ends_with("there is nothing to do.\n"));
    }
}
