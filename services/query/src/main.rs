//! The query service: parse, trace, run.

use clap::Parser;
use query_service::{Config, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    runtime::trace();
    run(config, runtime::on_signal()?).await
}
