//! Counting orders: an order counts when it is placed and no more when it is cancelled. The invariant: every sum is
//! checked and never below zero, and cancelling takes back exactly what placing added.

use domain::{
    Currency, Event, Id, Money, Recorded, Timestamp,
    order::{self, Line},
};
use serde::{Deserialize, Serialize};

use crate::Inapplicable;

/// A sum of money. Unlike a price or a total it may exceed [`domain::MAX_AMOUNT`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    /// Minor units.
    pub amount: i64,
    pub currency: Currency,
}

/// Whether an order counts from now on, or no more.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tally {
    Count,
    TakeBack,
}

/// An order that an event lets count, or no more.
pub(crate) struct Counted<'a> {
    pub tally: Tally,
    pub user: Id,
    pub placed_at: Timestamp,
    pub lines: &'a [Line],
    pub total: Money,
}

impl<'a> Counted<'a> {
    /// `None` if the event changes no count.
    pub(crate) fn of(event: &'a Recorded) -> Option<Self> {
        match &event.event {
            Event::Order(order::Event::Placed(order::Placed { user, placed_at, lines, total })) => {
                Some(Self { tally: Tally::Count, user: *user, placed_at: *placed_at, lines, total: *total })
            }
            Event::Order(order::Event::Cancelled(order::Cancelled {
                user,
                placed_at,
                lines,
                total,
                refund_due: _,
            })) => Some(Self { tally: Tally::TakeBack, user: *user, placed_at: *placed_at, lines, total: *total }),
            Event::Order(order::Event::Paid(_) | order::Event::Shipped(_) | order::Event::Deleted(_))
            | Event::User(_)
            | Event::Product(_) => None,
        }
    }
}

impl Tally {
    /// The sum with the part added, or taken back.
    ///
    /// # Errors
    /// If it leaves the range from 0 to `i64::MAX`.
    pub(crate) fn apply(self, sum: i64, part: i64) -> Result<i64, Inapplicable> {
        let result = match self {
            Self::Count => sum.checked_add(part),
            Self::TakeBack => sum.checked_sub(part),
        };
        result
            .filter(|sum| *sum >= 0)
            .ok_or_else(|| Inapplicable(format!("{self:?} {part} does not go with the sum {sum}")))
    }

    /// The same for the sums of several currencies. They are in the order of the currencies, and none is zero.
    pub(crate) fn apply_money(self, sums: &mut Vec<Sum>, amount: i64, currency: Currency) -> Result<(), Inapplicable> {
        let found = sums.binary_search_by_key(&currency, |sum| sum.currency);
        let before = found.ok().and_then(|at| sums.get(at)).map_or(0, |sum| sum.amount);
        let sum = Sum { amount: self.apply(before, amount)?, currency };
        match (found, sum.amount) {
            (Ok(at), 0) => drop(sums.remove(at)),
            (Ok(at), _) => sums[at] = sum,
            (Err(_), 0) => {}
            (Err(at), _) => sums.insert(at, sum),
        }
        Ok(())
    }
}

/// The pieces in the lines.
///
/// # Errors
/// If they exceed `i64::MAX`.
pub(crate) fn units<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Result<i64, Inapplicable> {
    lines.into_iter().try_fold(0, |sum, line| Tally::Count.apply(sum, line.quantity))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(amount: i64, currency: &str) -> Sum {
        Sum { amount, currency: currency.parse().unwrap() }
    }

    #[test]
    fn sums_are_kept_by_currency_in_order_and_without_zeros() {
        let mut sums = vec![];
        for (amount, currency) in [(5, "GBP"), (0, "USD"), (7, "EUR"), (1, "GBP")] {
            Tally::Count.apply_money(&mut sums, amount, currency.parse().unwrap()).unwrap();
        }
        assert_eq!(sums, [sum(7, "EUR"), sum(6, "GBP")]);
        Tally::TakeBack.apply_money(&mut sums, 7, "EUR".parse().unwrap()).unwrap();
        assert_eq!(sums, [sum(6, "GBP")]);
    }

    #[test]
    fn a_sum_that_overflows_or_falls_below_zero_is_refused() {
        assert!(Tally::Count.apply(i64::MAX, 1).is_err());
        assert!(Tally::Count.apply(0, -1).is_err());
        assert!(Tally::TakeBack.apply(1, 2).is_err());
        assert!(Tally::TakeBack.apply(1, i64::MIN).is_err());
        let mut sums = vec![sum(i64::MAX, "GBP")];
        assert!(Tally::Count.apply_money(&mut sums, 1, "GBP".parse().unwrap()).is_err());
        assert!(Tally::TakeBack.apply_money(&mut sums, 1, "EUR".parse().unwrap()).is_err());
        assert_eq!(sums, [sum(i64::MAX, "GBP")]);
    }
}
