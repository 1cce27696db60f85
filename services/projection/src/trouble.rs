//! What keeps a loop from going on: tried again after a while, and logged once, not each time.

use mongodb::error::ErrorKind;
use runtime::{Backoff, LogThrottle};

#[derive(Default)]
pub struct Trouble {
    backoff: Backoff,
    repeats: LogThrottle,
}

impl Trouble {
    /// What to log of a failure; nothing if it was told not long ago.
    pub fn news(&mut self, error: &anyhow::Error) -> Option<String> {
        let text = plain(error);
        tracing::debug!(detail = ?error, "{text}");
        self.repeats.is_due(&text).then_some(text)
    }

    /// Whether something was told and is not over.
    pub fn is_told(&self) -> bool {
        self.repeats.is_failing()
    }

    /// Waits before the next try, longer each time.
    pub async fn wait(&mut self) {
        self.backoff.wait().await;
    }

    /// It goes on again.
    pub fn over(&mut self) {
        *self = Self::default();
    }
}

/// The error with its causes, on one line. MongoDB's own texts would add the whole reply of the server, and, of a
/// connection that is lost, something else each time.
pub fn plain(error: &anyhow::Error) -> String {
    let texts: Vec<_> = error
        .chain()
        .map(|cause| match cause.downcast_ref::<mongodb::error::Error>().map(|error| &*error.kind) {
            Some(ErrorKind::Io(_) | ErrorKind::ConnectionPoolCleared { .. } | ErrorKind::ServerSelection { .. }) => {
                "MongoDB does not answer".to_owned()
            }
            Some(kind) => kind.to_string(),
            None => cause.to_string(),
        })
        .collect();
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn a_failure_is_told_once_until_it_is_over() {
        let mut trouble = Trouble::default();
        let failure = || Err::<(), _>(anyhow!("no")).context("stopped").unwrap_err();
        assert_eq!(trouble.news(&failure()).as_deref(), Some("stopped: no"));
        assert_eq!(trouble.news(&failure()), None);
        assert!(trouble.news(&anyhow!("another")).is_some());
        trouble.over();
        assert!(!trouble.is_told());
        assert!(trouble.news(&failure()).is_some());
    }
}
