//! Tables and lines for a terminal. The text is styled; whoever prints it takes the styles away where they are not wanted.

use std::fmt::Write;

use anstyle::{AnsiColor, Style};
use comfy_table::{Cell, CellAlignment, Table};

pub const RED: Style = AnsiColor::Red.on_default();
pub const YELLOW: Style = AnsiColor::Yellow.on_default();
pub const GREEN: Style = AnsiColor::Green.on_default();
const BOLD: Style = Style::new().bold();

/// What a cell shows that has nothing to show.
pub const NOTHING: &str = "-";

/// The rows of a table. A column whose title begins with `>` is aligned to the right.
pub struct Rows {
    pub header: &'static [&'static str],
    pub cells: Vec<Vec<String>>,
}

/// Adds the table, below an empty line.
pub fn table(text: &mut String, rows: &Rows) {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(rows.header.iter().map(|title| Cell::new(title.trim_start_matches('>'))));
    table.add_rows(rows.cells.iter().cloned());
    for (column, title) in table.column_iter_mut().zip(rows.header) {
        column.set_padding((0, 2));
        if title.starts_with('>') {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    text.push('\n');
    for (number, row) in table.lines().enumerate() {
        line(text, if number == 0 { BOLD } else { Style::new() }, row.trim_end());
    }
}

/// Adds a line.
pub fn line(text: &mut String, style: Style, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{style}{line}{style:#}");
}

pub fn optional<T>(value: Option<T>, shown: impl Fn(T) -> String) -> String {
    value.map_or_else(|| NOTHING.to_owned(), shown)
}
