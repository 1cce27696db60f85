//! Why a file is not taken: each reason says what was expected and what was found.

use std::{collections::BTreeMap, fmt, io};

use crate::NoSale;

/// Characters of what was found that are shown.
const SHOWN: usize = 200;

#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("expected a file, found a directory")]
    Directory,
    #[error("expected invoices as CSV, found nothing: the file is empty")]
    Empty,
    #[error("the gzip is cut off: its end is missing, so the file is not whole")]
    CutOff,
    #[error("the gzip is broken: {0}")]
    BrokenGzip(io::Error),
    #[error("expected CSV, found a ZIP archive or an Excel workbook: unpack it, or save its sheet as CSV")]
    Workbook,
    #[error("expected CSV in UTF-8 or Latin-1, found UTF-16: save it as UTF-8")]
    Utf16,
    #[error("expected CSV, plain or gzipped, found bytes that are no text")]
    NoText,
    #[error("expected the column {missing}, found the columns {}", Shown(.found))]
    NoColumn { missing: &'static str, found: String },
    #[error("expected one column for {column}, found several: {}", Shown(.found))]
    TwoColumns { column: &'static str, found: String },
    #[error("expected invoices, found a header and no line below it")]
    HeaderOnly,
    #[error(
        "line {line}: expected a date such as 2010-12-01 08:26:00, 12/1/2010 8:26 or 12-01-10 8:26, found {}",
        Shown(.found)
    )]
    DateLayout { line: u64, found: String },
    #[error(
        "expected the day and the month in one order, found {} in line {}, which has the day first, and {} in line {}, \
         which has the month first",
        Shown(&.day_first.text), .day_first.line, Shown(&.month_first.text), .month_first.line
    )]
    BothOrders { day_first: Example, month_first: Example },
    #[error("expected dates with the {expected} first, found {} in line {}", Shown(&.found.text), .found.line)]
    OtherOrder { expected: &'static str, found: Example },
    #[error(
        "whether the month or the day comes first cannot be told from {} in line {}, nor from any other date of the \
         file: say DATES=month-first or DATES=day-first",
        Shown(&.0.text), .0.line
    )]
    EitherOrder(Example),
    #[error("expected sales, found none; lines that are no sales: {}", Reasons(.0))]
    NoSales(BTreeMap<NoSale, usize>),
}

/// A date as it stands in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub line: u64,
    pub text: String,
}

/// In quotes, escaped and not too long: it may be anything.
struct Shown<'a>(&'a str);

struct Reasons<'a>(&'a BTreeMap<NoSale, usize>);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut characters = self.0.chars();
        let shown: String = characters.by_ref().take(SHOWN).collect();
        write!(f, "{shown:?}{}", if characters.next().is_some() { " …" } else { "" })
    }
}

impl fmt::Display for Reasons<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (reason, lines)) in self.0.iter().enumerate() {
            write!(f, "{}{lines} ({reason})", if index == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}
