//! How the figures change when an installation holds a hundred times as much.

use std::sync::Arc;

use super::{
    installation::Installation,
    report::{Row, Sample, Target},
    rows::{PRODUCTS, ROUNDS, create, get, list, rebuild, search, visible},
    sustained::{Sustained, sustained},
};
use crate::{Stack, journal};

/// Orders in the small and in the large installation.
const SMALL: usize = 10_000;
const LARGE: usize = 1_000_000;
/// Orders in a list. Nearly every user of the small installation has as many.
const PAGE: usize = 5;

/// Compares the large installation to the small one, alternately, on the same servers. Calls `done` with each row at
/// once.
pub async fn growth(stack: &Arc<Stack>, mut done: impl FnMut(Row)) {
    let mut small = Installation::start(stack, PRODUCTS).await;
    let mut large = Installation::start(stack, PRODUCTS).await;
    small.fill(SMALL).await;
    small.caught_up().await;
    large.stop_projection().await;
    large.fill(LARGE).await;
    large.start_projection();
    large.caught_up().await;
    // The rows that add few orders come first, so that the small installation stays small.
    done(grown("order_get_64", "gets/s", &mut large, &mut small, async |it| Sample::rate(get(it).await, 1)).await);
    done(
        grown("order_list_64", "lists/s", &mut large, &mut small, async |it| Sample::rate(list(it, PAGE).await, 1))
            .await,
    );
    done(grown("search_64", "searches/s", &mut large, &mut small, async |it| Sample::rate(search(it).await, 1)).await);
    done(
        grown("order_create_1", "ms", &mut large, &mut small, async |it| Sample::latency(create(it, 1).await, 0.5))
            .await,
    );
    done(grown("visible", "ms", &mut large, &mut small, async |it| Sample::latency(visible(it).await, 0.5)).await);
    let (of_large, of_small) = (large.memory(), small.memory());
    for role in ["command", "projection", "query"] {
        let name = format!("growth_memory_{role}");
        done(Row::plain(&name, "MB", Target::AtMost(1.2), of_large[role], of_small[role]));
    }
    large.stop_projection().await;
    small.stop_projection().await;
    done(
        grown("order_create_256", "orders/s", &mut large, &mut small, async |it| {
            Sample::rate(create(it, 256).await, 1)
        })
        .await,
    );
    journal::vacuumed(&large.system).await;
    journal::vacuumed(&small.system).await;
    let large_sample = rebuild(&mut large).await;
    let small_sample = rebuild(&mut small).await;
    done(Row::of("growth_rebuild", "events/s", GROWN, vec![(large_sample, small_sample)]));
    done(
        grown("sustained", "orders/s", &mut large, &mut small, async |it| {
            let Sustained { measured, lag } = sustained(it).await;
            Sample::rate(measured, 1).noting(lag)
        })
        .await,
    );
}

const GROWN: Target = Target::AtLeast(0.8);

async fn grown(
    name: &str,
    unit: &'static str,
    large: &mut Installation,
    small: &mut Installation,
    measure: impl AsyncFn(&mut Installation) -> Sample,
) -> Row {
    let mut rounds = Vec::new();
    let long = name == "sustained";
    for _ in 0..if long { 1 } else { ROUNDS } {
        for it in [&mut *large, &mut *small] {
            if it.projection.is_some() {
                it.caught_up().await;
            }
            // Vacuuming takes longer in the large installation, and would run during the measurement of either.
            journal::vacuumed(&it.system).await;
        }
        rounds.push((measure(large).await, measure(small).await));
    }
    let target = if unit == "ms" { Target::AtMost(1.25) } else { GROWN };
    Row::of(&format!("growth_{name}"), unit, target, rounds)
}
