//! What all services need to run: the connections to NATS, the micro service protocol, settings, logging and shutdown.

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

/// jemalloc returns memory to the system some seconds after its last use, whereas the C library's allocator fragments
/// it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;
