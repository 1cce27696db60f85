//! How an operation ended, for scripts and for people.

use std::{io, process::ExitCode};

/// How an operation ended that could be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Fine,
    /// What was printed says what is wrong.
    Wrong,
    /// What was printed says who has not answered.
    Unanswered,
    /// Somebody has left it by Ctrl-C before its end. It goes on.
    Left,
}

/// Why an operation could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Refused(String),
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Unanswered(String),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// The exit code. The reason of a failure goes to stderr.
pub fn exit_code(ended: Result<Outcome, Failure>) -> ExitCode {
    let code = match ended {
        Ok(Outcome::Fine) => 0,
        Ok(Outcome::Wrong) => 1,
        Ok(Outcome::Unanswered) => 3,
        // As shells report a program that SIGINT has ended: what was to follow may not have happened.
        Ok(Outcome::Left) => 130,
        // The reader, such as `head`, has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => 0,
        Err(failure) => {
            anstream::eprintln!("watershed: {failure}");
            match failure {
                Failure::Refused(_) | Failure::Output(_) => 1,
                Failure::Usage(_) => 2,
                Failure::Unanswered(_) => 3,
            }
        }
    };
    ExitCode::from(code)
}
