//! A report as text: what is wrong first, then the tables. The text is styled; whoever prints it takes the styles away
//! where they are not wanted.

use super::{
    parts::{BuildStatus, ReplicaStatus, ViewStatus},
    replies::State,
    report::Report,
};
use crate::{
    table::{GREEN, NOTHING, RED, Rows, YELLOW, line, optional, table},
    words::{duration, list, number, percent, rate, seconds, short},
};

/// The report on one screen.
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        line(&mut text, RED, &format!("✗ {problem}"));
    }
    if report.problems.is_empty() {
        line(&mut text, GREEN, "✓ all is well");
    }
    for hint in &report.hints {
        line(&mut text, YELLOW, &format!("· {hint}"));
    }
    if report.is_unanswered() && report.replicas.is_empty() {
        return text;
    }
    table(&mut text, &flow(report));
    if !report.views.is_empty() {
        table(&mut text, &views(&report.views));
    }
    if !report.builds.is_empty() {
        table(&mut text, &builds(&report.builds));
    }
    table(&mut text, &replicas(&report.replicas));
    text
}

fn flow(report: &Report) -> Rows {
    let Report { journal, relay, stream, .. } = report;
    let note = if journal.is_known { "" } else { "at least: no command replica tells it" };
    let running: Vec<String> = relay.replicas.iter().map(|name| short(name)).collect();
    let relay = if running.is_empty() { NOTHING.to_owned() } else { format!("runs in {}", list(&running)) };
    let prefix = if stream.prefix.is_empty() { String::new() } else { format!(", prefix {}", short(&stream.prefix)) };
    let cells = [
        vec![
            "journal".to_owned(),
            optional(journal.position, number),
            String::new(),
            optional(journal.events_per_second, rate),
            note.to_owned(),
        ],
        vec!["relay".to_owned(), String::new(), String::new(), String::new(), relay],
        vec![
            "stream".to_owned(),
            optional(stream.position, number),
            optional(stream.lag_events, number),
            optional(stream.events_per_second, rate),
            format!("{}{prefix}", short(&stream.name)),
        ],
    ];
    Rows { header: &["", ">position", ">behind", ">events/s", ""], cells: cells.into() }
}

fn views(views: &[ViewStatus]) -> Rows {
    let row = |view: &ViewStatus| {
        vec![
            view.title(),
            optional(view.position, number),
            optional(view.lag_events, number),
            view.lag_seconds.map_or_else(|| "unknown".to_owned(), |lag| duration(seconds(lag))),
            optional(view.events_per_second, rate),
            optional(view.leader.as_deref(), short),
            optional(view.term, number),
            match view.state {
                State::Live => "live",
                State::CatchingUp => "catching up",
                State::Failing => "failing",
                State::Unserved => "not served",
                State::Abandoned => "standing still",
                State::Unknown => "?",
            }
            .to_owned(),
        ]
    };
    let header = &["view", ">position", ">behind", ">lag", ">events/s", "leader", ">term", "state"];
    Rows { header, cells: views.iter().map(row).collect() }
}

fn builds(builds: &[BuildStatus]) -> Rows {
    let row = |build: &BuildStatus| {
        let done = build.position.zip(build.events_left).map(|(position, left)| percent(position, position + left));
        vec![
            format!("{}@{}", build.view, build.generation),
            optional(build.position, number),
            optional(done, |done| done),
            optional(build.events_per_second, rate),
            optional(build.seconds_left, |left| duration(seconds(left))),
            short(&build.leader),
            if build.reason.is_some() { "failing".to_owned() } else { build.state.clone() },
        ]
    };
    let header = &["build", ">position", ">done", ">events/s", ">left", "leader", "state"];
    Rows { header, cells: builds.iter().map(row).collect() }
}

fn replicas(replicas: &[ReplicaStatus]) -> Rows {
    let row = |replica: &ReplicaStatus| {
        let silent = seconds(replica.silent_seconds);
        vec![
            replica.service.clone(),
            short(&replica.replica),
            if replica.revision.is_empty() { NOTHING.to_owned() } else { short(&replica.revision) },
            optional(replica.up_seconds.filter(|_| replica.answers()), |up| duration(seconds(up as f64))),
            match replica.ready {
                _ if !replica.answers() => "silent",
                Some(true) => "ready",
                Some(false) => "not ready",
                None => "?",
            }
            .to_owned(),
            if replica.answers() { work(replica) } else { format!("for {}", duration(silent)) },
        ]
    };
    let header = &["service", "replica", "revision", ">up", "state", "work"];
    Rows { header, cells: replicas.iter().map(row).collect() }
}

