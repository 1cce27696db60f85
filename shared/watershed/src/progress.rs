//! Shows how far a generation is: a bar on a terminal, else a line every few seconds, or JSON for scripts. Bar and lines
//! go to stderr, as they are not the answer.

use std::{
    io::{self, IsTerminal, Write},
    time::Duration,
};

use serde_json::Value;
use tokio::time::Instant;

use crate::{
    generations::Generation,
    words::{duration, number, rate, seconds},
};

/// How often a line is printed where nobody sees a bar.
const LINES: Duration = Duration::from_secs(5);
/// How often an object is printed for scripts.
const OBJECTS: Duration = Duration::from_secs(1);
const BAR_WIDTH: usize = 20;

pub struct Progress {
    form: Form,
    /// When something was printed last.
    shown: Option<Instant>,
    /// The last sentence, which is not said again while it holds.
    sentence: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    Bar,
    Lines,
    Json,
}

impl Progress {
    pub fn new(is_json: bool) -> Self {
        let form = match is_json {
            true => Form::Json,
            false if io::stderr().is_terminal() => Form::Bar,
            false => Form::Lines,
        };
        Self { form, shown: None, sentence: String::new() }
    }

    /// Shows how far a generation, such as `orders@3`, is.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn show(&mut self, title: &str, generation: &Generation, json: &Value) -> io::Result<()> {
        if let Some(problem) = &generation.problem {
            return self.say(&format!("{title}: {problem}"));
        }
        self.sentence.clear();
        let interval = match self.form {
            Form::Bar => Duration::ZERO,
            Form::Lines => LINES,
            Form::Json => OBJECTS,
        };
        if self.shown.is_some_and(|shown| shown.elapsed() < interval) {
            return Ok(());
        }
        self.shown = Some(Instant::now());
        match self.form {
            Form::Bar => redraw(&bar(title, generation)),
            Form::Lines => writeln!(io::stderr(), "{}", sentence(title, generation)),
            Form::Json => writeln!(io::stdout(), "{json}"),
        }
    }

    /// Says why it does not go on.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn say(&mut self, sentence: &str) -> io::Result<()> {
        if self.sentence == sentence {
            return Ok(());
        }
        sentence.clone_into(&mut self.sentence);
        self.clear()?;
        writeln!(io::stderr(), "{sentence}")
    }

    /// Makes room for what is printed next; for scripts, prints how it ended.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn end(&mut self, json: &Value) -> io::Result<()> {
        self.shown = None;
        match self.form {
            Form::Json => writeln!(io::stdout(), "{json}"),
            Form::Bar | Form::Lines => self.clear(),
        }
    }

    /// Takes the bar away.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn clear(&self) -> io::Result<()> {
        if self.form == Form::Bar { redraw("") } else { Ok(()) }
    }
}

/// Replaces the line of the terminal, which cuts off what does not fit.
fn redraw(line: &str) -> io::Result<()> {
    let mut stderr = io::stderr().lock();
    write!(stderr, "\r\x1b[K\x1b[?7l{line}\x1b[?7h")?;
    stderr.flush()
}

/// `orders@3  [██████████          ]  50 %  1,000 of 2,000  500 events/s  2 s left`
fn bar(title: &str, generation: &Generation) -> String {
    let (Some(position), Some(total), Some(percent)) = (generation.position, generation.total(), generation.percent())
    else {
        return format!("{title}  waits for a replica");
    };
    let done = if total == 0 { BAR_WIDTH } else { (position as f64 / total as f64 * BAR_WIDTH as f64) as usize };
    let filled = "█".repeat(done);
    let speed = generation.events_per_second.map(|it| format!("  {} events/s", rate(it))).unwrap_or_default();
    let left = generation.seconds_left.map(|it| format!("  {} left", duration(seconds(it)))).unwrap_or_default();
    let (position, total) = (number(position), number(total));
    format!("{title}  [{filled:BAR_WIDTH$}]  {percent:>5}  {position} of {total}{speed}{left}")
}

/// `orders@3: 1,000 of 2,000 events (50 %), 500 events/s, 2 s left`
fn sentence(title: &str, generation: &Generation) -> String {
    let (Some(position), Some(total), Some(percent)) = (generation.position, generation.total(), generation.percent())
    else {
        return format!("{title}: waits for a replica");
    };
    let speed = generation.events_per_second.map(|it| format!(", {} events/s", rate(it))).unwrap_or_default();
    let left = generation.seconds_left.map(|it| format!(", {} left", duration(seconds(it)))).unwrap_or_default();
    format!("{title}: {} of {} events ({percent}){speed}{left}", number(position), number(total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_and_a_line_say_how_far_it_is() {
        let waiting = Generation { number: 3, ..Generation::default() };
        assert_eq!(bar("orders@3", &waiting), "orders@3  waits for a replica");
        let begun = Generation { position: Some(0), events_left: Some(2_000), ..waiting };
        assert_eq!(bar("orders@3", &begun), "orders@3  [                    ]    0 %  0 of 2,000");
        let half = Generation {
            position: Some(1_000),
            events_left: Some(1_000),
            events_per_second: Some(500.0),
            seconds_left: Some(2.0),
            ..begun
        };
        let expected = "orders@3  [██████████          ]   50 %  1,000 of 2,000  500 events/s  2 s left";
        assert_eq!(bar("orders@3", &half), expected);
        assert_eq!(sentence("orders@3", &half), "orders@3: 1,000 of 2,000 events (50 %), 500 events/s, 2 s left");
        let empty = Generation { position: Some(0), events_left: Some(0), ..Generation::default() };
        assert_eq!(bar("orders@3", &empty), "orders@3  [████████████████████]  100 %  0 of 0");
    }
}
