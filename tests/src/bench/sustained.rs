//! The highest rate of orders that the views sustain: 99 of 100 orders are in all views within a second. The worst lag
//! is shown beside the rate, but does not count, since in a minute it comes from a single stall of one of the servers.

use std::time::Duration;

use async_nats::Message;

use super::{
    bare::EVENTS,
    follow::{Followed, Follower, position},
    installation::{Installation, Orders},
    load::{Backpressured, Measured, Pace, Request, Workload},
};

/// For how long the views must keep up.
pub const SUSTAINED: Duration = Duration::from_secs(60);
/// The lag in seconds that the views may have.
const MAX_LAG: f64 = 1.0;
/// The share of the orders that must be within the lag. Orders come at an even rate, so that each stands for the same
/// time.
const SHARE: f64 = 0.99;
/// How many rates are probed first, and for how long each.
const PROBES: u32 = 4;
const PROBE_TIME: Duration = Duration::from_secs(9);
/// The bounds of the factor by which a rate that was too high is lowered. Within them, the factor makes up for the lag.
const STEPS_DOWN: (f64, f64) = (0.75, 0.95);

/// A rate that the views have sustained.
pub struct Sustained {
    pub measured: Measured,
    pub lag: Lag,
}

/// The lag of the views in seconds.
#[derive(Clone, Copy)]
pub struct Lag {
    /// The lag that 99 of 100 orders do not exceed.
    p99: f64,
    /// The longest lag.
    pub worst: f64,
}

/// Finds the highest rate that the views sustain.
pub async fn sustained(installation: &mut Installation) -> Sustained {
    let follower = Follower::start(&installation.system).await;
    let mut rate = probed_rate(installation, &follower).await;
    loop {
        installation.caught_up().await;
        let (measured, lag) = at_rate(installation, &follower, rate, SUSTAINED).await;
        if lag.p99 <= MAX_LAG {
            return Sustained { measured, lag };
        }
        rate *= (MAX_LAG / lag.p99).clamp(STEPS_DOWN.0, STEPS_DOWN.1);
    }
}

/// The highest rate of orders that the views keep up with for a short time.
async fn probed_rate(installation: &mut Installation, follower: &Follower) -> f64 {
    // Under backpressure the orders come in larger batches, which cost less, so that this rate is an upper bound.
    let highest = rate_with_backpressure(installation, follower).await;
    let (mut sustained, mut step) = (0.0, highest / 2.0);
    for _ in 0..PROBES {
        installation.caught_up().await;
        let (_, lag) = at_rate(installation, follower, sustained + step, PROBE_TIME).await;
        if lag.p99 <= MAX_LAG {
            sustained += step;
        }
        step /= 2.0;
    }
    assert!(sustained > 0.0, "the views do not keep up with even a {}th of {highest} orders/s", 1 << PROBES);
    sustained
}

/// Places orders at a rate, and returns the lag of the views.
async fn at_rate(installation: &mut Installation, follower: &Follower, rate: f64, time: Duration) -> (Measured, Lag) {
    let machine = installation.machine();
    let (generator, orders) = installation.orders();
    let mut workload = Followed { orders, acknowledged: vec![] };
    follower.forget();
    let (measured, _) = generator.run(&machine, Pace::PerSecond(rate), time, &mut workload).await;
    let lag = Lag::of(&follower.lags(&workload.acknowledged).await);
    let Lag { p99, worst } = lag;
    eprintln!("{rate:.0} orders/s for {time:?}: lag of 99 of 100 orders {p99:.2} s, at worst {worst:.2} s");
    (measured, lag)
}

impl Lag {
    /// Summarizes lags, which must be sorted.
    fn of(lags: &[f64]) -> Self {
        let at = |share: f64| {
            let place = (lags.len() as f64 * share).ceil() as usize;
            lags.get(place.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p99: at(SHARE), worst: at(1.0) }
    }
}

/// The rate of orders under backpressure that keeps the views about half a second behind.
async fn rate_with_backpressure(installation: &mut Installation, follower: &Follower) -> f64 {
    const TIME: Duration = Duration::from_secs(8);
    const IN_FLIGHT: usize = 256;

    let mut rate = 2_000.0;
    // The lag is the number of orders that the views have not reached, divided by the rate. Find the number that makes
    // the lag half a second.
    for _ in 0..2 {
        let (generator, orders) = installation.orders();
        let max_lag = (rate * MAX_LAG / 2.0) as u64 * EVENTS;
        let mut workload = PacedOrders { orders, follower, acknowledged: 0, max_lag };
        rate = generator.run_with_backpressure(IN_FLIGHT, TIME, &mut workload).await / EVENTS as f64;
    }
    rate
}

/// Orders under the backpressure of the views.
struct PacedOrders<'a> {
    orders: Orders<'a>,
    follower: &'a Follower,
    /// The last position that was acknowledged.
    acknowledged: u64,
    /// How many positions the views may be behind.
    max_lag: u64,
}

impl Backpressured for PacedOrders<'_> {
    fn may_send(&self) -> bool {
        self.acknowledged < self.follower.position() + self.max_lag
    }

    fn processed(&self) -> u64 {
        self.follower.position()
    }
}

impl Workload for PacedOrders<'_> {
    fn next(&mut self) -> Option<Request> {
        self.orders.next()
    }

    fn follow_up(&mut self, reply: &Message) -> Option<Request> {
        self.acknowledged = self.acknowledged.max(position(reply));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_order_in_a_hundred_does_not_count() {
        let mut lags: Vec<f64> = vec![0.5; 99];
        lags.push(4.4);
        let Lag { p99, worst } = Lag::of(&lags);
        assert_eq!((p99, worst), (0.5, 4.4));
        lags[98] = 1.5;
        assert_eq!(Lag::of(&lags).p99, 1.5);
        assert_eq!(Lag::of(&[]).worst, 0.0);
    }
}
