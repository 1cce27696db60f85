//! The query service: reads its settings, sets up logging, and runs.

use query_service::{Config, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut config: Config = runtime::settings();
    config.replica.keep_name();
    runtime::trace("query", &config.replica);
    run(config, runtime::on_signal()?).await
}
