//! `watershed views`: the views and all their generations.

use std::io::{self, Write};

use anstyle::Style;
use domain::Timestamp;
use serde_json::json;

use crate::{
    Failure, Installation, Outcome,
    comparison::Comparison,
    generations::{self, Generation, State, View},
    operator::Operator,
    table::{GREEN, NOTHING, RED, Rows, YELLOW, line, optional, table},
    words::{bytes, duration, number, rate, seconds, short},
};

/// Show all generations of the views: state, position, size, and what is wrong first
#[derive(clap::Args)]
#[command(after_help = "\
A generation is being built, serves, has served before (previous), or is being built only to be
compared (verifying). What was compared is then verified or, if it was to serve, refused.

Exit codes:
  0  all is well
  1  something is wrong; there is no such view, or the NATS user may not ask
  2  the command line is wrong
  3  NATS cannot be reached, or nobody answers")]
pub struct Views {
    /// Only this view; also shows which documents differ
    view: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Views {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let operator = Operator::connect(installation).await?;
        let (reply, views) = match &self.view {
            Some(view) => {
                let (reply, view) = generations::show(&operator, view).await?;
                (json!({ "views": [reply] }), vec![view])
            }
            None => generations::list(&operator).await?,
        };
        match self.json {
            true => writeln!(io::stdout(), "{reply:#}")?,
            false => write!(anstream::stdout(), "{}", text(&views, runtime::now()))?,
        }
        Ok(if views.iter().any(|view| !problems(view).is_empty()) { Outcome::Wrong } else { Outcome::Fine })
    }
}

/// What is wrong first, then a table, then the documents that differ.
fn text(views: &[View], now: Timestamp) -> String {
    let mut text = String::new();
    let problems: Vec<String> = views.iter().flat_map(problems).collect();
    for problem in &problems {
        line(&mut text, RED, &format!("✗ {problem}"));
    }
    if problems.is_empty() {
        line(&mut text, GREEN, "✓ all views are served");
    }
    for hint in views.iter().filter_map(unbuilt) {
        line(&mut text, YELLOW, &format!("· {hint}"));
    }
    let rows = views.iter().flat_map(|view| view.generations.iter().map(|it| row(&view.view, it, now)));
    let header = &[
        "generation",
        "state",
        ">version",
        ">position",
        ">events/s",
        ">left",
        ">documents",
        ">size",
        "leader",
        "since",
    ];
    table(&mut text, &Rows { header, cells: rows.collect() });
    for (view, generation) in views.iter().flat_map(|view| view.generations.iter().map(move |it| (view, it))) {
        let Some(comparison) = generation.comparison.as_ref().and_then(Comparison::read) else { continue };
        let title =
            format!("\n{}@{} was compared with what serves: {}", view.view, generation.number, comparison.result());
        line(&mut text, Style::new(), &title);
        text.push_str(&comparison.differences());
    }
    text
}

/// What is not as it should be with a view, in words.
fn problems(view: &View) -> Vec<String> {
    let of = |Generation { number, problem, .. }: &Generation| {
        Some(format!("{}@{number}: {}", view.view, problem.as_ref()?))
    };
    let mut problems: Vec<String> = view.generations.iter().filter_map(of).collect();
    if view.serving(None).is_none() {
        problems.push(format!("no generation of the view {} serves", view.view));
    }
    problems
}

/// A version whose replicas cannot answer queries yet, while those of another can.
fn unbuilt(view: &View) -> Option<String> {
    let version = view.version?;
    let is_unbuilt = view.serving(None).is_some() && view.serving(Some(version)).is_none();
    is_unbuilt.then(|| format!("no generation of version {version} of the view {} serves yet", view.view))
}

