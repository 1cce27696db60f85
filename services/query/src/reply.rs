//! The failures that are this service's own; all others come from `wire` and `views`.

use std::fmt::Display;

use views::Key;
use wire::{Code, Failure};

pub fn not_found(noun: &str, key: &Key, position: u64) -> Failure {
    let (name, asked) = (key.name(), &*key.requested);
    let failure = Failure::new(Code::NotFound, format!("there is no {noun} with the {name} {asked}"));
    failure.with(name, asked).with("position", position)
}

/// The failure of a report that has no documents to report on.
pub fn nothing(view: &str, position: u64) -> Failure {
    let message = format!("the view {view} has nothing that the query asks for");
    Failure::new(Code::NotFound, message).with("position", position)
}

pub fn unserved(view: &str, reason: &str) -> Failure {
    Failure::new(Code::Unavailable, format!("the view {view} cannot be read: {reason}")).with("view", view)
}

pub fn behind(view: &str, position: u64, min_position: u64) -> Failure {
    let message = format!("the view {view} is at position {position}, and did not reach {min_position} in time");
    let failure = Failure::new(Code::ViewBehind, message);
    failure.with("view", view).with("position", position).with("min_position", min_position)
}

pub fn too_large(max_bytes: usize) -> Failure {
    Failure::new(Code::TooLarge, format!("the reply would have more than {max_bytes} bytes"))
        .with("max_bytes", max_bytes)
}

pub fn overloaded(max_in_flight: u32) -> Failure {
    Failure::new(Code::Overloaded, format!("{max_in_flight} queries are being answered already: try again later"))
}

pub fn unavailable() -> Failure {
    Failure::new(Code::Unavailable, "the views' database is unavailable: try again later")
}

/// Logs a fault of the service itself, and returns the failure to answer with.
pub fn internal(view: &str, error: impl Display) -> Failure {
    tracing::error!(view, %error, "a query cannot be answered");
    Failure::new(Code::Internal, "the view cannot be read")
}
