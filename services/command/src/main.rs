//! The command service: reads its settings, sets up logging, and runs.

use command_service::{Config, Task, migrate, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config: Config = runtime::settings();
    runtime::trace();
    match config.task {
        Some(Task::Migrate) => migrate(&config).await,
        None => run(config, runtime::on_signal()?).await,
    }
}
