//! The command service: parse, trace, run.

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
