//! Load: so many operations in flight, or so many each second, for so long; how long each took, and what all cost.

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

/// What was measured of one kind of operation.
#[derive(Default)]
pub struct Measured {
    /// Sorted.
    nanos: Vec<u64>,
    /// Operations that were not timed.
    counted: usize,
    pub elapsed: Duration,
    pub cpu: Cpu,
}

/// A request on its way.
pub struct Ask {
    pub subject: String,
    pub headers: Option<HeaderMap>,
    pub body: Bytes,
}

/// What is asked.
pub trait Traffic {
    /// `None` when there is nothing more to ask.
    fn next(&mut self) -> Option<Ask>;

    /// What is asked as soon as this has been answered.
    fn then(&mut self, _reply: &Message) -> Option<Ask> {
        None
    }
}

/// Traffic that may have to wait.
pub trait Held: Traffic {
    fn may_go_on(&self) -> bool;

    /// How much has been done of what was asked.
    fn done(&self) -> u64;
}

impl<F: FnMut() -> Ask> Traffic for F {
    fn next(&mut self) -> Option<Ask> {
        Some(self())
    }
}

/// How requests follow one another.
#[derive(Clone, Copy)]
pub enum Pace {
    /// So many are in flight at any time.
    InFlight(usize),
    /// So many are begun each second, whatever becomes of those before. Latency counts from when one was due.
    PerSecond(f64),
}

/// Asks over NATS. One connection, one subscription, one task: a request costs the client as little as can be.
pub struct Asker {
    client: Client,
    inbox: String,
    replies: Subscriber,
    /// Requests that have not been answered, by the last token of their reply subject.
    waiting: Vec<Option<Waiting>>,
    free: Vec<usize>,
}

/// How often requests that are due are sent.
const TICK: Duration = Duration::from_millis(1);

struct Waiting {
    since: Instant,
    follows: bool,
}

impl Asker {
    pub async fn new(client: &Client) -> Self {
        let inbox = client.new_inbox();
        let replies = client.subscribe(format!("{inbox}.*")).await.expect("NATS answers");
        Self { client: client.clone(), inbox, replies, waiting: vec![], free: vec![] }
    }

    /// Asks all that there is to ask.
    ///
    /// # Panics
    /// If a request fails.
    pub async fn ask_all(&mut self, traffic: &mut impl Traffic) {
        let pace = Pace::InFlight(256);
        self.ask(&Machine::default(), pace, Duration::from_secs(24 * 3600), traffic).await;
    }

    /// Keeps the pace for the time and a third of it before, which warms up and does not count, or until there is no
    /// more to ask. Returns what was asked by itself, and what followed.
    ///
    /// # Panics
    /// If a request fails: a refusal must not be counted as done.
    pub async fn ask(
        &mut self,
        machine: &Machine,
        pace: Pace,
        time: Duration,
        traffic: &mut impl Traffic,
    ) -> (Measured, Measured) {
        let begin = Instant::now();
        let (start, end) = (begin + time / 3, begin + time / 3 + time);
        let (mut asked, mut followed) = (Measured::default(), Measured::default());
        let mut before: Option<Cpu> = None;
        let mut begun = 0_u64;
        let mut is_over = false;
        if let Pace::InFlight(number) = pace {
            for _ in 0..number {
                is_over |= !self.send(traffic.next(), Instant::now(), false).await;
            }
        }
        loop {
            let now = Instant::now();
            if before.is_none() && now >= start {
                before = Some(machine.cpu());
            }
            if now >= end && asked.elapsed.is_zero() {
                (asked.elapsed, followed.elapsed) = (time, time);
                asked.cpu = between(&before.take().unwrap_or_default(), &machine.cpu());
                is_over = true;
            }
            if is_over && self.free.len() == self.waiting.len() {
                asked.nanos.sort_unstable();
                followed.nanos.sort_unstable();
                return (asked, followed);
            }
            if let Pace::PerSecond(rate) = pace {
                let due = ((now.min(end) - begin).as_secs_f64() * rate) as u64;
                while begun < due && !is_over {
                    begun += 1;
                    let since = begin + Duration::from_secs_f64(begun as f64 / rate);
                    is_over |= !self.send(traffic.next(), since, false).await;
                }
            }
            let reply = tokio::select! {
                biased;
                reply = self.replies.next() => reply.expect("the subscription lasts"),
                () = sleep_until((now + TICK).into()) => continue,
            };
            let now = Instant::now();
            let Waiting { since, follows } = self.answered(&reply);
            if now > start && now <= end {
                let measured = if follows { &mut followed } else { &mut asked };
                measured.nanos.push(u64::try_from((now - since).as_nanos()).unwrap_or(u64::MAX));
            }
            if follows {
                continue;
            }
            self.send(traffic.then(&reply), now, true).await;
            if matches!(pace, Pace::InFlight(_)) && !is_over {
                is_over |= !self.send(traffic.next(), Instant::now(), false).await;
            }
        }
    }

