//! Follows a generation until it serves, is refused, or was compared. Invariant: whoever follows changes nothing, so that
//! leaving and joining again is free; a lost connection is waited out.

use std::{
    io::{self, Write},
    time::Duration,
};

use anstyle::Style;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    Failure, Outcome,
    comparison::Comparison,
    generations::{Generation, State, View, unreadable},
    operator::{Operator, Unasked},
    progress::Progress,
    table::{GREEN, RED, line},
    words::number,
};

/// How often the service is asked how far it is.
const POLL: Duration = Duration::from_millis(500);

/// The reply to an operation that changes a view's generations.
#[derive(Clone, Debug, Deserialize)]
pub struct Begun {
    pub view: String,
    pub generation: u64,
    /// Whether it was not on its way before.
    #[serde(default)]
    pub is_new: bool,
}

/// How following a generation ended.
#[derive(Debug)]
pub enum End {
    Serves {
        position: Option<u64>,
    },
    /// It has served, and another has taken its place.
    Served,
    /// It does not serve, because its documents differ.
    Refused(Option<Comparison>),
    Verified(Option<Comparison>),
    Gone,
}

impl Begun {
    /// # Errors
    /// If it is no such reply.
    pub fn read(reply: &Value) -> Result<Self, Failure> {
        Self::deserialize(reply).map_err(unreadable)
    }

    /// `orders@3`
    pub fn title(&self) -> String {
        format!("{}@{}", self.view, self.generation)
    }
}

/// Follows a generation to its end.
///
/// # Errors
/// If the services refuse to tell, or the output cannot be written.
pub async fn follow(operator: &Operator, begun: &Begun, progress: &mut Progress) -> Result<End, Failure> {
    let (title, question) = (begun.title(), json!({ "view": begun.view }));
    loop {
        match operator.ask_once("view.show", &question).await {
            Ok(reply) => {
                let view = View::read(&reply)?;
                let generation = view.find(begun.generation);
                let json = described(begun, &reply);
                if let Some(end) = end(generation) {
                    progress.end(&json)?;
                    return Ok(end);
                }
                progress.show(&title, generation.unwrap_or(&Generation::default()), &json)?;
            }
            Err(Unasked::ForNow(reason)) => progress.say(&format!("{title}: {reason}"))?,
            Err(Unasked::ForGood(failure)) => {
                progress.clear()?;
                return Err(failure);
            }
        }
        sleep(POLL).await;
    }
}

/// How it ended; `None` if it goes on.
fn end(generation: Option<&Generation>) -> Option<End> {
    let Some(generation) = generation else { return Some(End::Gone) };
    let comparison = || generation.comparison.as_ref().and_then(Comparison::read);
    match generation.state {
        State::Building | State::Verifying | State::Unknown => None,
        State::Serving => Some(End::Serves { position: generation.position }),
        State::Previous => Some(End::Served),
        State::Refused => Some(End::Refused(comparison())),
        State::Verified => Some(End::Verified(comparison())),
        State::Dropping => Some(End::Gone),
    }
}

/// The generation as the service describes it, with its view. One that is gone has neither state nor figures.
fn described(begun: &Begun, reply: &Value) -> Value {
    let found = reply["generations"].as_array().into_iter().flatten();
    let mut json = found.into_iter().find(|it| it["generation"] == begun.generation).cloned();
    let json = json.get_or_insert_with(|| json!({ "generation": begun.generation, "state": null }));
    json["view"] = begun.view.clone().into();
    json.take()
}

/// Follows a generation that is to serve, unless that is not wanted, until it does or Ctrl-C comes; says how it ended.
///
/// # Errors
/// As [`follow`].
pub async fn follow_until_it_serves(
    operator: &Operator,
    reply: &Value,
    command: &str,
    options: &Options,
) -> Result<Outcome, Failure> {
    let begun = Begun::read(reply)?;
    let title = begun.title();
    if options.no_wait {
        match options.json {
            true => writeln!(io::stdout(), "{reply}")?,
            false => writeln!(io::stdout(), "{title} is being built")?,
        }
        return Ok(Outcome::Fine);
    }
    if !begun.is_new {
        writeln!(io::stderr(), "{title} is being built already: joining it")?;
    }
    let mut progress = Progress::new(options.json);
    let end = tokio::select! {
        end = follow(operator, &begun, &mut progress) => end?,
        _ = tokio::signal::ctrl_c() => {
            return leave(&progress, &title, &format!("{command} {}", begun.view));
        }
    };
    let (outcome, text) = told(&title, &begun.view, &end);
    if !options.json {
        write!(anstream::stdout(), "{text}")?;
    }
    Ok(outcome)
}

