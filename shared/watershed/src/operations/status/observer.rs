//! What one set of replies cannot tell: what moves, since when something stands still, and who has fallen silent. An
//! observer sees one set after the other, and remembers. Time is the time since some beginning, and comes in.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use super::replies::Reply;

/// After this time, a replica that has fallen silent counts as removed.
const FORGOTTEN: Duration = Duration::from_secs(900);
/// The time over which rates are measured.
const RATE_WINDOW: Duration = Duration::from_secs(10);

#[derive(Default)]
pub struct Observer {
    /// The replicas, by service and name.
    replicas: BTreeMap<(String, String), Seen>,
    /// What is followed, by name.
    tracks: BTreeMap<String, Track>,
    /// Since when something holds, by name.
    conditions: BTreeMap<String, Duration>,
}

/// A replica's last reply.
#[derive(Clone)]
pub struct Seen {
    pub reply: Reply,
    /// How long ago it came.
    pub silent: Duration,
    at: Duration,
}

/// How a position has moved.
#[derive(Default)]
struct Track {
    /// The positions in the last [`RATE_WINDOW`], and when they were seen.
    positions: VecDeque<(Duration, u64)>,
    lag: u64,
    stuck_since: Option<Duration>,
    /// The lag before it began to grow, and when that was.
    rising: Option<(u64, Duration)>,
}

/// What is known of how a position moves.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Movement {
    /// `None` if it has been seen once only.
    pub events_per_second: Option<f64>,
    /// How long it has been seen at this position, behind the head.
    pub stuck: Option<Duration>,
    /// The lag from which it has grown ever since, and for how long.
    pub rising: Option<(u64, Duration)>,
    /// Whether it is behind, and has not been seen to move.
    pub may_be_stuck: bool,
}

impl Observer {
    /// Notes who has answered; returns all replicas that are remembered.
    pub fn replicas(&mut self, now: Duration, replies: Vec<Reply>) -> Vec<Seen> {
        for reply in replies {
            let key = (reply.name.clone(), reply.id.clone());
            self.replicas.insert(key, Seen { reply, silent: Duration::ZERO, at: now });
        }
        self.replicas.values_mut().for_each(|seen| seen.silent = now.saturating_sub(seen.at));
        self.replicas.retain(|_, seen| seen.silent < FORGOTTEN);
        self.replicas.values().cloned().collect()
    }

    /// Notes where something is that follows the head of the journal, and how many events it is behind.
    pub fn movement(&mut self, now: Duration, what: &str, position: u64, lag: u64) -> Movement {
        let track = self.tracks.entry(what.to_owned()).or_default();
        let last = track.positions.back().copied();
        let has_moved = last.is_some_and(|(_, last)| last != position);
        track.stuck_since = match track.stuck_since {
            _ if lag == 0 => None,
            Some(since) if !has_moved => Some(since),
            _ => Some(now),
        };
        track.rising = match last {
            Some((at, _)) if lag > track.lag => track.rising.or(Some((track.lag, at))),
            Some(_) if lag == track.lag => track.rising,
            _ => None,
        };
        track.lag = lag;
        track.positions.push_back((now, position));
        while track.positions.len() > 2 && track.positions.front().is_some_and(|(at, _)| now - *at > RATE_WINDOW) {
            track.positions.pop_front();
        }
        let (began, first) = track.positions.front().copied().unwrap_or((now, position));
        let elapsed = now.saturating_sub(began).as_secs_f64();
        let stuck = track.stuck_since.map(|since| now - since);
        let average = (elapsed > 0.0).then(|| position.saturating_sub(first) as f64 / elapsed);
        Movement {
            // What has stopped has no speed left, however fast it was.
            events_per_second: if stuck > Some(Duration::ZERO) { Some(0.0) } else { average },
            stuck,
            rising: track.rising.map(|(from, since)| (from, now - since)),
            may_be_stuck: lag > 0 && first == position,
        }
    }

    /// Notes whether something holds; returns for how long it has.
    pub fn holds(&mut self, now: Duration, what: &str, does: bool) -> Option<Duration> {
        if !does {
            self.conditions.remove(what);
            return None;
        }
        Some(now - *self.conditions.entry(what.to_owned()).or_insert(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_rate_is_measured_over_ten_seconds() {
        let mut observer = Observer::default();
        assert_eq!(observer.movement(s(0), "a", 100, 0).events_per_second, None);
        assert_eq!(observer.movement(s(2), "a", 120, 0).events_per_second, Some(10.0));
        for second in 3..=30 {
            observer.movement(s(second), "a", 120, 0);
        }
        assert_eq!(observer.movement(s(31), "a", 120, 0).events_per_second, Some(0.0));
    }

    #[test]
    fn what_is_behind_and_does_not_move_is_stuck() {
        let mut observer = Observer::default();
        let first = observer.movement(s(0), "a", 100, 5);
        assert!(first.may_be_stuck && first.stuck == Some(s(0)));
        let second = observer.movement(s(3), "a", 100, 9);
        assert_eq!((second.stuck, second.events_per_second), (Some(s(3)), Some(0.0)));
        let moved = observer.movement(s(4), "a", 101, 9);
        assert!(!moved.may_be_stuck && moved.stuck == Some(s(0)));
        assert_eq!(
            observer.movement(s(5), "a", 110, 0),
            Movement { events_per_second: Some(2.0), ..Movement::default() }
        );
        assert_eq!(observer.movement(s(9), "a", 110, 0).stuck, None);
    }

    #[test]
    fn a_lag_rises_for_as_long_as_it_never_falls() {
        let mut observer = Observer::default();
        let mut rising = |second, lag| observer.movement(s(second), "a", second, lag).rising;
        assert_eq!(rising(0, 10), None);
        assert_eq!(rising(2, 20), Some((10, s(2))));
        assert_eq!(rising(4, 20), Some((10, s(4))));
        assert_eq!(rising(6, 30), Some((10, s(6))));
        assert_eq!(rising(8, 29), None);
        assert_eq!(rising(10, 31), Some((29, s(2))));
    }
}
