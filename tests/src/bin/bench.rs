//! `make bench [ONLY=name]`: prints the table, and writes it as JSON.

use std::path::PathBuf;

use clap::Parser;
use tests::bench;

/// Measures Watershed against the bare parts that it is made of, on servers of its own
#[derive(Parser)]
struct Arguments {
    /// One row only
    #[arg(long)]
    only: Option<String>,
    /// Where the rows are written as JSON
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let rows = bench::run(arguments.only.as_deref()).await;
    println!("{:<20} {:>10} {:>12} {:>12} {:>8}", "row", "unit", "ours", "bare", "ratio");
    for row in &rows {
        println!("{:<20} {:>10} {:>12.2} {:>12.2} {:>8.2}", row.name, row.unit, row.ours, row.bare, row.ratio);
    }
    std::fs::write(arguments.json, serde_json::to_vec_pretty(&rows)?)?;
    Ok(())
}
