//! `make retail FILE=path.csv`: replays a shop's invoices through NATS.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use client::{Client, ConnectOptions};
use retail::{DateOrder, Invoices};
use wire::Prefix;

/// Replays invoices in the layout of the UCI "Online Retail" data set
#[derive(Parser)]
struct Arguments {
    /// The CSV file, plain or gzipped
    file: PathBuf,
    /// Whether the month or the day comes first in dates that end with the year [default: found out from the file]
    #[arg(long, env = "DATES", value_enum)]
    dates: Option<DateOrder>,
    /// NATS server, with the client's user and password
    #[arg(long, env = "NATS_URL", hide_env_values = true, default_value = "nats://127.0.0.1:4222")]
    nats_url: String,
    /// One token in front of every subject
    #[arg(long, env = "SUBJECT_PREFIX")]
    subject_prefix: Option<Prefix>,
    /// Requests in flight
    #[arg(long, env = "IN_FLIGHT", default_value_t = 256)]
    in_flight: usize,
}

#[tokio::main]
async fn main() -> ExitCode {
    match replay(Arguments::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("retail: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn replay(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { file, dates, .. } = &arguments;
    let invoices = Invoices::read(file, *dates).with_context(|| format!("cannot use {}", file.display()))?;
    let options = ConnectOptions::url(&arguments.nats_url).prefix(arguments.subject_prefix).name("watershed importer");
    let client = Client::connect(&options).await?;
    tokio::select! {
        report = invoices.replay(&client, arguments.in_flight, true) => println!("{}", report?),
        _ = tokio::signal::ctrl_c() => eprintln!("stopped; run it again to continue, nothing will happen twice"),
    }
    Ok(())
}
