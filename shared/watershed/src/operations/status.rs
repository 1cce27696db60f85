//! `watershed status`: asks all replicas at once how they are (`$SRV.STATS`), and shows it on one screen.

mod observer;
mod parts;
mod problems;
mod replies;
mod report;
#[cfg(test)]
mod samples;
mod screen;

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use async_nats::{Client, connection::State};
use futures_util::StreamExt;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::{
    Failure, Installation, Outcome,
    connection::{Connection, User},
};
use observer::Observer;
use replies::Reply;
use report::{Look, Report, Scope};

/// How long to wait for replies, at most.
const PATIENCE: Duration = Duration::from_millis(1500);
/// If each service has replied, and no more replies come for so long, there will be none.
const QUIET: Duration = Duration::from_millis(300);
/// The time between two looks where one does not tell enough.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// The services of an installation.
const SERVICES: [&str; 3] = ["command", "projection", "query"];

/// Show how the installation is doing, what is wrong first: journal, relay, stream, views, replicas
#[derive(clap::Args)]
#[command(after_help = "\
All replicas are asked at once, and no single one is needed. If the stream is behind and it is not
clear whether it moves, the program goes on looking for up to 3 seconds. The lag of a view in
seconds is \"unknown\" where nobody leads the view; with --watch, it is the time for which the view
has been seen to stand still.

Exit codes:
  0  all is well
  1  something is wrong
  2  the command line is wrong
  3  NATS cannot be reached, or no replica answers")]
pub struct Status {
    /// Go on until Ctrl-C; names what falls silent
    #[arg(short, long)]
    watch: bool,
    /// With --watch, how often to look
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
    /// Print JSON; with --watch, one object per line
    #[arg(long)]
    json: bool,
}

impl Status {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let mut watcher = Watcher {
            connection: Connection::open(installation, User::Client).await?,
            scope: Scope { stream: installation.stream.clone(), prefix: installation.prefix() },
            observer: Observer::default(),
            began: Instant::now(),
        };
        if self.watch {
            tokio::select! {
                ended = self.watch(&mut watcher) => ended?,
                _ = tokio::signal::ctrl_c() => {}
            }
            return Ok(Outcome::Fine);
        }
        let mut report = watcher.look().await?;
        while report.is_open {
            sleep(SECOND_LOOK).await;
            report = watcher.look().await?;
        }
        self.show(&report)?;
        Ok(match report {
            _ if report.is_unanswered() => Outcome::Unanswered,
            _ if report.problems.is_empty() => Outcome::Fine,
            _ => Outcome::Wrong,
        })
    }

    async fn watch(&self, watcher: &mut Watcher) -> Result<(), Failure> {
        let mut due = tokio::time::interval(Duration::from_secs(self.interval));
        loop {
            due.tick().await;
            let report = watcher.look().await?;
            self.show(&report)?;
        }
    }

    fn show(&self, report: &Report) -> io::Result<()> {
        let mut stdout = anstream::stdout().lock();
        match (self.json, self.watch) {
            (true, true) => writeln!(stdout, "{}", serde_json::to_string(report)?),
            (true, false) => writeln!(stdout, "{}", serde_json::to_string_pretty(report)?),
            (false, false) => write!(stdout, "{}", screen::text(report)),
            (false, true) => {
                let text = screen::text(report);
                let now = runtime::now();
                if io::stdout().is_terminal() {
                    // Clears the screen, whether or not colours are wanted.
                    io::stdout().write_all(b"\x1b[H\x1b[2J")?;
                }
                write!(stdout, "{now}  every {} s, until Ctrl-C\n\n{text}\n", self.interval)?;
                stdout.flush()
            }
        }
    }
}

/// Looks at an installation, again and again.
struct Watcher {
    connection: Connection,
    scope: Scope,
    observer: Observer,
    began: Instant,
}

impl Watcher {
    async fn look(&mut self) -> Result<Report, Failure> {
        let client = self.connection.client.nats();
        let gathered = self.connection.permitted(gather(client, &self.scope)).await?;
        let replies = gathered.map_err(|error| Failure::Unanswered(format!("cannot ask the replicas: {error}")))?;
        let look = Look { elapsed: self.began.elapsed(), at: runtime::now(), replies };
        let mut report = Report::new(&self.scope, &mut self.observer, look);
        if client.connection_state() != State::Connected {
            report.problems.insert(0, "the connection to NATS is lost, and is being tried again".to_owned());
        }
        Ok(report)
    }
}

/// Asks all replicas; returns what they reply.
async fn gather(client: &Client, scope: &Scope) -> Result<Vec<Reply>, async_nats::Error> {
    let inbox = client.new_inbox();
    let mut inbound = client.subscribe(inbox.clone()).await?;
    client.publish_with_reply("$SRV.STATS", inbox, "".into()).await?;
    let mut replies: Vec<Reply> = Vec::new();
    let deadline = Instant::now() + PATIENCE;
    while let Ok(received) = timeout_at(deadline, async {
        let is_complete = SERVICES.iter().all(|service| replies.iter().any(|it| it.name == *service && scope.has(it)));
        let next = inbound.next();
        if is_complete { timeout(QUIET, next).await.ok().flatten() } else { next.await }
    })
    .await
    {
        let Some(message) = received else { break };
        // Whatever is not a reply to this question is of no interest.
        replies.extend(serde_json::from_slice::<Reply>(&message.payload));
    }
    Ok(replies)
}
