//! The query service: reads its settings, sets up logging, and runs.

use query_service::{Config, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config: Config = runtime::settings();
    runtime::trace();
    run(config, runtime::on_signal()?).await
}
