//! `watershed verify`: proves that views are what the events make of them. Each is built anew aside, compared with what
//! serves, and dropped.

use std::io::{self, Write};

use anstyle::Style;
use serde_json::{Value, json};

use crate::{
    Failure, Installation, Outcome,
    comparison::Comparison,
    following::{Begun, End, Options, follow, leave},
    generations,
    operator::Operator,
    progress::Progress,
    table::{GREEN, RED, Rows, line, optional, table},
    words::{list, number},
};

/// Prove that views are what the events make of them, or say which documents are not
#[derive(clap::Args)]
#[command(after_help = "\
Each view is built anew beside what serves, compared, and dropped; queries go on and see nothing of
it. Ctrl-C leaves it, and it goes on; the same command joins it again.

Exit codes:
  0  all views are equal; with --no-wait, they are being verified
  1  documents differ; there is no such view, or the NATS user may not do this
  2  the command line is wrong
  3  NATS cannot be reached, or nobody answers
  130  left by Ctrl-C; it goes on")]
pub struct Verify {
    /// The names of views, such as orders [default: all]
    #[arg(value_name = "VIEW")]
    views: Vec<String>,
    /// Also show what the fields contain that differ: in what serves / in what was built
    #[arg(long)]
    values: bool,
    #[command(flatten)]
    options: Options,
}

/// A view, and what came of it.
struct Verified {
    title: String,
    comparison: Result<Comparison, &'static str>,
}

impl Verify {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let operator = Operator::connect(installation).await?;
        let views = match &self.views[..] {
            [] => generations::list(&operator).await?.1.into_iter().map(|view| view.view).collect(),
            given => given.to_vec(),
        };
        let mut begun = Vec::new();
        for view in &views {
            let reply = operator.ask("view.verify", &json!({ "view": view, "values": self.values })).await?;
            begun.push((Begun::read(&reply)?, reply));
        }
        let titles = list(&begun.iter().map(|(begun, _)| begun.title()).collect::<Vec<_>>());
        if self.options.no_wait {
            return self.say_begun(&titles, begun.iter().map(|(_, reply)| reply));
        }
        let mut progress = Progress::new(self.options.json);
        let following = async {
            let mut verified = Vec::new();
            for (begun, _) in &begun {
                verified.push(verify(&operator, begun, &mut progress).await?);
            }
            Ok::<_, Failure>(verified)
        };
        let verified = tokio::select! {
            verified = following => verified?,
            _ = tokio::signal::ctrl_c() => {
                let names = self.views.iter().map(|view| format!(" {view}"));
                let values = if self.values { " --values" } else { "" };
                return leave(&Progress::new(self.options.json), &titles, &format!("verify{}{values}", names.collect::<String>()));
            }
        };
        if !self.options.json {
            write!(anstream::stdout(), "{}", text(&verified))?;
        }
        let are_equal = verified.iter().all(|it| it.comparison.as_ref().is_ok_and(Comparison::is_equal));
        Ok(if are_equal { Outcome::Fine } else { Outcome::Wrong })
    }

    fn say_begun<'a>(&self, titles: &str, mut replies: impl Iterator<Item = &'a Value>) -> Result<Outcome, Failure> {
        let mut stdout = io::stdout().lock();
        match self.options.json {
            true => replies.try_for_each(|reply| writeln!(stdout, "{reply}"))?,
            false => writeln!(stdout, "being verified: {titles}")?,
        }
        Ok(Outcome::Fine)
    }
}

/// Follows a view to its comparison.
async fn verify(operator: &Operator, begun: &Begun, progress: &mut Progress) -> Result<Verified, Failure> {
    let comparison = match follow(operator, begun, progress).await? {
        End::Verified(comparison) => comparison.ok_or("the comparison cannot be read by this version"),
        End::Refused(comparison) => comparison.ok_or("it differs"),
        End::Gone => Err("dropped before it was compared"),
        End::Serves { .. } | End::Served => Err("it serves, and was not compared"),
    };
    Ok(Verified { title: begun.title(), comparison })
}

/// What is wrong first, then a table, then the documents that differ.
fn text(verified: &[Verified]) -> String {
    let mut text = String::new();
    for Verified { title, comparison } in verified {
        match comparison {
            Ok(comparison) if comparison.is_equal() => {}
            Ok(comparison) => line(&mut text, RED, &format!("✗ {title}: {}", comparison.result())),
            Err(reason) => line(&mut text, RED, &format!("✗ {title}: {reason}")),
        }
    }
    if text.is_empty() {
        line(&mut text, GREEN, "✓ the views are what the events make of them");
    }
    let row = |Verified { title, comparison }: &Verified| {
        let known = comparison.as_ref().ok();
        let (view, _) = title.split_once('@').unwrap_or((title, ""));
        let position = optional(known.map(|it| it.position), number);
        let result = known.map_or_else(|| "unknown".to_owned(), Comparison::result);
        vec![view.to_owned(), position, optional(known, Comparison::size), result]
    };
    let header = &["view", ">position", ">documents", "result"];
    table(&mut text, &Rows { header, cells: verified.iter().map(row).collect() });
    for Verified { title, comparison } in verified {
        let differences = comparison.as_ref().map(Comparison::differences).unwrap_or_default();
        if !differences.is_empty() {
            let (view, _) = title.split_once('@').unwrap_or((title, ""));
            line(&mut text, Style::new(), &format!("\n{view}:"));
            text.push_str(&differences);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anstream::adapter::strip_str;

    use super::*;

    fn verified(title: &str, comparison: Value) -> Verified {
        let comparison = Comparison::read(&comparison).ok_or("the comparison cannot be read by this version");
        Verified { title: title.to_owned(), comparison }
    }

    fn plain(verified: &[Verified]) -> String {
        strip_str(&text(verified)).to_string()
    }

    #[test]
    fn equal_views_are_a_table() {
        let equal = |title, documents: u64| {
            let side = json!({"collection": title, "documents": documents, "digest": "aa"});
            let comparison = json!({"position": 1042, "a": side, "b": side, "different": 0});
            verified(title, comparison)
        };
        assert_eq!(
            plain(&[equal("orders@3", 1_200), equal("users@1", 7)]),
            "\
✓ the views are what the events make of them

view    position  documents  result
orders     1,042      1,200  equal
users      1,042          7  equal
"
        );
    }

    #[test]
    fn what_differs_is_named_first_and_document_by_document_last() {
        let comparison = json!({
            "position": 1042, "different": 2, "a": {"collection": "users@1", "documents": 7, "digest": "aa"},
            "b": {"collection": "users@3", "documents": 8, "digest": "bb"},
            "differences": [
                {"id": "u1", "kind": "differs", "fields": [{"field": "name", "a": "Ada", "b": "Eva"}]},
                {"id": "u2", "kind": "only_in_b"},
            ],
        });
        assert_eq!(
            plain(&[verified("users@3", comparison), verified("orders@4", json!(null))]),
            "\
✗ users@3: 2 documents differ
✗ orders@4: the comparison cannot be read by this version

view    position  documents  result
users      1,042      7 / 8  2 documents differ
orders         -          -  unknown

users:
  u1  differs in name
      name: \"Ada\" / \"Eva\"
  u2  is only in the rebuilt generation
"
        );
    }
}