/// What a replica is doing, in a few words.
fn work(replica: &ReplicaStatus) -> String {
    let figures = &replica.figures;
    let mut work = Vec::new();
    if let Some(queue) = &figures.queue {
        work.push(format!("{} of {} waiting", number(queue.commands), number(queue.max_commands)));
    }
    if let Some(batches) = figures.batches.as_ref().filter(|batches| batches.last > 0) {
        work.push(format!("last batch {}", number(batches.last)));
    }
    if let (Some(in_flight), Some(max)) = (figures.in_flight, figures.max_in_flight) {
        work.push(format!("{} of {} in flight", number(in_flight), number(max)));
    }
    if replica.service == "projection" && figures.ready.is_some() {
        work.push(match figures.views.len() {
            0 => "leads no view".to_owned(),
            1 => "leads 1 view".to_owned(),
            count => format!("leads {count} views"),
        });
    }
    work.join(", ")
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;
    use serde_json::json;

    use super::super::samples::{Watched, healthy, led, query, report};

    fn plain(report: &super::Report) -> String {
        strip_str(&super::text(report)).to_string()
    }

    #[test]
    fn a_healthy_installation_fits_on_one_screen() {
        let text = plain(&report(&healthy()));
        assert_eq!(
            text,
            "\
✓ all is well

         position  behind  events/s
journal     1,042                 -
relay                                runs in c1
stream      1,042       0         -  EVENTS

view    position  behind  lag  events/s  leader  term  state
orders     1,042       0  0 s      12.5  p1         3  live
users      1,042       0  0 s      12.5  p1         1  live

service     replica  revision          up  state  work
command     c1       d80c91b0a1b2  60 min  ready  3 of 8,192 waiting, last batch 12
projection  p1       d80c91b0a1b2  60 min  ready  leads 2 views
query       q1       d80c91b0a1b2  60 min  ready  12 of 4,096 in flight
"
        );
    }

    #[test]
    fn what_is_being_built_has_a_table_of_its_own() {
        let mut replies = healthy();
        replies[1]["data"]["builds"] = json!([
            {"view": "orders", "generation": 2, "state": "building", "position": 521, "events_per_second": 52.1},
            {"view": "sales", "generation": 2, "state": "building", "position": 0, "reason": "the event is unknown"},
            {"view": "users", "generation": 12, "state": "verifying"},
        ]);
        let text = plain(&report(&replies));
        let (_, text) = text.split_once("\nbuild").unwrap();
        let (table, _) = text.split_once("\n\n").unwrap();
        assert_eq!(
            table,
            "     position  done  events/s  left  leader  state
orders@2       521  50 %      52.1  10 s  p1      building
sales@2          0   0 %         -     -  p1      failing
users@12         -     -         -     -  p1      verifying"
        );
    }

    /// Generated names, large numbers, and a projection replica that has been stopped.
    #[test]
    fn what_is_wrong_comes_first_and_no_row_is_wider_than_a_hundred_columns() {
        let mut replies = healthy();
        replies[0]["id"] = "0192d3a0-7c1e-7b5a-9f00-3c2b1a000001".into();
        replies[0]["data"]["journal"] = json!({"position": 123_456_789});
        replies[0]["data"]["stream"] = json!({"position": 123_456_789});
        replies[0]["data"]["queue"]["commands"] = 6_000.into();
        replies[0]["data"]["batches"]["last"] = 4_096.into();
        replies[1]["data"]["views"] = json!([led("orders", 3, 1042, 0.2), led("users", 1, 1000, 0.2)]);
        let mut watched = Watched::default();
        watched.after(0, &replies);
        replies[1] = query("q2", 1042, 1000);
        replies[2] = query("q1", 1042, 1000);
        let text = plain(&watched.after(6, &replies));
        let mut lines = text.lines();
        assert!(
            lines.next().unwrap().starts_with("✗ no replica of the projection service answers: the views stand still")
        );
        assert_eq!(lines.next(), Some("✗ projection replica p1 has not answered for 6 s"));
        assert!(text.contains("\nprojection  p1         d80c91b0a1b2       -  silent  for 6 s\n"));
        let widest = lines.map(|line| line.chars().count()).max();
        assert!(widest <= Some(100), "{widest:?}\n{text}");
    }
}
