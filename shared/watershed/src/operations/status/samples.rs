//! Replies as the services send them, for tests.

use serde_json::{Value, json};

use super::{
    observer::Observer,
    report::{Look, Report, Scope},
};

/// The replies of a healthy installation with one replica of each service.
pub fn healthy() -> Vec<Value> {
    vec![
        reply(
            "command",
            "c1",
            json!({
                "ready": true, "problems": [], "servers": {
                    "nats": {"up": true, "losses": 0, "away_seconds": 0.0},
                    "postgres": {"up": true, "losses": 1, "away_seconds": 2.5},
                },
                "queue": {"commands": 3, "bytes": 512, "max_commands": 8192, "max_bytes": 67108864},
                "batches": {"count": 10, "commands": 120, "last": 12, "largest": 64},
                "known_aggregates": 4021, "relay": true, "journal": {"position": 1042}, "stream": {"position": 1042},
            }),
        ),
        reply(
            "projection",
            "p1",
            json!({
                "ready": true, "problems": [], "servers": {
                    "nats": {"up": true, "losses": 0, "away_seconds": 0.0},
                    "mongodb": {"up": true, "losses": 0, "away_seconds": 0.0},
                },
                "stream": {"position": 1042},
                "views": [led("orders", 3, 1042, 0.0), led("users", 1, 1042, 0.0)],
            }),
        ),
        query("q1", 1042, 1042),
    ]
}

/// A reply of a replica of the installation `EVENTS` without a prefix, which was started an hour before it was asked.
pub fn reply(service: &str, replica: &str, data: Value) -> Value {
    json!({
        "type": "io.nats.micro.v1.stats_response", "name": service, "id": replica, "version": "0.1.0",
        "metadata": {"replica": replica, "revision": "d80c91b0a1b2", "stream": "EVENTS", "prefix": ""},
        "started": "2026-01-31T08:30:00.000Z", "endpoints": [], "data": data,
    })
}

/// A query replica that has seen these checkpoints of the views `orders` and `users`.
pub fn query(replica: &str, orders: u64, users: u64) -> Value {
    reply(
        "query",
        replica,
        json!({
            "ready": true, "problems": [], "servers": {},
            "in_flight": 12, "max_in_flight": 4096,
            "views": [
                {"view": "orders", "generation": 1, "position": orders},
                {"view": "users", "generation": 1, "position": users},
            ],
        }),
    )
}

/// A view in the reply of the projection replica that leads it.
pub fn led(view: &str, term: u64, position: u64, lag_seconds: f64) -> Value {
    json!({
        "view": view, "generation": 1, "version": 1, "term": term, "position": position,
        "lag_events": 1042 - position, "lag_seconds": lag_seconds, "events_per_second": 12.5, "state": "live",
        "reason": null,
    })
}

/// An observer, and the time that has passed for it.
#[derive(Default)]
pub struct Watched {
    observer: Observer,
    seconds: u64,
}

impl Watched {
    /// What is seen some seconds after the look before.
    pub fn after(&mut self, seconds: u64, replies: &[Value]) -> Report {
        self.seconds += seconds;
        let look = Look {
            elapsed: std::time::Duration::from_secs(self.seconds),
            at: "2026-01-31T09:30:00.000Z".parse().unwrap(),
            replies: replies.iter().map(|reply| serde_json::from_value(reply.clone()).unwrap()).collect(),
        };
        Report::new(&Scope { stream: "EVENTS".into(), prefix: "".into() }, &mut self.observer, look)
    }
}

/// What is seen at a single look.
pub fn report(replies: &[Value]) -> Report {
    Watched::default().after(0, replies)
}