fn row(view: &str, generation: &Generation, now: Timestamp) -> Vec<String> {
    let is_built = matches!(generation.state, State::Building | State::Verifying);
    let built = |text: Option<String>| text.filter(|_| is_built).unwrap_or_else(|| NOTHING.to_owned());
    let age = |since: Timestamp| {
        let millis = u64::try_from(now.unix_millis() - since.unix_millis()).unwrap_or_default();
        format!("{} ago", duration(seconds((millis / 1_000) as f64)))
    };
    vec![
        format!("{view}@{}", generation.number),
        generation.state.words().to_owned(),
        optional(generation.version, number),
        optional(generation.position, number),
        built(generation.events_per_second.map(rate)),
        built(generation.seconds_left.map(|left| duration(seconds(left)))),
        optional(generation.documents, number),
        optional(generation.bytes, bytes),
        optional(generation.leader.as_deref(), short),
        optional(generation.since, age),
    ]
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;
    use serde_json::{Value, json};

    use super::*;

    fn shown(views: &[Value]) -> String {
        let views: Vec<View> = views.iter().map(|view| View::read(view).unwrap()).collect();
        strip_str(&text(&views, "2026-01-31T09:30:00.000Z".parse().unwrap())).to_string()
    }

    fn generation(number: u64, state: &str) -> Value {
        json!({
            "generation": number, "version": 1, "state": state, "since": "2026-01-31T08:30:00Z", "position": 1042,
            "events_left": 0, "events_per_second": null, "seconds_left": null, "leader": "p1", "documents": 120,
            "bytes": 51200, "problem": null, "idle_since": null,
        })
    }

    #[test]
    fn all_generations_are_one_table() {
        let mut building = generation(3, "building");
        building["position"] = 521.into();
        building["events_left"] = 521.into();
        building["events_per_second"] = 52.1.into();
        building["seconds_left"] = 10.0.into();
        building["since"] = "2026-01-31T09:29:50.125Z".into();
        let mut previous = generation(1, "previous");
        previous["leader"] = json!(null);
        let orders =
            json!({"view": "orders", "version": 1, "generations": [previous, generation(2, "serving"), building]});
        let users = json!({"view": "users", "version": 1, "generations": [generation(1, "serving")]});
        assert_eq!(
            shown(&[orders, users]),
            "\
✓ all views are served

generation  state     version  position  events/s  left  documents     size  leader  since
orders@1    previous        1     1,042         -     -        120  51.2 kB  -       60 min ago
orders@2    serving         1     1,042         -     -        120  51.2 kB  p1      60 min ago
orders@3    building        1       521      52.1  10 s        120  51.2 kB  p1      9 s ago
users@1     serving         1     1,042         -     -        120  51.2 kB  p1      60 min ago
"
        );
    }

    #[test]
    fn what_is_wrong_comes_first_and_what_differs_last() {
        let mut damaged = generation(1, "serving");
        damaged["problem"] = "the collection orders@1 is gone".into();
        let orders = json!({"view": "orders", "version": 1, "generations": [damaged]});
        let users = json!({"view": "users", "version": 1, "generations": [generation(1, "building")]});
        let mut refused = generation(2, "refused");
        refused["comparison"] = json!({
            "position": 1042, "different": 1, "a": {"collection": "products@1", "documents": 120, "digest": "aa"},
            "b": {"collection": "products@2", "documents": 120, "digest": "bb"},
            "differences": [{"id": "p1", "kind": "differs", "fields": [{"field": "stock"}]}],
        });
        let products = json!({"view": "products", "version": 2, "generations": [generation(1, "serving"), refused]});
        let text = shown(&[orders, users, products]);
        let first: Vec<&str> = text.lines().take(3).collect();
        assert_eq!(
            first,
            [
                "✗ orders@1: the collection orders@1 is gone",
                "✗ no generation of the view users serves",
                "· no generation of version 2 of the view products serves yet",
            ]
        );
        let last = "\n\nproducts@2 was compared with what serves: 1 document differs\n  p1  differs in stock\n";
        assert!(text.ends_with(last), "{text}");
    }
}
