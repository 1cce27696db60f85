//! The projection service: parse, trace, run.

use projection_service::{Config, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut config: Config = runtime::settings();
    config.replica.keep_name();
    runtime::trace("projection", &config.replica);
    run(config, runtime::on_signal()?).await
}
