//! `watershed rebuild`: builds a view anew beside the generation that serves, and follows it until it serves.

use serde_json::json;

use crate::{
    Failure, Installation, Outcome,
    following::{Options, follow_until_it_serves},
    operator::Operator,
};

/// Build a view anew from the events, beside what serves, and follow it until it serves
#[derive(clap::Args)]
#[command(after_help = "\
Queries go on meanwhile. The new generation takes the place of the one that serves when it has come
to the same position, and only if its documents are the same. Ctrl-C leaves it, and it goes on; the
same command joins it again.

Exit codes:
  0  the new generation serves; with --no-wait, it is being built
  1  it does not serve, as documents differ; there is no such view, or the NATS user may not do this
  2  the command line is wrong
  3  NATS cannot be reached, or nobody answers
  130  left by Ctrl-C; it goes on")]
pub struct Rebuild {
    /// The name of the view, such as orders
    view: String,
    /// Let it serve even if its documents differ from those of the generation before
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    options: Options,
}

impl Rebuild {
    pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
        let Self { view, force, options } = self;
        let operator = Operator::connect(installation).await?;
        let reply = operator.ask("view.rebuild", &json!({ "view": view, "force": force })).await?;
        follow_until_it_serves(&operator, &reply, "rebuild", &options).await
    }
}
