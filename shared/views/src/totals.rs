//! Totals over orders. An order is added when it is placed and subtracted when it is cancelled. The invariant:
//! cancelling subtracts exactly what placing added, so no total falls below zero, and none overflows ([`WholeNumber`]).

use domain::{
    Currency, Event, Id, Money, Recorded, Timestamp,
    order::{self, Line},
};
use serde::{Deserialize, Serialize};

use crate::{Inapplicable, WholeNumber};

/// A sum of money in one currency. Unlike a price or the total of an order, it may exceed [`domain::MAX_AMOUNT`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sum {
    /// The sum in minor units of the currency.
    pub amount: WholeNumber,
    pub currency: Currency,
}

/// Whether an order is added to the totals or subtracted from them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Operation {
    Add,
    Subtract,
}

/// An order that an event adds to the totals or subtracts from them.
pub(crate) struct OrderDelta<'a> {
    pub operation: Operation,
    pub user: Id,
    pub placed_at: Timestamp,
    pub lines: &'a [Line],
    pub total: Money,
}

impl<'a> OrderDelta<'a> {
    /// The change that the event makes to the totals; `None` if it makes none.
    pub(crate) fn of(event: &'a Recorded) -> Option<Self> {
        let Event::Order(event) = &event.event else { return None };
        match event {
            order::Event::Placed(order::Placed { user, placed_at, lines, total }) => {
                Some(Self { operation: Operation::Add, user: *user, placed_at: *placed_at, lines, total: *total })
            }
            order::Event::Cancelled(order::Cancelled { user, placed_at, lines, total, refund_due: _, reason: _ }) => {
                Some(Self { operation: Operation::Subtract, user: *user, placed_at: *placed_at, lines, total: *total })
            }
            order::Event::Paid(_) | order::Event::Shipped(_) | order::Event::Deleted(_) => None,
        }
    }
}

impl Operation {
    /// The sum after the part is added or subtracted.
    ///
    /// # Errors
    /// If the result is below zero or overflows, which events of the domain never cause.
    pub(crate) fn apply(self, sum: WholeNumber, part: WholeNumber) -> Result<WholeNumber, Inapplicable> {
        let result = match self {
            Self::Add => sum.checked_add(part),
            Self::Subtract => sum.checked_sub(part),
        };
        result.ok_or_else(|| Inapplicable(format!("{self:?} {part} is impossible with the sum {sum}")))
    }

    /// Adds the part to the sum in its currency, or subtracts it. The sums are sorted by currency, and none is zero.
    ///
    /// # Errors
    /// Returns those of [`Self::apply`]. The sums are not changed then.
    pub(crate) fn apply_to_sums(self, sums: &mut Vec<Sum>, part: &Sum) -> Result<(), Inapplicable> {
        let currency = part.currency;
        let found = sums.binary_search_by_key(&currency, |sum| sum.currency);
        let before = found.ok().and_then(|index| sums.get(index)).map_or(WholeNumber::ZERO, |sum| sum.amount);
        let sum = Sum { amount: self.apply(before, part.amount)?, currency };
        match (found, sum.amount) {
            (Ok(index), WholeNumber::ZERO) => drop(sums.remove(index)),
            (Ok(index), _) => sums[index] = sum,
            (Err(_), WholeNumber::ZERO) => {}
            (Err(index), _) => sums.insert(index, sum),
        }
        Ok(())
    }
}

impl TryFrom<Money> for Sum {
    type Error = Inapplicable;

    fn try_from(Money { amount, currency }: Money) -> Result<Self, Inapplicable> {
        Ok(Self { amount: whole_number(amount)?, currency })
    }
}

/// Converts a count or an amount from an event.
///
/// # Errors
/// If it is below zero, which the domain never accepts.
pub(crate) fn whole_number(number: i64) -> Result<WholeNumber, Inapplicable> {
    WholeNumber::try_from(number).map_err(|_| Inapplicable(format!("{number} is below zero")))
}

/// The number of pieces in all lines.
///
/// # Errors
/// If it is below zero or above `i64::MAX`. An order of the domain has at most two billion pieces.
pub(crate) fn units<'a>(lines: impl IntoIterator<Item = &'a Line>) -> Result<i64, Inapplicable> {
    let add = |sum: i64, line: &Line| sum.checked_add(line.quantity).filter(|sum| *sum >= 0);
    let sum = lines.into_iter().try_fold(0, add);
    sum.ok_or_else(|| Inapplicable("the pieces of the lines cannot be counted".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(number: i64) -> WholeNumber {
        whole_number(number).unwrap()
    }

    fn sum(amount: i64, currency: &str) -> Sum {
        Sum { amount: number(amount), currency: currency.parse().unwrap() }
    }

    #[test]
    fn sums_are_sorted_by_currency_and_never_zero() {
        let mut sums = vec![];
        for part in [sum(5, "GBP"), sum(0, "USD"), sum(7, "EUR"), sum(1, "GBP")] {
            Operation::Add.apply_to_sums(&mut sums, &part).unwrap();
        }
        assert_eq!(sums, [sum(7, "EUR"), sum(6, "GBP")]);
        Operation::Subtract.apply_to_sums(&mut sums, &sum(7, "EUR")).unwrap();
        assert_eq!(sums, [sum(6, "GBP")]);
    }

    #[test]
    fn a_sum_that_overflows_or_falls_below_zero_is_refused() {
        assert!(Operation::Add.apply(WholeNumber::MAX, number(1)).is_err());
        assert!(Operation::Subtract.apply(number(1), number(2)).is_err());
        assert!(whole_number(-1).is_err());
        let rich = Sum { amount: WholeNumber::MAX, ..sum(0, "GBP") };
        let mut sums = vec![rich.clone()];
        assert!(Operation::Add.apply_to_sums(&mut sums, &sum(1, "GBP")).is_err());
        assert!(Operation::Subtract.apply_to_sums(&mut sums, &sum(1, "EUR")).is_err());
        assert_eq!(sums, [rich]);
    }

    #[test]
    fn a_sum_can_exceed_64_bits_and_return() {
        let mut sums = vec![sum(i64::MAX, "GBP")];
        for operation in [Operation::Add, Operation::Subtract] {
            (0..3).for_each(|_| operation.apply_to_sums(&mut sums, &sum(i64::MAX, "GBP")).unwrap());
        }
        assert_eq!(sums, [sum(i64::MAX, "GBP")]);
    }
}
