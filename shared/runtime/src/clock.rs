//! The clock. Only the services read it; the domain is given the time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use domain::Timestamp;

/// How long ago something was recorded. The clock that recorded it may be ahead of this one.
pub fn age(recorded: Timestamp) -> Duration {
    Duration::from_millis(u64::try_from(now().unix_millis() - recorded.unix_millis()).unwrap_or_default())
}

/// The present time, to the millisecond.
pub fn now() -> Timestamp {
    let millis = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
    };
    Timestamp::from_unix_millis(millis).unwrap_or_default()
}
