//! Reads the dates of the invoices in the layouts that occur in copies of the data set. If dates end with the year, the
//! whole file shows whether the month or the day comes first. Nothing is guessed from a single line.

use std::ops::RangeInclusive;

use crate::unusable::{Example, Unusable};

/// Whether the month or the day comes first in dates that end with the year.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DateOrder {
    MonthFirst,
    DayFirst,
}

/// A date and a time as they are written. Only the order of month and day may be undecided.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    date: Date,
    /// `08:26:00`
    time: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Date {
    YearFirst { year: u16, month: u8, day: u8 },
    YearLast { first: u8, second: u8, year: u16 },
}

/// The invoice numbers of the data set, which are in chronological order.
const NUMBERS: RangeInclusive<u32> = 489_434..=581_587;
/// The first number of 1 December 2010. Earlier numbers belong to earlier days.
const FIRST_OF_DECEMBER_2010: u32 = 536_365;
const DECEMBER_2010: (u16, u8, u8) = (2010, 12, 1);
/// The days of the data set.
const DAYS: RangeInclusive<(u16, u8, u8)> = (2009, 12, 1)..=(2011, 12, 9);
/// The years that may be written with two digits. With any other, the first number may be the year.
const SHORT_YEARS: RangeInclusive<u16> = 9..=11;

/// What the dates of a file show about their order.
#[derive(Default)]
pub struct Evidence {
    /// A date that can only be read with the day first.
    day_first: Option<Example>,
    /// A date that can only be read with the month first.
    month_first: Option<Example>,
    /// A date that can be read in either order.
    either: Option<Example>,
    /// Whether the invoice number of such a date shows that the day comes first.
    numbered_day_first: bool,
    /// Whether one shows that the month comes first.
    numbered_month_first: bool,
    /// Whether numbers have no leading zero, or years two digits, as in the published copies, which have the month
    /// first.
    is_as_published: bool,
}

impl Written {
    /// `None` if the text is in none of the layouts. The date may still not exist, such as 30 February.
    pub fn parse(text: &str) -> Option<Self> {
        let (date, time) = match text.split_once([' ', 'T']) {
            Some((date, time)) => (date, written_time(time)?),
            None => (text, "00:00:00".to_owned()),
        };
        let separator = date.chars().find(|c| !c.is_ascii_digit()).filter(|c| "-/.".contains(*c))?;
        let numbers: Vec<&str> = date.split(separator).collect();
        let [first, second, third] = *numbers else { return None };
        let date = if first.len() == 4 {
            Date::YearFirst { year: number(first, 4)?, month: short(second)?, day: short(third)? }
        } else {
            let year = match third.len() {
                4 => number(third, 4)?,
                2 => number(third, 2).filter(|year| SHORT_YEARS.contains(year))? + 2000,
                _ => return None,
            };
            Date::YearLast { first: short(first)?, second: short(second)?, year }
        };
        Some(Self { date, time })
    }

    /// The moment in RFC 3339; `None` if the date does not exist.
    pub fn moment(&self, order: DateOrder) -> Option<String> {
        let (year, month, day) = self.date.read(order);
        let moment = format!("{year:04}-{month:02}-{day:02}T{}Z", self.time);
        moment.parse::<domain::Timestamp>().ok().map(|_| moment)
    }
}

impl Date {
    fn read(self, order: DateOrder) -> (u16, u8, u8) {
        match (self, order) {
            (Self::YearFirst { year, month, day }, _) => (year, month, day),
            (Self::YearLast { first, second, year }, DateOrder::MonthFirst) => (year, first, second),
            (Self::YearLast { first, second, year }, DateOrder::DayFirst) => (year, second, first),
        }
    }
}

impl Evidence {
    /// Takes note of a date in a line, with the number of its invoice.
    pub fn note(&mut self, line: u64, text: &str, written: &Written, invoice: &str) {
        let Date::YearLast { first, second, .. } = written.date else { return };
        let example = || Example { line, text: text.to_owned() };
        // Nobody who puts the month first writes dates with dots.
        let has_dots = text.contains('.');
        match (first > 12, second > 12) {
            (true, true) => return,
            (true, false) => _ = self.day_first.get_or_insert_with(example),
            (false, true) => _ = self.month_first.get_or_insert_with(example),
            (false, false) if has_dots => _ = self.day_first.get_or_insert_with(example),
            (false, false) => {
                self.either.get_or_insert_with(example);
                let number = invoice.trim_start_matches(['C', 'c']).parse().ok().filter(|it| NUMBERS.contains(it));
                if let Some(number) = number {
                    self.numbered(number, written.date);
                }
            }
        }
        let numbers = text.split([' ', 'T']).next().unwrap_or(text).split(['-', '/', '.']);
        let lengths: Vec<usize> = numbers.map(str::len).collect();
        self.is_as_published |= lengths[..2].contains(&1) || lengths[2] == 2;
    }

