//! What every service is run with: the NATS connection, the micro service protocol, telemetry, shutdown.

mod backoff;
mod clock;
mod config;
mod listener;
mod log_throttle;
pub mod micro;
mod nats;
mod protocol;
mod ready;
mod shutdown;
mod telemetry;
mod tls;

pub use backoff::Backoff;
pub use clock::now;
pub use config::{Password, ReplicaConfig, at_least_one, settings, with_password};
pub use log_throttle::LogThrottle;
pub use nats::{ConnectionClosed, Nats, NatsConfig, nats_options, serve_again};
pub use ready::Ready;
pub use shutdown::on_signal;
pub use telemetry::trace;

/// Gives memory back some seconds after it was last used, which the C library's keeps in pieces.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
