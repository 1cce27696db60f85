//! A soak test: whether memory, lag or latency grow under a load that lasts.

use std::time::Duration;

use super::{
    follow::{Followed, Follower},
    installation::Installation,
    load::Pace,
    sustained::sustained,
};
use crate::Stack;

/// The load, as a share of the highest rate that the views sustain.
const SHARE: f64 = 0.8;
const WINDOW: Duration = Duration::from_secs(45);
/// How much higher the last third may be than the first, as a ratio.
const MAX_GROWTH: f64 = 1.2;

/// The medians of one window, and the memory at its end.
#[derive(Default)]
struct Window {
    latency: f64,
    lag: f64,
    memory: f64,
}

/// Places orders for this many minutes at 80 % of the highest rate that the views sustain. Prints a line for each
/// minute, and returns whether nothing has grown.
///
/// # Panics
/// If a request fails.
pub async fn soak(minutes: usize) -> bool {
    let stack = Stack::measured("soak");
    let mut installation = Installation::start(&stack, 20_000).await;
    installation.fill(1_000).await;
    installation.caught_up().await;
    let rate = SHARE * sustained(&mut installation).await.measured.rate();
    installation.caught_up().await;
    let follower = Follower::start(&installation.system).await;
    println!("{rate:.0} orders/s for {minutes} minutes");
    println!("minute   orders/s  p50 ms  p99 ms  lag p50 ms  lag p99 ms  lag max ms   MB: command projection query");
    let mut windows = Vec::new();
    for minute in 1..=minutes {
        let machine = installation.machine();
        let (generator, orders) = installation.orders();
        let mut workload = Followed { orders, acknowledged: vec![] };
        follower.forget();
        // Together with its warm-up, the window takes a minute.
        let (measured, _) = generator.run(&machine, Pace::PerSecond(rate), WINDOW, &mut workload).await;
        let lags = follower.lags(&workload.acknowledged).await;
        let lag = |quantile: f64| 1000.0 * lags[((lags.len() - 1) as f64 * quantile) as usize];
        let memory = installation.memory();
        println!(
            "{minute:>6} {:>10.0} {:>7.2} {:>7.2} {:>11.1} {:>11.1} {:>11.1} {:>13.1} {:>10.1} {:>5.1}",
            measured.rate(),
            measured.quantile(0.5),
            measured.quantile(0.99),
            lag(0.5),
            lag(0.99),
            lag(1.0),
            memory["command"],
            memory["projection"],
            memory["query"]
        );
        windows.push(Window { latency: measured.quantile(0.5), lag: lag(0.5), memory: memory.values().sum() });
    }
    let third = windows.len().div_ceil(3);
    let mut is_flat = true;
    let columns = [
        ("latency p50", windows.iter().map(|it| it.latency).collect::<Vec<_>>()),
        ("lag p50", windows.iter().map(|it| it.lag).collect()),
        ("memory", windows.iter().map(|it| it.memory).collect()),
    ];
    for (name, windows) in columns {
        let median = |values: &[f64]| {
            let mut values = values.to_vec();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let growth = median(&windows[windows.len() - third..]) / median(&windows[..third]);
        println!("{name}: the last third is {growth:.2} times the first");
        is_flat &= growth <= MAX_GROWTH;
    }
    is_flat
}
