//! The reasons for refusing a file. Each says what was expected and what was found.

use std::{collections::BTreeMap, fmt, io};

use crate::NoSale;

/// How many characters of the file's content a message quotes at most.
const MAX_QUOTED: usize = 200;

#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("expected a file, found a directory")]
    Directory,
    #[error("expected invoices as CSV, found nothing: the file is empty")]
    Empty,
    #[error("the gzip file is truncated: its end is missing")]
    Truncated,
    #[error("the gzip file is corrupt: {0}")]
    CorruptGzip(io::Error),
    #[error("expected CSV, found a ZIP archive or an Excel workbook: unpack the archive, or save the sheet as CSV")]
    Workbook,
    #[error("expected CSV in UTF-8 or Latin-1, found UTF-16: save the file as UTF-8")]
    Utf16,
    #[error("expected CSV, plain or gzipped, found binary data")]
    Binary,
    #[error("expected the column {missing}, found the columns {}", Quoted(.found))]
    NoColumn { missing: &'static str, found: String },
    #[error("expected one column for {column}, found several: {}", Quoted(.found))]
    TwoColumns { column: &'static str, found: String },
    #[error("expected invoices, found a header and no lines below it")]
    HeaderOnly,
    #[error(
        "line {line}: expected a date such as 2010-12-01 08:26:00, 12/1/2010 8:26 or 12-01-10 8:26, found {}",
        Quoted(.found)
    )]
    DateLayout { line: u64, found: String },
    #[error(
        "expected the day and the month in the same order everywhere, found {} in line {}, which has the day first, and {} \
         in line {}, which has the month first",
        Quoted(&.day_first.text), .day_first.line, Quoted(&.month_first.text), .month_first.line
    )]
    BothOrders { day_first: Example, month_first: Example },
    #[error("expected dates with the {expected} first, found {} in line {}", Quoted(&.found.text), .found.line)]
    OtherOrder { expected: &'static str, found: Example },
    #[error(
        "neither {} in line {} nor any other date of the file shows whether the month or the day comes first: set \
         DATES=month-first or DATES=day-first",
        Quoted(&.0.text), .0.line
    )]
    EitherOrder(Example),
    #[error("expected sales, found none; lines that are not sales: {}", Reasons(.0))]
    NoSales(BTreeMap<NoSale, usize>),
}

/// A date as it is written in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    pub line: u64,
    pub text: String,
}

/// A part of the file in quotes, escaped and shortened, since it may contain anything.
struct Quoted<'a>(&'a str);

struct Reasons<'a>(&'a BTreeMap<NoSale, usize>);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut characters = self.0.chars();
        let quoted: String = characters.by_ref().take(MAX_QUOTED).collect();
        write!(f, "{quoted:?}{}", if characters.next().is_some() { " …" } else { "" })
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