    fn numbered(&mut self, number: u32, date: Date) {
        let fits = |order| {
            let day = date.read(order);
            DAYS.contains(&day) && (number >= FIRST_OF_DECEMBER_2010) == (day >= DECEMBER_2010)
        };
        match (fits(DateOrder::MonthFirst), fits(DateOrder::DayFirst)) {
            (true, false) => self.numbered_month_first = true,
            (false, true) => self.numbered_day_first = true,
            (true, true) | (false, false) => {}
        }
    }

    /// The order of the whole file.
    ///
    /// # Errors
    /// If the file has both orders, not the one that was given, or shows none.
    pub fn order(&self, given: Option<DateOrder>) -> Result<DateOrder, Unusable> {
        let shown = match (&self.day_first, &self.month_first) {
            (Some(day_first), Some(month_first)) => {
                let (day_first, month_first) = (day_first.clone(), month_first.clone());
                return Err(Unusable::BothOrders { day_first, month_first });
            }
            (Some(example), None) => Some((DateOrder::DayFirst, example)),
            (None, Some(example)) => Some((DateOrder::MonthFirst, example)),
            (None, None) => None,
        };
        match (given, shown) {
            (Some(given), Some((order, found))) if given != order => {
                let expected = match given {
                    DateOrder::MonthFirst => "month",
                    DateOrder::DayFirst => "day",
                };
                Err(Unusable::OtherOrder { expected, found: found.clone() })
            }
            (_, Some((order, _))) | (Some(order), None) => Ok(order),
            (None, None) => self.order_of_either(),
        }
    }

    fn order_of_either(&self) -> Result<DateOrder, Unusable> {
        let Some(example) = &self.either else { return Ok(DateOrder::MonthFirst) };
        match (self.numbered_month_first, self.numbered_day_first) {
            (true, false) => Ok(DateOrder::MonthFirst),
            (false, true) => Ok(DateOrder::DayFirst),
            (true, true) | (false, false) if self.is_as_published => Ok(DateOrder::MonthFirst),
            (true, true) | (false, false) => Err(Unusable::EitherOrder(example.clone())),
        }
    }
}

/// Reads `8:26`, `08:26:00` and `08:26:00.000` as `08:26:00`.
fn written_time(text: &str) -> Option<String> {
    let text = text.trim_start().trim_end_matches('Z');
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let numbers: Vec<&str> = whole.split(':').collect();
    let (hours, minutes, seconds) = match *numbers {
        [hours, minutes] => (hours, minutes, "00"),
        [hours, minutes, seconds] => (hours, minutes, seconds),
        _ => return None,
    };
    number::<u32>(fraction, 9)?;
    Some(format!("{:02}:{:02}:{:02}", short(hours)?, short(minutes)?, short(seconds)?))
}

fn short(text: &str) -> Option<u8> {
    number(text, 2)
}

