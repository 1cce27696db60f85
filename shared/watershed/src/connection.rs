//! Which installation is meant, and the connection to its NATS. Invariant: no password is ever shown.

use std::{collections::HashMap, env, fs, path::PathBuf};

use async_nats::{ConnectErrorKind, Event, ServerAddr, ServerError};

use tokio::sync::mpsc;
use wire::{Prefix, Subjects, nats_options};

use crate::Failure;

const LOCAL: &str = "nats://127.0.0.1:4222";

#[derive(clap::Args)]
#[command(next_help_heading = "Installation")]
pub struct Installation {
    /// NATS, with user and password [env: NATS_URL, NATS_OPERATOR_URL]
    #[arg(long, global = true, value_name = "URL")]
    nats_url: Option<String>,
    /// The token in front of every subject
    #[arg(long, global = true, env = "SUBJECT_PREFIX", hide_env_values = true, value_name = "TOKEN")]
    subject_prefix: Option<Prefix>,
    /// The JetStream stream with the events
    #[arg(long, global = true, env = "STREAM", hide_env_values = true, value_name = "NAME", default_value = "EVENTS")]
    pub stream: String,
}

/// The NATS user whose rights an operation needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum User {
    Client,
    Operator,
}

/// A connection to NATS, and what the server refuses on it.
pub struct Connection {
    pub client: async_nats::Client,
    /// The name of the user; empty if there is none.
    user: String,
    refusals: mpsc::UnboundedReceiver<String>,
}

impl Installation {
    /// All subjects of the installation.
    pub fn subjects(&self) -> Subjects {
        Subjects::new(self.subject_prefix.as_ref())
    }

    /// The prefix; empty if there is none.
    pub fn prefix(&self) -> String {
        self.subject_prefix.as_ref().map(ToString::to_string).unwrap_or_default()
    }

    /// The subject with the prefix. NATS's own subjects, such as `$SRV.PING`, have none.
    pub fn subject(&self, subject: &str) -> String {
        match &self.subject_prefix {
            Some(prefix) if !subject.starts_with('$') => format!("{prefix}.{subject}"),
            _ => subject.to_owned(),
        }
    }

    fn url(&self, user: User) -> String {
        let environment = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
        let stack = || stack_env().map(|text| exports(&text)).unwrap_or_default();
        chosen_url(self.nats_url.as_deref(), user, environment, stack)
    }
}

impl Connection {
    /// # Errors
    /// If the URL cannot be read, or NATS cannot be reached.
    pub async fn open(installation: &Installation, user: User) -> Result<Self, Failure> {
        // The errors of the libraries may quote the URL, and with it the password.
        let read = nats_options(&installation.url(user));
        let (options, servers) = read.map_err(|_| Failure::Usage("the URL of NATS cannot be read".to_owned()))?;
        let user = servers.iter().find_map(|server| server.username()).unwrap_or_default().to_owned();
        let (refused, refusals) = mpsc::unbounded_channel();
        let options = options.name("watershed").event_callback(move |event| {
            let refused = refused.clone();
            async move {
                if let Event::ServerError(ServerError::Other(error)) = event
                    && error.to_lowercase().contains("permissions violation")
                {
                    // Nobody listens any more when the operation has ended.
                    let _ = refused.send(error);
                }
            }
        });
        let addresses: Vec<String> = servers.iter().map(address).collect();
        let client = options.connect(servers).await.map_err(|error| {
            let reason = match error.kind() {
                ConnectErrorKind::AuthorizationViolation => "the user or the password is wrong".to_owned(),
                ConnectErrorKind::Io => {
                    std::error::Error::source(&error).map_or("IO error".into(), ToString::to_string)
                }
                kind => kind.to_string(),
            };
            Failure::Unanswered(format!("cannot connect to NATS at {}: {reason}", addresses.join(",")))
        })?;
        Ok(Self { client, user, refusals })
    }

    /// Does what may not be permitted. NATS does not answer a request that its sender may not send; it reports the
    /// violation separately.
    ///
    /// # Errors
    /// If the server reports that something is not permitted before the work is done.
    pub async fn permitted<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Failure> {
        tokio::select! {
            done = work => Ok(done),
            Some(refusal) = self.refusals.recv() => {
                let user = if self.user.is_empty() { "who has not logged in".to_owned() } else { format!("{:?}", self.user) };
                Err(Failure::Refused(format!("the NATS user {user} may not do this: {refusal}")))
            }
        }
    }
}

/// The address without user and password.
fn address(server: &ServerAddr) -> String {
    format!("{}:{}", server.host(), server.port())
}

/// The URL of NATS: the one on the command line, or else the environment's, or else the local stack's.
fn chosen_url(
    given: Option<&str>,
    user: User,
    environment: impl Fn(&str) -> Option<String>,
    stack: impl FnOnce() -> HashMap<String, String>,
) -> String {
    if let Some(url) = given {
        return url.to_owned();
    }
    let names: &[&str] = match user {
        User::Client => &["NATS_URL"],
        User::Operator => &["NATS_OPERATOR_URL", "NATS_URL"],
    };
    if let Some(url) = names.iter().find_map(|name| environment(name)) {
        return url;
    }
    let stack = stack();
    names.iter().find_map(|name| stack.get(*name).cloned()).unwrap_or_else(|| LOCAL.to_owned())
}

/// The `env` of the local stack: of the one that `WATERSHED_STACK` names, or of the `.stack` that is nearest above.
fn stack_env() -> Option<String> {
    if let Some(stack) = env::var_os("WATERSHED_STACK").filter(|path| !path.is_empty()) {
        return fs::read_to_string(PathBuf::from(stack).join("env")).ok();
    }
    let here = env::current_dir().ok()?;
    here.ancestors().find_map(|directory| fs::read_to_string(directory.join(".stack/env")).ok())
}

/// The variables that lines such as `export NATS_URL='nats://…'` set.
fn exports(text: &str) -> HashMap<String, String> {
    let lines = text.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
    lines.map(|(name, value)| (name.to_owned(), value.trim_matches('\'').to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_is_the_given_one_or_the_environment_s_or_the_stack_s() {
        let stack =
            "# Made by scripts/stack\nexport NATS_URL='nats://c:s1@h:1'\nexport NATS_OPERATOR_URL='nats://o:s2@h:1'\n";
        let chosen = |given, user, environment: &[(&str, &str)], stack: &str| {
            let environment: HashMap<&str, &str> = environment.iter().copied().collect();
            chosen_url(given, user, |name| environment.get(name).map(|it| (*it).to_owned()), || exports(stack))
        };
        let both = [("NATS_URL", "nats://env"), ("NATS_OPERATOR_URL", "nats://env-operator")];
        assert_eq!(chosen(Some("nats://given"), User::Operator, &both, stack), "nats://given");
        assert_eq!(chosen(None, User::Client, &both, stack), "nats://env");
        assert_eq!(chosen(None, User::Operator, &both, stack), "nats://env-operator");
        assert_eq!(chosen(None, User::Operator, &both[..1], stack), "nats://env", "not of another installation");
        assert_eq!(chosen(None, User::Client, &[], stack), "nats://c:s1@h:1");
        assert_eq!(chosen(None, User::Operator, &[], stack), "nats://o:s2@h:1");
        assert_eq!(chosen(None, User::Operator, &[], ""), LOCAL);
    }
}
