//! `watershed drop`: drops a generation of a view that does not serve.

use std::io::{self, Write};

use serde_json::json;

use crate::{Failure, Installation, Outcome, following::Begun, operator::Operator};

/// Drop a generation of a view that does not serve, or end its being built
#[derive(clap::Args)]
#[command(after_help = "\
`watershed views` shows the generations. The documents of one that is dropped are gone some seconds
later, when no query can read them any more.

Exit codes:
  0  it is being dropped
  1  it serves, or is the only one; there is no such generation, or the NATS user may not do this
  2  the command line is wrong
  3  NATS cannot be reached, or nobody answers")]
pub struct Drop {
    /// The name of the view, such as orders
    view: String,
    /// The number of the generation, such as 3 of orders@3
    #[arg(value_parser = clap::value_parser!(i32).range(1..))]
    generation: i32,
}

impl Drop {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let Self { view, generation } = self;
        let operator = Operator::connect(installation).await?;
        let reply = operator.ask("view.drop", &json!({ "view": view, "generation": generation })).await?;
        writeln!(io::stdout(), "{} is being dropped", Begun::read(&reply)?.title())?;
        Ok(Outcome::Fine)
    }
}