/// Reads a number of at most this many digits.
fn number<N: std::str::FromStr>(text: &str, digits: usize) -> Option<N> {
    let is_number = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the dates of a file, each with the number of its invoice.
    fn read(dates: &[(&str, &str)], given: Option<DateOrder>) -> Result<Vec<String>, Unusable> {
        let mut evidence = Evidence::default();
        let written: Vec<Written> = (2..)
            .zip(dates)
            .map(|(line, (invoice, text))| {
                let written = Written::parse(text).unwrap();
                evidence.note(line, text, &written, invoice);
                written
            })
            .collect();
        let order = evidence.order(given)?;
        Ok(written.iter().map(|written| written.moment(order).unwrap()).collect())
    }

    #[test]
    fn the_layouts_of_all_copies_are_understood() {
        for first in [
            "2010-12-01 08:26:00",
            "2010-12-01T08:26:00",
            "2010-12-01 08:26:00.000",
            "2010-12-01 8:26",
            "2010/12/01 08:26",
            "12/1/2010 8:26",
            "12/1/10 8:26",
            "12/01/2010 8:26",
            "12/01/2010 08:26:00",
            "12-01-10 8:26",
            "12-01-2010 08:26",
            "01-12-2010 08:26",
            "01/12/2010 08:26",
            "1/12/2010 8:26",
            "01.12.2010 8:26",
            "01-12-10 08:26",
        ] {
            assert_eq!(read(&[("536365", first)], None).unwrap(), ["2010-12-01T08:26:00Z"], "{first}");
        }
        assert_eq!(read(&[("536365", "2010-12-01")], None).unwrap(), ["2010-12-01T00:00:00Z"]);
    }

    #[test]
    fn one_number_above_12_decides_for_the_whole_file() {
        let month_first = [("1", "01/02/2010 08:26"), ("2", "01/13/2010 08:26"), ("3", "02-01-10 8:26")];
        let days = ["2010-01-02T08:26:00Z", "2010-01-13T08:26:00Z", "2010-02-01T08:26:00Z"];
        assert_eq!(read(&month_first, None).unwrap(), days);
        let day_first = [("1", "2/1/2010 8:26"), ("2", "13/1/2010 8:26"), ("3", "01-02-10 8:26")];
        assert_eq!(read(&day_first, None).unwrap(), days);
    }

    #[test]
    fn the_published_form_has_the_month_first() {
        assert_eq!(read(&[("1", "12/1/2010 8:26")], None).unwrap(), ["2010-12-01T08:26:00Z"]);
        assert_eq!(read(&[("1", "12-01-10 8:26")], None).unwrap(), ["2010-12-01T08:26:00Z"]);
    }

    #[test]
    fn dates_of_undecided_order_are_refused_unless_it_is_given() {
        let dates = [("A1", "12/01/2010 08:26"), ("A2", "12/02/2010 08:26")];
        let refused = read(&dates, None).unwrap_err().to_string();
        assert!(refused.contains("\"12/01/2010 08:26\" in line 2") && refused.contains("DATES=day-first"), "{refused}");
        let days = read(&dates, Some(DateOrder::DayFirst)).unwrap();
        assert_eq!(days, ["2010-01-12T08:26:00Z", "2010-02-12T08:26:00Z"]);
        let days = read(&dates, Some(DateOrder::MonthFirst)).unwrap();
        assert_eq!(days, ["2010-12-01T08:26:00Z", "2010-12-02T08:26:00Z"]);
        // A number of April 2011 fits both 4 March and 3 April.
        assert!(matches!(read(&[("548000", "04/03/2011 08:26")], None), Err(Unusable::EitherOrder(_))));
    }

    #[test]
    fn orders_that_contradict_each_other_or_the_given_one_are_refused() {
        let both = [("1", "13/01/2010 08:26"), ("2", "01/14/2010 08:26")];
        let refused = read(&both, None).unwrap_err().to_string();
        assert!(refused.contains("13/01/2010") && refused.contains("line 3"), "{refused}");
        let refused = read(&both[..1], Some(DateOrder::MonthFirst)).unwrap_err().to_string();
        assert_eq!(refused, "expected dates with the month first, found \"13/01/2010 08:26\" in line 2");
    }

    #[test]
    fn other_layouts_are_refused() {
        for text in [
            "",
            "yesterday",
            "1 Dec 2010",
            "Dec 1, 2010 8:26",
            "20101201",
            "1291191960",
            "12/1/2010 8:26 AM",
            "12/1/2010 8h26",
            "10-12-01 8:26",
            "12/1/2010/3",
            "12-1/2010",
            "12/1/210 8:26",
            "+12/1/2010",
            "12/1/2010 :26",
            "2010-12-01 08:26:00+01:00",
            "１２/1/2010",
        ] {
            assert_eq!(Written::parse(text), None, "{text}");
        }
        for impossible in ["2010-02-30 08:26", "13/13/2010 8:26", "12/0/2010 8:26", "12/1/2010 24:26"] {
            let written = Written::parse(impossible).unwrap();
            assert_eq!(written.moment(DateOrder::MonthFirst), None, "{impossible}");
        }
    }
}
