//! What all services need to run: the connections to NATS, the micro service protocol, settings, logging and shutdown.

mod backoff;
mod clock;
mod config;
mod figures;
pub mod http;
mod known_position;
mod listener;
mod log_throttle;
pub mod micro;
#[cfg(feature = "mongodb")]
pub mod mongodb_driver;
mod monitor;
mod nats;
pub mod operations;
mod process;
mod protocol;
mod pulse;
mod ready;
mod server_status;
mod shutdown;
mod telemetry;
mod tls;
pub mod traces;

use std::sync::{Mutex, MutexGuard, PoisonError};

pub use backoff::Backoff;
pub use clock::{age, now};
pub use config::{Password, ReplicaConfig, at_least_one, settings, with_password};
pub use figures::{Figures, number, rounded};
pub use known_position::KnownPosition;
pub use log_throttle::LogThrottle;
pub use monitor::{Label, Monitor, Problem};
pub use nats::{ConnectionClosed, Nats, NatsConfig, StreamState, serve_again};
pub use prometheus_client::metrics::{counter::Counter, family::Family, histogram::Histogram};
pub use pulse::Pulse;
pub use ready::Ready;
pub use server_status::{Server, ServerStatus};
pub use shutdown::on_signal;
pub use telemetry::trace;
pub use traces::Tracer;

/// Locks what a panic cannot poison: no code that holds such a lock can leave its data half changed.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// jemalloc returns memory to the system some seconds after its last use, whereas the C library's allocator fragments
/// it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
