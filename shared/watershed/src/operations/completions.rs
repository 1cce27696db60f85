//! `watershed completions`: completions of the command line, for a shell.

use std::io::{self, Write};

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{Arguments, Failure, Installation, Outcome};

/// Print completions for a shell
#[derive(clap::Args)]
#[command(after_help = "For bash, in this shell:  source <(watershed completions bash)")]
pub struct Completions {
    shell: Shell,
}

impl Completions {
    pub async fn run(self, _: &Installation) -> Result<Outcome, Failure> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Arguments::command(), "watershed", &mut script);
        io::stdout().write_all(&script)?;
        Ok(Outcome::Fine)
    }
}
