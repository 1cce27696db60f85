//! `make bench [ONLY=row]` prints the table, and writes it as JSON and as a chart. `make soak` keeps up a load for
//! long.

use std::path::PathBuf;

use clap::Parser;
use tests::bench;

/// Measures Watershed against the bare servers that it is built on, on private servers
#[derive(Parser)]
struct Arguments {
    /// Measure only these rows
    #[arg(long, num_args = 1.., value_parser = bench::ROWS)]
    only: Vec<String>,
    /// The file for the rows as JSON
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
    /// The file for the chart
    #[arg(long, default_value = "target/bench.svg")]
    chart: PathBuf,
    /// Instead of measuring rows, place orders for this many minutes without a break
    #[arg(long)]
    soak: Option<usize>,
    /// (used by the bench itself: answer requests to this subject)
    #[arg(long, hide = true, requires = "echo_bytes")]
    echo: Option<String>,
    #[arg(long, hide = true)]
    echo_bytes: Option<usize>,
    #[arg(long, hide = true, env = "NATS_URL", hide_env_values = true)]
    nats_url: Option<String>,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let Arguments { only, json, chart, soak, echo, echo_bytes, nats_url } = Arguments::parse();
    if let (Some(subject), Some(bytes), Some(url)) = (echo, echo_bytes, nats_url) {
        return bench::echo(&url, subject, bytes).await;
    }
    // A signal drops the measurement, which ends the processes that it has started.
    let measured = runtime::on_signal()?.run_until_cancelled(measure(only, json, chart, soak)).await;
    measured.unwrap_or_else(|| anyhow::bail!("stopped"))
}

async fn measure(only: Vec<String>, json: PathBuf, chart: PathBuf, soak: Option<usize>) -> anyhow::Result<()> {
    if let Some(minutes) = soak {
        anyhow::ensure!(bench::soak(minutes).await, "memory, lag or latency has grown");
        return Ok(());
    }
    let shown = |row: &bench::Row| {
        eprintln!("{} {:.3} : {:.3} = {:.3} {}", row.name, row.ours, row.bare, row.ratio, row.note);
    };
    let rows = bench::run(&only, shown).await;
    print!("{}", bench::table(&rows));
    std::fs::write(json, serde_json::to_vec_pretty(&rows)?)?;
    std::fs::write(chart, bench::chart(&rows))?;
    Ok(())
}