/// What is the same for each operation that can be followed.
#[derive(clap::Args)]
pub struct Options {
    /// Do not wait for the end
    #[arg(long)]
    pub no_wait: bool,
    /// Print one JSON object per line: how far it is, at last how it ended
    #[arg(long)]
    pub json: bool,
}

/// Says how to come back to what goes on.
///
/// # Errors
/// If it cannot be written.
pub fn leave(progress: &Progress, title: &str, command: &str) -> Result<Outcome, Failure> {
    progress.clear()?;
    writeln!(io::stderr(), "{title} goes on; join it again with the same command: watershed {command}")?;
    Ok(Outcome::Left)
}

fn told(title: &str, view: &str, end: &End) -> (Outcome, String) {
    let mut text = String::new();
    let outcome = match end {
        End::Serves { position } => {
            let at = position.map(|position| format!(", at position {}", number(position))).unwrap_or_default();
            line(&mut text, GREEN, &format!("✓ {title} serves{at}"));
            Outcome::Fine
        }
        End::Served => {
            line(&mut text, GREEN, &format!("✓ {title} has served; another generation has taken its place"));
            Outcome::Fine
        }
        End::Refused(comparison) => {
            let result = comparison.as_ref().map(|it| format!(": {}", it.result())).unwrap_or_default();
            let problem = format!("✗ {title} does not serve, as it is not equal to the generation that does{result}");
            line(&mut text, RED, &problem);
            text.extend(comparison.as_ref().map(Comparison::differences));
            line(
                &mut text,
                Style::new(),
                &format!("The view {view} is as it was. With --force, the other serves all the same."),
            );
            Outcome::Wrong
        }
        End::Verified(_) => {
            line(&mut text, RED, &format!("✗ {title} was built to be compared, not to serve"));
            Outcome::Wrong
        }
        End::Gone => {
            line(&mut text, RED, &format!("✗ {title} was dropped before it served"));
            Outcome::Wrong
        }
    };
    (outcome, text)
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;

    use super::*;

    fn ended(state: &str, comparison: Value) -> Option<(Outcome, String)> {
        let view = json!({"view": "orders", "generations": [
            {"generation": 2, "state": "serving", "position": 1042},
            {"generation": 3, "state": state, "position": 1042, "comparison": comparison},
        ]});
        let view = View::read(&view).unwrap();
        let end = end(view.find(3))?;
        let (outcome, text) = told("orders@3", "orders", &end);
        Some((outcome, strip_str(&text).to_string()))
    }

    #[test]
    fn a_generation_is_followed_until_it_serves_or_cannot() {
        for state in ["building", "verifying", "resting"] {
            assert!(ended(state, json!(null)).is_none(), "{state}");
        }
        let serves = (Outcome::Fine, "✓ orders@3 serves, at position 1,042\n".to_owned());
        assert_eq!(ended("serving", json!(null)), Some(serves));
        for (state, outcome) in
            [("previous", Outcome::Fine), ("dropping", Outcome::Wrong), ("verified", Outcome::Wrong)]
        {
            assert_eq!(ended(state, json!(null)).unwrap().0, outcome, "{state}");
        }
        assert!(matches!(end(None), Some(End::Gone)));
    }

    #[test]
    fn a_generation_that_is_refused_is_told_with_the_documents_that_differ() {
        let comparison = json!({
            "position": 1042, "different": 1, "a": {"collection": "orders@2", "documents": 2, "digest": "aa"},
            "b": {"collection": "orders@3", "documents": 2, "digest": "bb"},
            "differences": [{"id": "o1", "kind": "differs", "fields": [{"field": "status"}]}],
        });
        let expected = "✗ orders@3 does not serve, as it is not equal to the generation that does: 1 document differs\n  \
            o1  differs in status\n\
            The view orders is as it was. With --force, the other serves all the same.\n";
        assert_eq!(ended("refused", comparison), Some((Outcome::Wrong, expected.to_owned())));
        let (outcome, text) = ended("refused", json!("of another version")).unwrap();
        assert_eq!(outcome, Outcome::Wrong);
        assert!(text.starts_with("✗ orders@3 does not serve"), "{text}");
    }

    #[test]
    fn scripts_get_the_generation_as_the_service_describes_it() {
        let begun = Begun { view: "orders".into(), generation: 3, is_new: true };
        let reply = json!({"generations": [{"generation": 3, "state": "building", "anything": 7}]});
        let expected = json!({"view": "orders", "generation": 3, "state": "building", "anything": 7});
        assert_eq!(described(&begun, &reply), expected);
        let gone = json!({"view": "orders", "generation": 3, "state": null});
        assert_eq!(described(&begun, &json!({"generations": []})), gone);
    }
}
