//! Replays a shop's invoices through NATS, as any client would: it registers the customers, creates and stocks the
//! products, and places every sale as an order with the date in the file. A replay can be stopped and run again, and
//! other files can follow: identifiers and idempotency keys are derived from the content of the file, so that nothing
//! happens twice.

mod dates;
mod invoices;
mod table;
mod text;
mod unusable;

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use client::{Client, Error};
use futures_util::{StreamExt, stream};
use serde_json::Value;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

pub use dates::DateOrder;
pub use invoices::{Invoices, NoSale};
pub use unusable::Unusable;

/// How long a command is retried while the system is overloaded or a server is unavailable.
const RETRY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the views may take to catch up.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(300);

/// The outcome of a replay.
#[derive(Debug, Default)]
pub struct Report {
    /// Lines that are sales.
    pub sales: usize,
    /// Lines that are not sales, by reason.
    pub no_sales: BTreeMap<NoSale, usize>,
    pub commands: u64,
    pub accepted: u64,
    /// Commands whose aggregate exists already, although the system has forgotten their keys.
    pub already_present: u64,
    /// Refused commands, by the code of the failure.
    pub refused: BTreeMap<String, u64>,
    pub sending: Duration,
    /// The time from the last reply until every view reflected it.
    pub catching_up: Duration,
    /// The highest position in a reply.
    pub position: u64,
}

/// Reads the file and replays it, see [`Invoices::replay`].
///
/// # Errors
/// If the file cannot be used, or the system does not answer for a minute.
pub async fn replay(client: &Client, file: &Path, in_flight: usize, progress: bool) -> anyhow::Result<Report> {
    let invoices = Invoices::read(file, None).with_context(|| format!("cannot use {}", file.display()))?;
    invoices.replay(client, in_flight, progress).await
}

impl Invoices {
    /// Replays the invoices with this many requests in flight, and waits until all views reflect them.
    ///
    /// # Errors
    /// If the system does not answer for a minute, or if none of the orders was accepted.
    pub async fn replay(self, client: &Client, in_flight: usize, progress: bool) -> anyhow::Result<Report> {
        let replay = Arc::new(Replay { client: client.clone(), in_flight, counts: Counts::default() });
        let (preparations, orders) = (self.preparations(), self.orders());
        let all = (preparations.iter().map(Vec::len).sum::<usize>() + orders.len()) as u64;
        let progress = progress.then(|| AbortOnDropHandle::new(tokio::spawn(show_progress(Arc::clone(&replay), all))));
        let began = Instant::now();
        replay.send(preparations).await?;
        let prepared = replay.counts.done();
        replay.send(orders.into_iter().map(|order| vec![order]).collect()).await?;
        let placed = replay.counts.done() - prepared;
        let sending = began.elapsed();
        drop(progress);
        let refused = replay.counts.refused.lock().unwrap_or_else(PoisonError::into_inner).clone();
        anyhow::ensure!(placed > 0, "none of the orders was accepted; refused commands: {}", Refused(&refused));
        let position = replay.counts.position.load(Relaxed);
        let began = Instant::now();
        replay.catch_up(position).await?;
        Ok(Report {
            sales: self.sales(),
            no_sales: self.no_sales,
            commands: replay.counts.sent.load(Relaxed),
            accepted: replay.counts.accepted.load(Relaxed),
            already_present: replay.counts.already_present.load(Relaxed),
            refused,
            sending,
            catching_up: began.elapsed(),
            position,
        })
    }
}

/// A command to be sent with its idempotency key.
pub struct KeyedCommand {
    /// The name of the subject, such as `cmd.order.create`.
    name: &'static str,
    /// The idempotency key, so that it is executed once however often the file is replayed.
    key: String,
    body: Value,
}

struct Replay {
    client: Client,
    in_flight: usize,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    accepted: AtomicU64,
    already_present: AtomicU64,
    position: AtomicU64,
    refused: Mutex<BTreeMap<String, u64>>,
}

