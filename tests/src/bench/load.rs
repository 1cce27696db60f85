//! The load generator: keeps a number of operations in flight, or begins a number of them each second, and measures the
//! latency of each and the processor time of all.

use std::{
    cell::Cell,
    future::Future,
    time::{Duration, Instant},
};

use async_nats::{Client, HeaderMap, Message, Subscriber};
use bytes::Bytes;
use futures_util::{StreamExt, future::join_all};
use tokio::time::sleep_until;

use super::cost::{Cpu, Machine, between};

/// The measurements of one kind of operation.
#[derive(Default)]
pub struct Measured {
    /// The latencies, sorted.
    nanos: Vec<u64>,
    /// Operations that were counted without a latency.
    counted: usize,
    pub elapsed: Duration,
    pub cpu: Cpu,
}

/// A request to be sent.
pub struct Request {
    pub subject: String,
    pub headers: Option<HeaderMap>,
    pub body: Bytes,
}

/// A source of requests.
pub trait Workload {
    /// The next request; `None` when there are no more.
    fn next(&mut self) -> Option<Request>;

    /// A request to send as soon as this reply has come.
    fn follow_up(&mut self, _reply: &Message) -> Option<Request> {
        None
    }
}

/// A workload that applies backpressure.
pub trait Backpressured: Workload {
    fn may_send(&self) -> bool;

    /// How much of what was requested has been processed.
    fn processed(&self) -> u64;
}

impl<F: FnMut() -> Request> Workload for F {
    fn next(&mut self) -> Option<Request> {
        Some(self())
    }
}

/// When requests are sent.
#[derive(Clone, Copy)]
pub enum Pace {
    /// This many requests are in flight at any time.
    InFlight(usize),
    /// This many requests are sent each second, whether earlier ones are answered or not. Latency counts from the time
    /// at which a request was due.
    PerSecond(f64),
}

/// Sends requests over NATS. It uses one connection, one subscription and one task, so that a request costs as little as
/// possible; the client for services has a task, a key and retries for each.
pub struct LoadGenerator {
    client: Client,
    inbox: String,
    replies: Subscriber,
    /// Unanswered requests, by the last token of their reply subject.
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
}

/// How often the generator looks for requests that are due.
const TICK: Duration = Duration::from_millis(1);

struct Pending {
    since: Instant,
    /// Whether it follows up on another request.
    is_follow_up: bool,
}

impl LoadGenerator {
    pub async fn new(client: &Client) -> Self {
        let inbox = client.new_inbox();
        let replies = client.subscribe(format!("{inbox}.*")).await.expect("NATS answers");
        Self { client: client.clone(), inbox, replies, pending: vec![], free: vec![] }
    }

    /// Sends all requests of the workload, and waits for the replies.
    ///
    /// # Panics
    /// If a request fails.
    pub async fn send_all(&mut self, workload: &mut impl Workload) {
        let pace = Pace::InFlight(256);
        self.run(&Machine::default(), pace, Duration::from_secs(24 * 3600), workload).await;
    }

    /// Sends requests at the pace for the time, or until the workload ends. A warm-up of a third of the time comes
    /// before, and does not count. Returns the measurements of the requests, and of those that follow up on a reply.
    ///
    /// # Panics
    /// If a request fails, since a refusal must not count as done.
    pub async fn run(
        &mut self,
        machine: &Machine,
        pace: Pace,
        time: Duration,
        workload: &mut impl Workload,
    ) -> (Measured, Measured) {
        let begin = Instant::now();
        let (start, end) = (begin + time / 3, begin + time / 3 + time);
        let (mut first, mut follow_ups) = (Measured::default(), Measured::default());
        let mut before: Option<Cpu> = None;
        let mut sent = 0_u64;
        let mut is_over = false;
        if let Pace::InFlight(number) = pace {
            for _ in 0..number {
                is_over |= !self.send(workload.next(), Instant::now(), false).await;
            }
        }
        loop {
            let now = Instant::now();
            if before.is_none() && now >= start {
                before = Some(machine.cpu());
            }
            if now >= end && first.elapsed.is_zero() {
                (first.elapsed, follow_ups.elapsed) = (time, time);
                first.cpu = between(&before.take().unwrap_or_default(), &machine.cpu());
                is_over = true;
            }
            if is_over && self.free.len() == self.pending.len() {
                first.nanos.sort_unstable();
                follow_ups.nanos.sort_unstable();
                return (first, follow_ups);
            }
            if let Pace::PerSecond(rate) = pace {
                let due = ((now.min(end) - begin).as_secs_f64() * rate) as u64;
                while sent < due && !is_over {
                    sent += 1;
                    let since = begin + Duration::from_secs_f64(sent as f64 / rate);
                    is_over |= !self.send(workload.next(), since, false).await;
                }
            }
            let reply = tokio::select! {
                biased;
                reply = self.replies.next() => reply.expect("the subscription lasts"),
                () = sleep_until((now + TICK).into()) => continue,
            };
            let now = Instant::now();
            let Pending { since, is_follow_up } = self.answered(&reply);
            if now > start && now <= end {
                let measured = if is_follow_up { &mut follow_ups } else { &mut first };
                measured.nanos.push(u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX));
            }
            if is_follow_up {
                continue;
            }
            self.send(workload.follow_up(&reply), now, true).await;
            if matches!(pace, Pace::InFlight(_)) && !is_over {
                is_over |= !self.send(workload.next(), Instant::now(), false).await;
            }
        }
    }

    /// Keeps up to this many requests in flight while the workload allows it. Returns how much was processed per second
    /// in the last two thirds of the time.
    pub async fn run_with_backpressure(
        &mut self,
        in_flight: usize,
        time: Duration,
        workload: &mut impl Backpressured,
    ) -> f64 {
        let begin = Instant::now();
        let (start, end) = (begin + time / 3, begin + time);
        let mut before = None;
        loop {
            let now = Instant::now();
            if now >= start && before.is_none() {
                before = Some((now, workload.processed()));
            }
            while now < end && self.pending.len() - self.free.len() < in_flight && workload.may_send() {
                self.send(workload.next(), now, false).await;
            }
            if let Some((since, processed)) = before.filter(|_| now >= end && self.free.len() == self.pending.len()) {
                return (workload.processed() - processed) as f64 / (now - since).as_secs_f64();
            }
            tokio::select! {
                biased;
                reply = self.replies.next() => {
                    let reply = reply.expect("the subscription lasts");
                    self.answered(&reply);
                    workload.follow_up(&reply);
                }
                () = sleep_until((now + TICK).into()) => {}
            }
        }
    }

    fn answered(&mut self, reply: &Message) -> Pending {
        let failed = reply.status.is_some() || wire::failure_status(reply).is_some();
        assert!(!failed, "a request failed: {:?} {}", reply.status, String::from_utf8_lossy(&reply.payload));
        let slot = reply.subject.rsplit_once('.').and_then(|(_, slot)| slot.parse::<usize>().ok());
        let slot = slot.expect("it answers one of the requests");
        self.free.push(slot);
        self.pending[slot].take().expect("each request is answered once")
    }

    /// Sends the request, if there is one, and returns whether there was.
    async fn send(&mut self, request: Option<Request>, since: Instant, is_follow_up: bool) -> bool {
        let Some(Request { subject, headers, body }) = request else { return false };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.pending.push(None);
            self.pending.len() - 1
        });
        self.pending[slot] = Some(Pending { since, is_follow_up });
        let (client, reply) = (&self.client, format!("{}.{slot}", self.inbox));
        let sent = match headers {
            Some(headers) => client.publish_with_reply_and_headers(subject, reply, headers, body).await,
            None => client.publish_with_reply(subject, reply, body).await,
        };
        sent.expect("NATS takes requests");
        true
    }
}

