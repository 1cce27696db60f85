//! Replays a shop's invoices through NATS, as any client would: it registers the customers, creates and stocks the
//! products, and places every sale as an order with the date in the file. A replay can be stopped and run again, and
//! other files can follow: identifiers and idempotency keys are derived from the content of the file, so that nothing
//! happens twice.

mod client;
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
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;
use wire::{Accepted, MIN_POSITION, MSG_ID};

pub use client::{Client, Reply};
pub use dates::DateOrder;
pub use invoices::{Invoices, NoSale};
pub use unusable::Unusable;

/// How long a request is retried while the system is overloaded or a server is unavailable.
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
    async fn send_one(&self, command: KeyedCommand) -> anyhow::Result<()> {
        let deadline = Instant::now() + RETRY_TIMEOUT;
        let key = [(MSG_ID, &*command.key)];
        loop {
            let reply = self.client.command(command.name, command.body.clone(), &key).await;
            let error = match reply.map(|reply| reply.result) {
                Ok(Ok(body)) => {
                    let Accepted { position, .. } = serde_json::from_value(body)?;
                    self.counts.accepted.fetch_add(1, Relaxed);
                    self.counts.position.fetch_max(position, Relaxed);
                    break;
                }
                // The identifier is derived from the content of the file, so an earlier replay has created the
                // aggregate.
                Ok(Err(failure)) if failure.code == "id_taken" => {
                    self.counts.already_present.fetch_add(1, Relaxed);
                    break;
                }
                Ok(Err(failure)) if failure.status < 500 => {
                    let mut refused = self.counts.refused.lock().unwrap_or_else(PoisonError::into_inner);
                    *refused.entry(failure.code.into_owned()).or_default() += 1;
                    break;
                }
                Ok(Err(failure)) => failure.into(),
                Err(error) => error,
            };
            if Instant::now() > deadline {
                return Err(error.context("the system does not answer"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.counts.sent.fetch_add(1, Relaxed);
        Ok(())
    }

    /// Queries each view until it has reached the position.
    async fn catch_up(&self, position: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + CATCH_UP_TIMEOUT;
        let day = json!({"from": "2010-12-01", "to": "2010-12-01"});
        let page = json!({"limit": 1});
        let queries = [("user.list", &page), ("product.search", &page), ("order.list", &page), ("sales.daily", &day)];
        for (name, body) in queries {
            let at_least = [(MIN_POSITION, &*position.to_string())];
            while let Err(failure) = self.client.query(name, body.clone(), &at_least).await?.result {
                anyhow::ensure!(["view_behind", "unavailable", "overloaded"].contains(&&*failure.code), failure);
                anyhow::ensure!(Instant::now() < deadline, "the views have not caught up in time: {failure}");
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
