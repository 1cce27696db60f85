//! What becomes of the figures when there is a hundred times as much.

use std::sync::Arc;

use super::{
    installation::Installation,
    report::{Reach, Row, Turn},
    rows::{PRODUCTS, TURNS, create, get, list, rebuild, search, visible},
    sustained::{Sustained, sustained},
};
use crate::{Stack, journal};

/// Orders of the small and of the large installation.
const SMALL: usize = 10_000;
const LARGE: usize = 1_000_000;
/// Orders of a list: about every user of the small installation has as many.
const PAGE: usize = 5;

/// What becomes of the figures when there is a hundred times as much: the large installation to the small one, on the
/// same servers, in turns. Each row is handed to `done` as it comes.
pub async fn growth(stack: &Arc<Stack>, mut done: impl FnMut(Row)) {
    let mut small = Installation::start(stack, PRODUCTS).await;
    let mut large = Installation::start(stack, PRODUCTS).await;
    small.fill(SMALL).await;
    small.caught_up().await;
    large.stop_projection().await;
    large.fill(LARGE).await;
    large.start_projection();
    large.caught_up().await;
    // Those first that leave the small one small.
    done(grown("order_get_64", "gets/s", &mut large, &mut small, async |it| Turn::rate(get(it).await, 1)).await);
    done(
        grown("order_list_64", "lists/s", &mut large, &mut small, async |it| Turn::rate(list(it, PAGE).await, 1)).await,
    );
    done(grown("search_64", "searches/s", &mut large, &mut small, async |it| Turn::rate(search(it).await, 1)).await);
    done(
        grown("order_create_1", "ms", &mut large, &mut small, async |it| Turn::latency(create(it, 1).await, 0.5)).await,
    );
    done(grown("visible", "ms", &mut large, &mut small, async |it| Turn::latency(visible(it).await, 0.5)).await);
    let (of_large, of_small) = (large.memory(), small.memory());
    for role in ["command", "projection", "query"] {
        let name = format!("growth_memory_{role}");
        done(Row::plain(&name, "MB", Reach::AtMost(1.2), of_large[role], of_small[role]));
    }
    large.stop_projection().await;
    small.stop_projection().await;
    done(
        grown("order_create_256", "orders/s", &mut large, &mut small, async |it| Turn::rate(create(it, 256).await, 1))
            .await,
    );
    journal::cleaned_up(&large.system).await;
    journal::cleaned_up(&small.system).await;
    let large_turn = rebuild(&mut large).await;
    let small_turn = rebuild(&mut small).await;
    done(Row::of("growth_rebuild", "events/s", GROWN, vec![(large_turn, small_turn)]));
    done(
        grown("sustained", "orders/s", &mut large, &mut small, async |it| {
            let Sustained { measured, behind } = sustained(it).await;
            Turn::rate(measured, 1).noting(behind)
        })
        .await,
    );
}

const GROWN: Reach = Reach::AtLeast(0.8);

async fn grown(
    name: &str,
    unit: &'static str,
    large: &mut Installation,
    small: &mut Installation,
    measure: impl AsyncFn(&mut Installation) -> Turn,
) -> Row {
    let mut turns = Vec::new();
    let long = name == "sustained";
    for _ in 0..if long { 1 } else { TURNS } {
        for it in [&mut *large, &mut *small] {
            if it.projection.is_some() {
                it.caught_up().await;
            }
            // What is to be cleaned up is larger where there is more, and would be measured with the one or the other.
            journal::cleaned_up(&it.system).await;
        }
        turns.push((measure(large).await, measure(small).await));
    }
    let reach = if unit == "ms" { Reach::AtMost(1.25) } else { GROWN };
    Row::of(&format!("growth_{name}"), unit, reach, turns)
}
