//! Measures Watershed against the bare servers that it is built on, in the same minute on the same machine. The two are
//! measured alternately, and the round with the median ratio counts, since machines are shared and noisy.

mod bare;
mod change;
mod cost;
mod echo;
mod follow;
mod growth;
mod installation;
mod load;
mod report;
mod retail;
mod rows;
mod soak;
mod sustained;

use std::sync::Arc;

pub use bare::echo;
pub use report::{Row, chart, table};
pub use soak::soak;

use crate::Stack;
use rows::Bench;

/// The rows, in the order in which they are measured. Those that need few orders come first.
pub const ROWS: [&str; 17] = [
    "order_create_1",
    "visible",
    "sustained",
    "retail",
    "order_get_64",
    "order_get_vs_find",
    "order_list_64",
    "search_64",
    "idle",
    "rebuild",
    "rebuild_beside",
    "switch",
    "order_create_256",
    "order_create_vs_tx",
    "scraped",
    "replicas",
    "growth",
];

/// Measures the rows, or only those whose names are given, on private servers. Calls `done` with each row at once.
///
/// # Panics
/// If a request or a server fails.
pub async fn run(only: &[String], mut done: impl FnMut(&Row)) -> Vec<Row> {
    let wanted: Vec<&str> = ROWS.into_iter().filter(|row| only.is_empty() || only.iter().any(|it| it == row)).collect();
    let stack: Arc<Stack> = Stack::measured("bench");
    let mut rows = Vec::new();
    let mut done = |row: Row| {
        done(&row);
        rows.push(row);
    };
    let mut bench = None;
    for row in wanted {
        match row {
            "retail" => done(retail::retail(&stack).await),
            "growth" => {
                // The installation of the rows before would take memory and disk.
                bench = None;
                growth::growth(&stack, &mut done).await;
            }
            row => {
                if bench.is_none() {
                    bench = Some(Bench::start(&stack).await);
                }
                if let Some(bench) = &mut bench {
                    bench.measure(row).await.into_iter().for_each(&mut done);
                }
            }
        }
    }
    rows
}
