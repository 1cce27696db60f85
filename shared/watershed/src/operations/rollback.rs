//! `watershed rollback`: returns to the generation of a view that served before, and follows it until it serves.

use serde_json::json;

use crate::{
    Failure, Installation, Outcome,
    following::{Options, follow_until_it_serves},
    generations,
    operator::Operator,
};

/// Return to the generation of a view that served before, and follow it until it serves
#[derive(clap::Args)]
#[command(after_help = "\
It is brought up to date first, while queries go on with the one that serves. Ctrl-C leaves it, and
it goes on; the same command joins it again.

Exit codes:
  0  the generation of before serves; with --no-wait, it is being brought up to date
  1  it does not serve, as documents differ; there is no such view or no generation of before,
     another one is being built, or the NATS user may not do this
  2  the command line is wrong
  3  NATS cannot be reached, or nobody answers
  130  left by Ctrl-C; it goes on")]
pub struct Rollback {
    /// The name of the view, such as orders
    view: String,
    /// Let it serve even if its documents differ from those of the generation that serves
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    options: Options,
}

impl Rollback {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let Self { view, force, options } = self;
        let operator = Operator::connect(installation).await?;
        // Which one is said, so that a second request does not return to the one that has just been left.
        let (_, shown) = generations::show(&operator, &view).await?;
        let request = json!({ "view": view, "generation": shown.to_return_to(), "force": force });
        let reply = operator.ask("view.rollback", &request).await?;
        follow_until_it_serves(&operator, &reply, "rollback", &options).await
    }
}
