//! What services need around MongoDB's driver: the use of its pool of connections, and texts of its errors for logs.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

use mongodb::{
    error::{Error, ErrorKind, WriteFailure},
    event::{EventHandler, cmap::CmapEvent},
};

use crate::{Monitor, Server};

#[derive(Default)]
struct Pool {
    open: AtomicUsize,
    busy: AtomicUsize,
    waiters: AtomicUsize,
}

/// Shows the use of a pool that may open `limit` connections; returns the handler of its events. With several servers,
/// the connections to all of them are counted together.
pub fn observe_pool(monitor: &Monitor, limit: u32) -> EventHandler<CmapEvent> {
    let pool = Arc::new(Pool::default());
    let shown = Arc::clone(&pool);
    monitor.add_figures(move |figures| {
        let [open, busy, waiters] = [&shown.open, &shown.busy, &shown.waiters].map(|number| number.load(Relaxed));
        figures.connections(Server::Mongodb, busy, open.saturating_sub(busy), limit as usize, waiters);
    });
    EventHandler::callback(move |event| {
        match event {
            CmapEvent::ConnectionCreated(_) => increase(&pool.open),
            CmapEvent::ConnectionClosed(_) => decrease(&pool.open),
            CmapEvent::ConnectionCheckoutStarted(_) => increase(&pool.waiters),
            CmapEvent::ConnectionCheckoutFailed(_) => decrease(&pool.waiters),
            CmapEvent::ConnectionCheckedOut(_) => {
                decrease(&pool.waiters);
                increase(&pool.busy);
            }
            CmapEvent::ConnectionCheckedIn(_) => decrease(&pool.busy),
            // The enum is the driver's and non-exhaustive; the pool's own events change no number.
            _ => {}
        }
    })
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

fn increase(number: &AtomicUsize) {
    number.fetch_add(1, Relaxed);
}

fn decrease(number: &AtomicUsize) {
    // The driver may report events of one connection in another order than they happened; it never gets below zero.
    let _ = number.fetch_update(Relaxed, Relaxed, |number| number.checked_sub(1));
}
