//! The program `watershed`, by which people look at an installation and act on it. Invariants: whatever it needs to
//! know, it asks over NATS; what it prints on stdout is the answer and nothing else; and its exit code says how the
//! operation ended ([`Outcome`]).
//!
//! A further operation is one file in `operations/`, and one line in the list in `operations.rs`.

mod comparison;
mod connection;
mod following;
mod generations;
mod operations;
mod operator;
mod outcome;
mod progress;
mod table;
mod words;

use clap::Parser;

pub use connection::Installation;
pub use operations::Operation;
pub use outcome::{Failure, Outcome, exit_code};

const HELP: &str = "\
NATS is the one of --nats-url, or else of NATS_URL; where the operator's rights are needed, of
NATS_OPERATOR_URL, if that is set. Several servers are separated by commas. If no URL is set, those
of .stack/env are used, in this directory or the nearest one above.

Exit codes:
  0  all is well; the request was accepted
  1  something is wrong with the installation; the request was refused
  2  the command line is wrong
  3  NATS cannot be reached, or nobody has answered
  130  left by Ctrl-C; what was begun goes on";

/// Looks at an installation of Watershed, and sends requests to it
#[derive(Parser)]
#[command(name = "watershed", version, after_help = HELP)]
pub struct Arguments {
    #[command(subcommand)]
    operation: Operation,
    #[command(flatten)]
    installation: Installation,
}

/// Carries out the operation.
///
/// # Errors
/// If the operation cannot be carried out, or the services refuse it.
pub async fn run(arguments: Arguments) -> Result<Outcome, Failure> {
    let Arguments { operation, installation } = arguments;
    operation.run(&installation).await
}