impl Counts {
    /// Commands whose effect is in the journal.
    fn done(&self) -> u64 {
        self.accepted.load(Relaxed) + self.already_present.load(Relaxed)
    }
}

impl Replay {
    /// Sends the commands of each chain one after the other, and the chains concurrently.
    async fn send(&self, chains: Vec<Vec<KeyedCommand>>) -> anyhow::Result<()> {
        let send_chain = |chain| async {
            for command in chain {
                self.send_one(command).await?;
            }
            anyhow::Ok(())
        };
        let mut replies = stream::iter(chains).map(send_chain).buffer_unordered(self.in_flight);
        while let Some(sent) = replies.next().await {
            sent?;
        }
        Ok(())
    }

    /// Sends the command until it is answered. Its idempotency key makes retries safe.
    async fn send_one(&self, KeyedCommand { name, key, body }: KeyedCommand) -> anyhow::Result<()> {
        let request = self.client.request(name, body.to_string()).key(&key).deadline(RETRY_TIMEOUT);
        match request.reply().await {
            Ok(reply) => {
                self.counts.accepted.fetch_add(1, Relaxed);
                self.counts.position.fetch_max(reply.position.unwrap_or(0), Relaxed);
            }
            // The identifier is derived from the content of the file, so an earlier replay has created the aggregate.
            Err(Error::Rejected(failure)) if failure.code == "id_taken" => {
                self.counts.already_present.fetch_add(1, Relaxed);
            }
            Err(error) => {
                let refusal = error.failure().filter(|failure| failure.status < 500);
                let Some(code) = refusal.map(|failure| failure.code.clone().into_owned()) else {
                    return Err(anyhow::Error::new(error).context("the system does not answer"));
                };
                let mut refused = self.counts.refused.lock().unwrap_or_else(PoisonError::into_inner);
                *refused.entry(code).or_default() += 1;
            }
        }
        self.counts.sent.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Queries each view until it has reached the position.
    async fn catch_up(&self, position: u64) -> anyhow::Result<()> {
        for (_, query) in views::queries() {
            let example = query.examples.first().copied().unwrap_or_default();
            let request = self.client.request(&format!("qry.{}", query.name()), example);
            match request.min_position(position).deadline(CATCH_UP_TIMEOUT).await {
                // The view has reached the position, whether or not there is what the example asks for.
                Ok(_) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(anyhow::Error::new(error).context("the views have not caught up in time")),
            }
        }
        Ok(())
    }
}

async fn show_progress(replay: Arc<Replay>, all: u64) {
    let began = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let sent = replay.counts.sent.load(Relaxed);
        eprintln!("{sent} of {all} commands, {:.0}/s", sent as f64 / began.elapsed().as_secs_f64());
    }
}

/// Derives an identifier from a name: a UUID of version 8, whose bits are up to the application.
fn id(kind: &str, name: &str) -> Uuid {
    use sha2::{Digest, Sha256};

    let hash = Sha256::digest(format!("retail/{kind}/{name}"));
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} lines are sales", self.sales)?;
        for (reason, lines) in &self.no_sales {
            writeln!(f, "{lines} lines are not sales: {reason}")?;
        }
        let rate = self.commands as f64 / self.sending.as_secs_f64();
        writeln!(f, "{} commands sent in {:.1?}, {rate:.0}/s", self.commands, self.sending)?;
        writeln!(f, "{} accepted", self.accepted)?;
        if self.already_present > 0 {
            writeln!(f, "{} had been done before", self.already_present)?;
        }
        for (code, commands) in &self.refused {
            writeln!(f, "{commands} refused: {code}")?;
        }
        write!(f, "all views at position {} {:.0?} after the last reply", self.position, self.catching_up)
    }
}

/// The numbers of refused commands, by the code of the failure.
struct Refused<'a>(&'a BTreeMap<String, u64>);

impl fmt::Display for Refused<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let codes: Vec<String> = self.0.iter().map(|(code, commands)| format!("{commands} {code}")).collect();
        f.write_str(&codes.join(", "))
    }
}