    /// Asks with up to so many in flight whenever the traffic may go on; returns how much is done each second in
    /// the last two thirds.
    pub async fn held_back(&mut self, in_flight: usize, time: Duration, traffic: &mut impl Held) -> f64 {
        let begin = Instant::now();
        let (start, end) = (begin + time / 3, begin + time);
        let mut before = None;
        loop {
            let now = Instant::now();
            if now >= start && before.is_none() {
                before = Some((now, traffic.done()));
            }
            while now < end && self.waiting.len() - self.free.len() < in_flight && traffic.may_go_on() {
                self.send(traffic.next(), now, false).await;
            }
            if let Some((since, done)) = before.filter(|_| now >= end && self.free.len() == self.waiting.len()) {
                return (traffic.done() - done) as f64 / (now - since).as_secs_f64();
            }
            tokio::select! {
                biased;
                reply = self.replies.next() => {
                    let reply = reply.expect("the subscription lasts");
                    self.answered(&reply);
                    traffic.then(&reply);
                }
                () = sleep_until((now + TICK).into()) => {}
            }
        }
    }

    fn answered(&mut self, reply: &Message) -> Waiting {
        let failed = reply.status.is_some() || wire::failure_status(reply).is_some();
        assert!(!failed, "a request failed: {:?} {}", reply.status, String::from_utf8_lossy(&reply.payload));
        let slot = reply.subject.rsplit_once('.').and_then(|(_, slot)| slot.parse::<usize>().ok());
        let slot = slot.expect("it answers one of the requests");
        self.free.push(slot);
        self.waiting[slot].take().expect("each request is answered once")
    }

    /// Whether there was something to send.
    async fn send(&mut self, ask: Option<Ask>, since: Instant, follows: bool) -> bool {
        let Some(Ask { subject, headers, body }) = ask else { return false };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.waiting.push(None);
            self.waiting.len() - 1
        });
        self.waiting[slot] = Some(Waiting { since, follows });
        let (client, reply) = (&self.client, format!("{}.{slot}", self.inbox));
        let sent = match headers {
            Some(headers) => client.publish_with_reply_and_headers(subject, reply, headers, body).await,
            None => client.publish_with_reply(subject, reply, body).await,
        };
        sent.expect("NATS takes requests");
        true
    }
}

/// Runs the operation over and over, so many at a time, each in a task of its own; the time is that of [`Asker::ask`].
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
    /// Operations that were counted, not timed.
    pub fn counted(operations: usize, elapsed: Duration, cpu: Cpu) -> Self {
        Self { counted: operations, elapsed, cpu, nanos: vec![] }
    }

    pub fn operations(&self) -> usize {
        self.nanos.len() + self.counted
    }

    /// Operations each second.
    pub fn rate(&self) -> f64 {
        self.operations() as f64 / self.elapsed.as_secs_f64()
    }

    /// In milliseconds.
    pub fn quantile(&self, quantile: f64) -> f64 {
        let place = (self.nanos.len() as f64 * quantile) as usize;
        let nanos = self.nanos.get(place.min(self.nanos.len().saturating_sub(1)));
        nanos.map_or(f64::NAN, |nanos| *nanos as f64 / 1e6)
    }
}

/// Marsaglia's xorshift, 64 bits: load must not wait for randomness. From the same beginning always the same.
#[derive(Clone, Copy)]
pub struct Random(u64);

impl Random {
    const BEGINNING: Self = Self(0x9e37_79b9_7f4a_7c15);

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
        Self::BEGINNING
    }
}

/// A number below the bound.
pub fn random(bound: usize) -> usize {
    thread_local!(static RANDOM: Cell<Random> = const { Cell::new(Random::BEGINNING) });
    RANDOM.with(|random| {
        let mut next = random.get();
        let number = next.below(bound);
        random.set(next);
        number
    })
}
