//! The highest rate of orders that the views follow: 99 of 100 moments are in all views within a second. The worst moment is
//! told beside it, and does not decide: of a minute's moments it is one stall, of whichever server.

use std::time::Duration;

use async_nats::Message;

use super::{
    bare::EVENTS,
    follow::{Followed, Follower, position},
    installation::{Installation, Orders},
    load::{Ask, Held, Measured, Pace, Traffic},
};

/// For how long the views must follow.
pub const SUSTAINED: Duration = Duration::from_secs(60);
/// By how many seconds the views may be behind.
const LAG: f64 = 1.0;
/// For this share of the moments. Orders come at an even rate, so that each stands for as much time.
const MOMENTS: f64 = 0.99;
/// How many rates are tried before that, each for so long.
const PROBES: u32 = 4;
const PROBED: Duration = Duration::from_secs(9);
/// What is tried after a rate that was too high in the end: less by as much as the lag was too long, within these.
const STEPS_DOWN: (f64, f64) = (0.75, 0.95);

/// A rate that was kept up.
pub struct Sustained {
    pub measured: Measured,
    pub behind: Behind,
}

/// By how many seconds the views were behind.
#[derive(Clone, Copy)]
pub struct Behind {
    /// In [`MOMENTS`] at most.
    nearly_always: f64,
    /// At the worst moment.
    pub worst: f64,
}

/// The highest rate that the views follow, kept up.
pub async fn sustained(installation: &mut Installation) -> Sustained {
    let follower = Follower::start(&installation.system).await;
    let mut rate = followed_for_a_while(installation, &follower).await;
    loop {
        installation.caught_up().await;
        let (measured, behind) = at_rate(installation, &follower, rate, SUSTAINED).await;
        if behind.nearly_always <= LAG {
            return Sustained { measured, behind };
        }
        rate *= (LAG / behind.nearly_always).clamp(STEPS_DOWN.0, STEPS_DOWN.1);
    }
}

/// The rate of orders that the views follow for a while.
async fn followed_for_a_while(installation: &mut Installation, follower: &Follower) -> f64 {
    // Where the views hold the load back, it comes in larger batches, which cost less: the rate is an upper bound.
    let highest = held_back(installation, follower).await;
    let (mut followed, mut step) = (0.0, highest / 2.0);
    for _ in 0..PROBES {
        installation.caught_up().await;
        let (_, behind) = at_rate(installation, follower, followed + step, PROBED).await;
        if behind.nearly_always <= LAG {
            followed += step;
        }
        step /= 2.0;
    }
    assert!(followed > 0.0, "the views do not follow even a {}th of {highest} orders/s", 1 << PROBES);
    followed
}

/// Places orders at a rate; says by how many seconds the views were behind.
async fn at_rate(
    installation: &mut Installation,
    follower: &Follower,
    rate: f64,
    time: Duration,
) -> (Measured, Behind) {
    let machine = installation.machine();
    let (asker, orders) = installation.orders();
    let mut traffic = Followed { orders, acknowledged: vec![] };
    follower.forget();
    let (measured, _) = asker.ask(&machine, Pace::PerSecond(rate), time, &mut traffic).await;
    let behind = Behind::of(&follower.lags(&traffic.acknowledged).await);
    let Behind { nearly_always, worst } = behind;
    eprintln!(
        "{rate:.0} orders/s for {time:?}: behind by {nearly_always:.2} s at 99 of 100 moments, {worst:.2} s at worst"
    );
    (measured, behind)
}

impl Behind {
    /// Of lags that are sorted.
    fn of(lags: &[f64]) -> Self {
        let at = |share: f64| {
            let place = (lags.len() as f64 * share).ceil() as usize;
            lags.get(place.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { nearly_always: at(MOMENTS), worst: at(1.0) }
    }
}

/// The rate of orders at which the views are about half a second behind, if they hold the load back.
async fn held_back(installation: &mut Installation, follower: &Follower) -> f64 {
    const TIME: Duration = Duration::from_secs(8);
    const IN_FLIGHT: usize = 256;

    let mut rate = 2_000.0;
    // The number of orders that are not followed yet, and the rate, tell the lag: find the number that makes half a
    // second of it.
    for _ in 0..2 {
        let (asker, orders) = installation.orders();
        let most = (rate * LAG / 2.0) as u64 * EVENTS;
        let mut traffic = HeldBack { orders, follower, acknowledged: 0, most };
        rate = asker.held_back(IN_FLIGHT, TIME, &mut traffic).await / EVENTS as f64;
    }
    rate
}

/// Orders that wait for the views.
struct HeldBack<'a> {
    orders: Orders<'a>,
    follower: &'a Follower,
    /// The last position that was acknowledged.
    acknowledged: u64,
    /// By how many positions the views may be behind.
    most: u64,
}

impl Held for HeldBack<'_> {
    fn may_go_on(&self) -> bool {
        self.acknowledged < self.follower.position() + self.most
    }

    fn done(&self) -> u64 {
        self.follower.position()
    }
}

impl Traffic for HeldBack<'_> {
    fn next(&mut self) -> Option<Ask> {
        self.orders.next()
    }

    fn then(&mut self, reply: &Message) -> Option<Ask> {
        self.acknowledged = self.acknowledged.max(position(reply));
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_moment_in_a_hundred_does_not_decide() {
        let mut lags: Vec<f64> = vec![0.5; 99];
        lags.push(4.4);
        let Behind { nearly_always, worst } = Behind::of(&lags);
        assert_eq!((nearly_always, worst), (0.5, 4.4));
        lags[98] = 1.5;
        assert_eq!(Behind::of(&lags).nearly_always, 1.5);
        assert_eq!(Behind::of(&[]).worst, 0.0);
    }
}
