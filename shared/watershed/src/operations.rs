//! All operations.

use crate::{Failure, Installation, Outcome};

// A macro, so that an operation is one line: the module, its place on the command line and the call all follow from it.
macro_rules! operations {
    ($($operation:ident($module:ident))*) => {
        $(mod $module;)*

        #[derive(clap::Subcommand)]
        pub enum Operation {
            $($operation($module::$operation),)*
        }

        impl Operation {
            /// Carries out the operation.
            ///
            /// # Errors
            /// If it cannot be carried out, or the services refuse it.
            pub async fn run(self, installation: &Installation) -> Result<Outcome, Failure> {
                match self {
                    $(Self::$operation(operation) => operation.run(installation).await,)*
                }
            }
        }
    };
}

// Each line names the arguments of an operation and the module that defines it.
operations! {
    Status(status)
    Call(call)
    Events(events)
    Journal(journal)
    Views(views)
    Rebuild(rebuild)
    Rollback(rollback)
    Drop(drop)
    Verify(verify)
    Completions(completions)
}