/// Runs the operation over and over in this many tasks. The time is that of [`LoadGenerator::run`].
pub async fn in_flight<F, T>(machine: &Machine, number: usize, time: Duration, operation: F) -> Measured
where
    F: Fn() -> T + Clone + Send + 'static,
    T: Future<Output = ()> + Send,
{
    let start = Instant::now() + time / 3;
    let end = start + time;
    let tasks = (0..number).map(|_| {
        let operation = operation.clone();
        tokio::spawn(async move {
            let mut nanos = Vec::new();
            loop {
                let began = Instant::now();
                if began >= end {
                    return nanos;
                }
                operation().await;
                let ended = Instant::now();
                if ended > start && ended <= end {
                    nanos.push(u64::try_from((ended - began).as_nanos()).unwrap_or(u64::MAX));
                }
            }
        })
    });
    let tasks: Vec<_> = tasks.collect();
    sleep_until(start.into()).await;
    let before = machine.cpu();
    sleep_until(end.into()).await;
    let cpu = between(&before, &machine.cpu());
    let mut nanos: Vec<u64> = join_all(tasks).await.into_iter().flat_map(|task| task.expect("no panic")).collect();
    nanos.sort_unstable();
    Measured { nanos, counted: 0, elapsed: time, cpu }
}

impl Measured {
    /// Operations that were counted without their latencies.
    pub fn counted(operations: usize, elapsed: Duration, cpu: Cpu) -> Self {
        Self { counted: operations, elapsed, cpu, nanos: vec![] }
    }

    /// Operations that were measured elsewhere.
    pub fn of(latencies: Vec<Duration>, elapsed: Duration) -> Self {
        let nanos = latencies.iter().map(|latency| u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
        let mut nanos: Vec<u64> = nanos.collect();
        nanos.sort_unstable();
        Self { nanos, counted: 0, elapsed, cpu: Cpu::default() }
    }

    pub fn operations(&self) -> usize {
        self.nanos.len() + self.counted
    }

    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.operations() as f64 / self.elapsed.as_secs_f64()
    }

    /// A quantile of the latency in milliseconds.
    pub fn quantile(&self, quantile: f64) -> f64 {
        let place = (self.nanos.len() as f64 * quantile) as usize;
        let nanos = self.nanos.get(place.min(self.nanos.len().saturating_sub(1)));
        nanos.map_or(f64::NAN, |nanos| *nanos as f64 / 1e6)
    }
}

/// Marsaglia's 64-bit xorshift, because the generator must not wait for randomness. The sequence is always the same.
#[derive(Clone, Copy)]
pub struct Random(u64);

impl Random {
    const SEED: Self = Self(0x9e37_79b9_7f4a_7c15);

    /// A number below the bound.
    pub fn below(&mut self, bound: usize) -> usize {
        let Self(x) = self;
        *x ^= *x << 13;
        *x ^= *x >> 7;
        *x ^= *x << 17;
        (*x % bound as u64) as usize
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::SEED
    }
}

/// A number below the bound.
pub fn random(bound: usize) -> usize {
    thread_local!(static RANDOM: Cell<Random> = const { Cell::new(Random::SEED) });
    RANDOM.with(|random| {
        let mut next = random.get();
        let number = next.below(bound);
        random.set(next);
        number
    })
}
