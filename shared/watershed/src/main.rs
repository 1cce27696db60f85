//! The program `watershed`.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    watershed::exit_code(watershed::run(runtime::settings()).await)
}
