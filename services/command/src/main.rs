//! The command service: parse, trace, run.

use clap::Parser;
use command_service::{Config, Task, migrate, run};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let config = Config::parse();
    runtime::trace();
    match config.task {
        Some(Task::Migrate) => migrate(&config).await,
        None => run(config, runtime::on_signal()?).await,
    }
}
