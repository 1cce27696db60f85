//! Whether a server that a service needs is up, how often it has been lost, and for how long it has been away.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::watch;

/// A server that a service needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    Nats,
    Postgres,
    Mongodb,
}

impl Server {
    /// The name in metrics and statistics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Nats => "nats",
            Self::Postgres => "postgres",
            Self::Mongodb => "mongodb",
        }
    }
}

/// The name in sentences.
impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nats => "NATS",
            Self::Postgres => "PostgreSQL",
            Self::Mongodb => "MongoDB",
        })
    }
}

/// The status of a server, which its clones share.
#[derive(Clone, Debug)]
pub struct ServerStatus {
    pub server: Server,
    state: Arc<watch::Sender<State>>,
}

#[derive(Clone, Copy, Debug)]
struct State {
    is_up: bool,
    /// How often the server was up and then was not. The number shows even a loss that was repaired before anybody
    /// looked.
    losses: u64,
    /// Since when it is up or down.
    since: Instant,
    /// How long it was down before that.
    away: Duration,
}

impl ServerStatus {
    /// The status of a server that has not answered yet.
    pub fn new(server: Server) -> Self {
        let state = State { is_up: false, losses: 0, since: Instant::now(), away: Duration::ZERO };
        Self { server, state: Arc::new(watch::channel(state).0) }
    }

    /// Says whether the server is up; returns whether that is a change.
    pub fn set_up(&self, is_up: bool) -> bool {
        self.state.send_if_modified(|state| {
            if state.is_up == is_up {
                return false;
            }
            let State { losses, away, .. } = *state;
            let was = state.since.elapsed();
            *state = match is_up {
                true => State { is_up, losses, since: Instant::now(), away: away + was },
                false => State { is_up, losses: losses + 1, since: Instant::now(), away },
            };
            true
        })
    }

    pub fn is_up(&self) -> bool {
        self.state.borrow().is_up
    }

    /// How often the server has been lost.
    pub fn losses(&self) -> u64 {
        self.state.borrow().losses
    }

    /// How long it has been down in all.
    pub fn away(&self) -> Duration {
        let State { is_up, since, away, .. } = *self.state.borrow();
        if is_up { away } else { away + since.elapsed() }
    }

    /// For how long it has been down now; `None` if it is up.
    pub fn down_for(&self) -> Option<Duration> {
        let State { is_up, since, .. } = *self.state.borrow();
        (!is_up).then(|| since.elapsed())
    }

    /// Waits until the server is up.
    pub async fn up(&self) {
        // `wait_for` cannot fail: `self` keeps the sender.
        let _ = self.state.subscribe().wait_for(|state| state.is_up).await;
    }

    /// Waits until the server has been lost more than `losses` times.
    pub async fn lost(&self, losses: u64) {
        let _ = self.state.subscribe().wait_for(|state| state.losses != losses).await;
    }

    /// Waits until the server goes down or comes back.
    pub async fn changed(&self) {
        let _ = self.state.subscribe().changed().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn losses_and_the_time_away_are_counted() {
        let status = ServerStatus::new(Server::Nats);
        assert!(!status.is_up() && !status.set_up(false) && status.losses() == 0);
        assert!(status.set_up(true) && !status.set_up(true));
        let away = status.away();
        assert!(status.set_up(false));
        assert_eq!(status.losses(), 1);
        assert!(status.down_for().is_some());
        status.set_up(true);
        status.lost(0).await;
        assert!(status.away() >= away && status.down_for().is_none());
    }
}
