//! The dates of the invoices in the layouts that copies of the data set have. Where the year stands last, the whole file
//! says whether the month or the day stands first; nothing is guessed of a single line.

use std::ops::RangeInclusive;

use crate::unusable::{Example, Unusable};

/// Which of the two stands first where the year stands last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DateOrder {
    MonthFirst,
    DayFirst,
}

/// A date and a time as they are written, of which only the order of the numbers may be open.
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

/// The invoices of the data set, in the order of time.
const NUMBERS: RangeInclusive<u32> = 489_434..=581_587;
/// The first of 1 December 2010: earlier numbers are of earlier days, with which the data set has two years.
const FIRST_OF_DECEMBER_2010: u32 = 536_365;
const DECEMBER_2010: (u16, u8, u8) = (2010, 12, 1);
const DAYS: RangeInclusive<(u16, u8, u8)> = (2009, 12, 1)..=(2011, 12, 9);
/// The years that are known where two digits are written: with others, the first number may be the year.
const SHORT_YEARS: RangeInclusive<u16> = 9..=11;

/// What the dates of a file say about their order.
#[derive(Default)]
pub struct Evidence {
    /// Those that can be read in one order only.
    day_first: Option<Example>,
    month_first: Option<Example>,
    /// Those that can be read in both.
    either: Option<Example>,
    /// Of those that can be read in both, the ones whose invoice's number tells.
    numbered_day_first: bool,
    numbered_month_first: bool,
    /// Numbers stand without a leading zero, or years with two digits: so do the copies that have the month first.
    is_as_published: bool,
}

impl Written {
    /// `None` if it is in none of the layouts. What is, may still be no day of any calendar.
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

    /// In RFC 3339, where it is the moment that it is taken for.
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
    /// Takes note of a date, as it stands in a line with the invoice of this number.
    pub fn note(&mut self, line: u64, text: &str, written: &Written, invoice: &str) {
        let Date::YearLast { first, second, .. } = written.date else { return };
        let example = || Example { line, text: text.to_owned() };
        // So nobody writes who puts the month first.
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
    /// If it has both, not the one that was said, or cannot be told.
    pub fn order(&self, said: Option<DateOrder>) -> Result<DateOrder, Unusable> {
        let shown = match (&self.day_first, &self.month_first) {
            (Some(day_first), Some(month_first)) => {
                let (day_first, month_first) = (day_first.clone(), month_first.clone());
                return Err(Unusable::BothOrders { day_first, month_first });
            }
            (Some(example), None) => Some((DateOrder::DayFirst, example)),
            (None, Some(example)) => Some((DateOrder::MonthFirst, example)),
            (None, None) => None,
        };
        match (said, shown) {
            (Some(said), Some((order, found))) if said != order => {
                let expected = match said {
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

/// `8:26`, `08:26:00` and `08:26:00.000`, as `08:26:00`.
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

/// Of that many digits at most, and nothing else.
fn number<N: std::str::FromStr>(text: &str, digits: usize) -> Option<N> {
    let is_number = (1..=digits).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the dates of a file are read as, each of an invoice.
    fn read(dates: &[(&str, &str)], said: Option<DateOrder>) -> Result<Vec<String>, Unusable> {
        let mut evidence = Evidence::default();
        let written: Vec<Written> = (2..)
            .zip(dates)
            .map(|(line, (invoice, text))| {
                let written = Written::parse(text).unwrap();
                evidence.note(line, text, &written, invoice);
                written
            })
            .collect();
        let order = evidence.order(said)?;
        Ok(written.iter().map(|written| written.moment(order).unwrap()).collect())
    }

    #[test]
    fn the_copies_of_the_data_set_are_read_as_what_they_mean() {
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
    fn one_number_above_12_tells_for_the_whole_file() {
        let month_first = [("1", "01/02/2010 08:26"), ("2", "01/13/2010 08:26"), ("3", "02-01-10 8:26")];
        let days = ["2010-01-02T08:26:00Z", "2010-01-13T08:26:00Z", "2010-02-01T08:26:00Z"];
        assert_eq!(read(&month_first, None).unwrap(), days);
        let day_first = [("1", "2/1/2010 8:26"), ("2", "13/1/2010 8:26"), ("3", "01-02-10 8:26")];
        assert_eq!(read(&day_first, None).unwrap(), days);
    }

    #[test]
    fn what_has_the_published_form_has_the_month_first_whoever_the_shop_is() {
        assert_eq!(read(&[("1", "12/1/2010 8:26")], None).unwrap(), ["2010-12-01T08:26:00Z"]);
        assert_eq!(read(&[("1", "12-01-10 8:26")], None).unwrap(), ["2010-12-01T08:26:00Z"]);
    }

    #[test]
    fn what_cannot_be_told_is_refused_unless_it_is_said() {
        let dates = [("A1", "12/01/2010 08:26"), ("A2", "12/02/2010 08:26")];
        let refused = read(&dates, None).unwrap_err().to_string();
        assert!(refused.contains("\"12/01/2010 08:26\" in line 2") && refused.contains("DATES=day-first"), "{refused}");
        let days = read(&dates, Some(DateOrder::DayFirst)).unwrap();
        assert_eq!(days, ["2010-01-12T08:26:00Z", "2010-02-12T08:26:00Z"]);
        let days = read(&dates, Some(DateOrder::MonthFirst)).unwrap();
        assert_eq!(days, ["2010-12-01T08:26:00Z", "2010-12-02T08:26:00Z"]);
        // Of April 2011, whose numbers fit both 4 March and 3 April.
        assert!(matches!(read(&[("548000", "04/03/2011 08:26")], None), Err(Unusable::EitherOrder(_))));
    }

    #[test]
    fn orders_that_contradict_each_other_or_what_was_said_are_refused() {
        let both = [("1", "13/01/2010 08:26"), ("2", "01/14/2010 08:26")];
        let refused = read(&both, None).unwrap_err().to_string();
        assert!(refused.contains("13/01/2010") && refused.contains("line 3"), "{refused}");
        let refused = read(&both[..1], Some(DateOrder::MonthFirst)).unwrap_err().to_string();
        assert_eq!(refused, "expected dates with the month first, found \"13/01/2010 08:26\" in line 2");
    }

    #[test]
    fn other_layouts_are_none() {
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
