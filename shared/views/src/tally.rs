//! Counts orders: an order counts from when it is placed until it is cancelled. The invariant: cancelling takes back
//! exactly what placing added, so that no sum falls below zero, and none overflows ([`Whole`]).

use domain::{
    Currency, Event, Id, Money, Recorded, Timestamp,
    order::{self, Line},
};
use serde::{Deserialize, Serialize};

use crate::{Inapplicable, Whole};

/// A sum of money. Unlike a price or a total it may exceed [`domain::MAX_AMOUNT`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    /// Minor units.
    pub amount: Whole,
    pub currency: Currency,
}

/// Whether an order counts from now on, or no longer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Tally {
    Count,
    TakeBack,
}

/// An order that counts from this event on, or no longer.
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
        let Event::Order(event) = &event.event else { return None };
        match event {
            order::Event::Placed(order::Placed { user, placed_at, lines, total }) => {
                Some(Self { tally: Tally::Count, user: *user, placed_at: *placed_at, lines, total: *total })
            }
            order::Event::Cancelled(order::Cancelled { user, placed_at, lines, total, refund_due: _ }) => {
                Some(Self { tally: Tally::TakeBack, user: *user, placed_at: *placed_at, lines, total: *total })
            }
            order::Event::Paid(_) | order::Event::Shipped(_) | order::Event::Deleted(_) => None,
        }
    }
}

impl Tally {
    /// The sum with the part added, or taken back.
    ///
    /// # Errors
    /// If the sum falls below zero or overflows. The domain's events lead to neither.
    pub(crate) fn apply(self, sum: Whole, part: Whole) -> Result<Whole, Inapplicable> {
        let result = match self {
            Self::Count => sum.plus(part),
            Self::TakeBack => sum.minus(part),
        };
        result.ok_or_else(|| Inapplicable(format!("{self:?} {part} does not go with the sum {sum}")))
    }

    /// Does the same with sums in several currencies. They are in the order of the currencies, and none is zero.
    pub(crate) fn apply_money(self, sums: &mut Vec<Sum>, part: &Sum) -> Result<(), Inapplicable> {
        let currency = part.currency;
        let found = sums.binary_search_by_key(&currency, |sum| sum.currency);
        let before = found.ok().and_then(|at| sums.get(at)).map_or(Whole::ZERO, |sum| sum.amount);
        let sum = Sum { amount: self.apply(before, part.amount)?, currency };
        match (found, sum.amount) {
            (Ok(at), Whole::ZERO) => drop(sums.remove(at)),
            (Ok(at), _) => sums[at] = sum,
            (Err(_), Whole::ZERO) => {}
            (Err(at), _) => sums.insert(at, sum),
        }
        Ok(())
    }
}

impl TryFrom<Money> for Sum {
    type Error = Inapplicable;

    fn try_from(Money { amount, currency }: Money) -> Result<Self, Inapplicable> {
        Ok(Self { amount: whole(amount)?, currency })
    }
}

/// A count or an amount in an event.
///
/// # Errors
/// If it is below zero, which no count and no amount of the domain is.
pub(crate) fn whole(number: i64) -> Result<Whole, Inapplicable> {
    Whole::try_from(number).map_err(|_| Inapplicable(format!("{number} is below zero")))
}

/// The pieces in the lines.
///
/// # Errors
/// If the sum is below zero or above `i64::MAX`. An order of the domain has two billion pieces at most.
pub(crate) fn units<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Result<i64, Inapplicable> {
    let add = |sum: i64, line: &Line| sum.checked_add(line.quantity).filter(|sum| *sum >= 0);
    let sum = lines.into_iter().try_fold(0, add);
    sum.ok_or_else(|| Inapplicable("the pieces of the lines cannot be counted".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(number: i64) -> Whole {
        whole(number).unwrap()
    }

    fn sum(amount: i64, currency: &str) -> Sum {
        Sum { amount: number(amount), currency: currency.parse().unwrap() }
    }

    #[test]
    fn sums_are_kept_by_currency_in_order_and_without_zeros() {
        let mut sums = vec![];
        for part in [sum(5, "GBP"), sum(0, "USD"), sum(7, "EUR"), sum(1, "GBP")] {
            Tally::Count.apply_money(&mut sums, &part).unwrap();
        }
        assert_eq!(sums, [sum(7, "EUR"), sum(6, "GBP")]);
        Tally::TakeBack.apply_money(&mut sums, &sum(7, "EUR")).unwrap();
        assert_eq!(sums, [sum(6, "GBP")]);
    }

    #[test]
    fn a_sum_that_overflows_or_falls_below_zero_is_refused() {
        assert!(Tally::Count.apply(Whole::MAX, number(1)).is_err());
        assert!(Tally::TakeBack.apply(number(1), number(2)).is_err());
        assert!(whole(-1).is_err());
        let rich = Sum { amount: Whole::MAX, ..sum(0, "GBP") };
        let mut sums = vec![rich.clone()];
        assert!(Tally::Count.apply_money(&mut sums, &sum(1, "GBP")).is_err());
        assert!(Tally::TakeBack.apply_money(&mut sums, &sum(1, "EUR")).is_err());
        assert_eq!(sums, [rich]);
    }

    #[test]
    fn a_sum_goes_on_beyond_64_bits_and_comes_back() {
        let mut sums = vec![sum(i64::MAX, "GBP")];
        for tally in [Tally::Count, Tally::TakeBack] {
            (0..3).for_each(|_| tally.apply_money(&mut sums, &sum(i64::MAX, "GBP")).unwrap());
        }
        assert_eq!(sums, [sum(i64::MAX, "GBP")]);
    }
}
