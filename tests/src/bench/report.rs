//! The results: a row for each figure, printed as a table, as JSON and as a chart.

use std::fmt::Write as _;

use serde::Serialize;

use super::{load::Measured, sustained::Lag};

/// The target for the ratio of our figure to that of the bare part.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// There is no target. The ratio is only shown.
    Open,
}

/// One measurement, of ours or of the bare part, in one round.
pub struct Sample {
    pub figure: f64,
    pub measured: Measured,
    /// How many operations each measured one counts for: 256 for a batch of 256 orders.
    pub per_operation: usize,
    /// A note beside the figure.
    pub note: String,
}

/// Our figure and that of the bare part, in the same unit.
#[derive(Debug, Serialize)]
pub struct Row {
    pub name: String,
    pub unit: &'static str,
    pub ours: f64,
    pub bare: f64,
    /// `ours` divided by `bare`. More is better for rates, less for latencies and sizes.
    pub ratio: f64,
    #[serde(skip)]
    pub target: Target,
    /// A note beside the figures.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// The other columns of the table, for `ours` and for `bare`.
    #[serde(skip)]
    detail: [String; 2],
}

impl Row {
    /// The row of the round with the median ratio.
    pub fn of(name: &str, unit: &'static str, target: Target, mut rounds: Vec<(Sample, Sample)>) -> Self {
        let ratio = |(ours, bare): &(Sample, Sample)| ours.figure / bare.figure;
        rounds.sort_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        let median = (rounds.len() - 1) / 2;
        let (ours, bare) = rounds.swap_remove(median);
        let mut row = Self::plain(name, unit, target, ours.figure, bare.figure);
        row.detail = [ours.detail(), bare.detail()];
        row.note = ours.note;
        row
    }

    pub fn plain(name: &str, unit: &'static str, target: Target, ours: f64, bare: f64) -> Self {
        let (note, detail) = Default::default();
        Self { name: name.to_owned(), unit, ours, bare, ratio: ours / bare, target, note, detail }
    }

    pub fn meets_target(&self) -> bool {
        match self.target {
            Target::AtLeast(target) => self.ratio >= target,
            Target::AtMost(target) => self.ratio <= target,
            Target::Open => true,
        }
    }
}

/// The processes that have a column in the table.
const PROCESSES: [&str; 7] = ["command", "projection", "query", "nats", "postgres", "mongodb", "load"];

impl Sample {
    /// A rate, in operations per second.
    pub fn rate(measured: Measured, per_operation: usize) -> Self {
        Self { figure: measured.rate() * per_operation as f64, measured, per_operation, note: String::new() }
    }

    /// A quantile of the latency, in milliseconds.
    pub fn latency(measured: Measured, quantile: f64) -> Self {
        Self { figure: measured.quantile(quantile), measured, per_operation: 1, note: String::new() }
    }

    /// Adds a note about the worst moment.
    pub fn noting(self, lag: Lag) -> Self {
        Self { note: format!("longest lag {:.2} s", lag.worst), ..self }
    }

    fn detail(&self) -> String {
        let Self { measured, per_operation, .. } = self;
        let mut text = String::new();
        for quantile in [0.5, 0.99, 0.999] {
            let _ = write!(text, "{:>9.2}", measured.quantile(quantile));
        }
        let thousands = (measured.operations() * per_operation) as f64 / 1000.0;
        for process in PROCESSES {
            let used = measured.cpu.get(process).map_or(f64::NAN, |seconds| seconds / thousands);
            let _ = if used.is_nan() { write!(text, "{:>11}", "-") } else { write!(text, "{used:>11.3}") };
        }
        text
    }
}

/// The rows as a text table.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!("{:<27}{:<10}{:>11}{:>11}{:>8}  {:<7}", "row", "unit", "ours", "bare", "ratio", "target");
    for column in ["p50 ms", "p99 ms", "p99.9 ms"] {
        let _ = write!(text, "{column:>9}");
    }
    for process in PROCESSES {
        let _ = write!(text, "{process:>11}");
    }
    text.push('\n');
    for row in rows {
        let target = match row.target {
            Target::AtLeast(target) => format!("≥ {target}"),
            Target::AtMost(target) => format!("≤ {target}"),
            Target::Open => String::new(),
        };
        let missed = if row.meets_target() { ' ' } else { '!' };
        let Row { name, unit, ours, bare, ratio, detail: [our_detail, bare_detail], .. } = row;
        let line = format!("{name:<27}{unit:<10}{ours:>11.3}{bare:>11.3}{ratio:>8.3}{missed} {target:<7}{our_detail}");
        text.push_str(line.trim_end());
        text.push('\n');
        if !row.note.is_empty() {
            let _ = writeln!(text, "  {}", row.note);
        }
        if !bare_detail.is_empty() {
            let _ = writeln!(text, "{:<77}{bare_detail}", "  bare");
        }
    }
    text.push_str("under a process: its processor seconds per 1,000 operations; ! marks a missed target\n");
    text
}

const WIDTH: f64 = 860.0;
const LEFT: f64 = 190.0;
const LINE: f64 = 26.0;
/// The scale is logarithmic, from 0.01 to 100 times the target.
const DECADES: f64 = 2.0;

/// A chart of the rows that have a target. Each bar shows how many times better than the target the figure is.
pub fn chart(rows: &[Row]) -> String {
    let bars: Vec<(&Row, f64)> = rows
        .iter()
        .filter_map(|row| match row.target {
            Target::AtLeast(target) => Some((row, row.ratio / target)),
            Target::AtMost(target) => Some((row, target / row.ratio)),
            Target::Open => None,
        })
        .collect();
    let height = LINE * (bars.len() as f64 + 2.0);
    let middle = LEFT + (WIDTH - LEFT) / 2.0 - 60.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{middle}\" y=\"18\" text-anchor=\"middle\" fill=\"#444444\">left of the line: short of the target · \
         right of it: better</text>\n"
    );
    for (index, (row, times)) in bars.iter().enumerate() {
        let top = LINE * (index as f64 + 1.0) + 4.0;
        let length = times.log10().clamp(-DECADES, DECADES) / DECADES * (middle - LEFT);
        let (x, width) = (middle + length.min(0.0), length.abs().max(1.0));
        let colour = if row.meets_target() { "#2f7fb8" } else { "#c8553d" };
        let (text_y, value_x) = (top + 14.0, middle + length.max(0.0) + 6.0);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{text_y}\" text-anchor=\"end\">{}</text><rect x=\"{x:.1}\" y=\"{top}\" \
             width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/><text x=\"{value_x:.1}\" y=\"{text_y}\" \
             fill=\"#444444\">{:.2} of bare, target {}</text>",
            LEFT - 8.0,
            row.name,
            row.ratio,
            match row.target {
                Target::AtLeast(target) => format!("≥ {target}"),
                Target::AtMost(target) => format!("≤ {target}"),
                Target::Open => String::new(),
            },
        );
    }
    let _ = writeln!(
        svg,
        "<line x1=\"{middle}\" y1=\"{LINE}\" x2=\"{middle}\" y2=\"{}\" stroke=\"#444444\"/>\n</svg>",
        height - LINE / 2.0
    );
    svg
}
