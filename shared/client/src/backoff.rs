//! The delays before retries: exponential, with full jitter, so that clients that failed together do not come back
//! together.

use std::{
    hash::{BuildHasher, Hasher, RandomState},
    time::Duration,
};

/// The bound of the delay before the first retry. It doubles with each retry.
const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);

/// A random delay before a retry; 0 is the first.
pub fn delay(retry: usize) -> Duration {
    // The standard library's hasher starts with random keys, which is random enough to spread clients.
    scaled(bound(retry), RandomState::new().build_hasher().finish())
}

fn bound(retry: usize) -> Duration {
    let doublings = u32::try_from(retry).unwrap_or(u32::MAX).min(16);
    (FIRST * 2_u32.pow(doublings)).min(LONGEST)
}

/// The part of the bound that the random number stands for.
fn scaled(bound: Duration, random: u64) -> Duration {
    bound.mul_f64(random as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_doubles_up_to_the_longest() {
        let millis: Vec<u128> = (0..8).map(|retry| bound(retry).as_millis()).collect();
        assert_eq!(millis, [50, 100, 200, 400, 800, 1600, 2000, 2000]);
        assert_eq!(bound(usize::MAX), LONGEST);
    }

    #[test]
    fn a_delay_is_anywhere_between_zero_and_the_bound() {
        assert_eq!(scaled(LONGEST, 0), Duration::ZERO);
        assert_eq!(scaled(LONGEST, u64::MAX), LONGEST);
        let delays: Vec<Duration> = (0..1_000).map(|_| delay(3)).collect();
        assert!(delays.iter().all(|delay| *delay <= bound(3)));
        let (low, high) = (bound(3) / 10, bound(3) * 9 / 10);
        assert!(delays.iter().any(|delay| *delay < low) && delays.iter().any(|delay| *delay > high));
    }
}
