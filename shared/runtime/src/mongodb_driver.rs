//! What services need around MongoDB's driver: the use of its pool of connections, and texts of its errors for logs.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use mongodb::{
    error::{Error, ErrorKind, WriteFailure},
    event::{EventHandler, cmap::CmapEvent},
    options::ServerAddress,
};

use crate::{Monitor, Server, locked};

/// What the driver's events have told. A checkout that is given up ends without an event, so numbers that are only
/// counted up and down would drift.
#[derive(Default)]
struct Pool {
    open: HashSet<Connection>,
    busy: HashSet<Connection>,
    waiters: usize,
}

type Connection = (ServerAddress, u32);

/// Shows the use of a pool that may open `limit` connections; returns the handler of its events. With several servers,
/// the connections to all of them are counted together.
pub fn observe_pool(monitor: &Monitor, limit: u32) -> EventHandler<CmapEvent> {
    let (pool, limit) = (Arc::new(Mutex::new(Pool::default())), limit as usize);
    let shown = Arc::clone(&pool);
    monitor.add_figures(move |figures| {
        let Pool { open, busy, waiters } = &*locked(&shown);
        let idle = open.len().saturating_sub(busy.len());
        figures.connections(Server::Mongodb, busy.len(), idle, limit, *waiters);
    });
    EventHandler::callback(move |event| locked(&pool).note(event, limit))
}

impl Pool {
    fn note(&mut self, event: CmapEvent, limit: usize) {
        match event {
            CmapEvent::ConnectionCreated(event) => {
                self.open.insert((event.address, event.connection_id));
            }
            CmapEvent::ConnectionClosed(event) => {
                let connection = (event.address, event.connection_id);
                self.open.remove(&connection);
                self.busy.remove(&connection);
            }
            CmapEvent::ConnectionCheckoutStarted(_) => self.waiters += 1,
            CmapEvent::ConnectionCheckoutFailed(_) => self.waiters = self.waiters.saturating_sub(1),
            CmapEvent::ConnectionCheckedOut(event) => {
                self.waiters = self.waiters.saturating_sub(1);
                self.busy.insert((event.address, event.connection_id));
            }
            CmapEvent::ConnectionCheckedIn(event) => {
                self.busy.remove(&(event.address, event.connection_id));
            }
            // The enum is the driver's and non-exhaustive; the pool's own events change no number.
            _ => {}
        }
        // While there is a free connection, nobody waits for long.
        if self.busy.len() < limit && self.busy.len() < self.open.len() {
            self.waiters = 0;
        }
    }
}

/// The error without the server's own message, which may quote what is stored. A lost connection is always described by
/// the same text, although the driver's differ.
pub fn describe(error: &Error) -> String {
    match &*error.kind {
        ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. } | ErrorKind::ServerSelection { .. } => {
            "MongoDB does not answer".to_owned()
        }
        ErrorKind::Command(error) => format!("MongoDB refused with code {} {}", error.code, error.code_name),
        ErrorKind::Write(WriteFailure::WriteError(error)) => {
            format!("MongoDB refused a write with code {}", error.code)
        }
        ErrorKind::Write(WriteFailure::WriteConcernError(error)) => {
            format!("MongoDB did not confirm a write: code {} {}", error.code, error.code_name)
        }
        kind => kind.to_string(),
    }
}
