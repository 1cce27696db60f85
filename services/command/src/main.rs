//! The command service: reads its settings, sets up logging, and runs.

use command_service::{Config, Task, migrate, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut config: Config = runtime::settings();
    config.replica.keep_name();
    runtime::trace("command", &config.replica);
    match config.task {
        Some(Task::Migrate) => migrate(&config).await,
        None => run(config, runtime::on_signal()?).await,
    }
}
