//! Which installation is meant, and the connection to its NATS. Invariant: no password is ever shown.

use std::{collections::HashMap, env, fs, path::PathBuf};

use client::{Client, ConnectError, ConnectOptions};
use wire::{Prefix, Subjects};

use crate::Failure;

const LOCAL: &str = "nats://127.0.0.1:4222";

#[derive(clap::Args)]
#[command(next_help_heading = "Installation")]
pub struct Installation {
    /// NATS, with user and password [env: NATS_URL, NATS_OPERATOR_URL]
    #[arg(long, global = true, value_name = "URL")]
    nats_url: Option<String>,
    /// A context of the nats CLI, instead of a URL
    #[arg(long, global = true, value_name = "NAME", conflicts_with = "nats_url")]
    context: Option<String>,
    /// A .creds file, with which to log in
    #[arg(long, global = true, value_name = "FILE")]
    creds: Option<String>,
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

/// A connection to NATS.
pub struct Connection {
    pub client: Client,
    /// The name of the user, as far as it is known.
    user: Option<String>,
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

    fn options(&self, user: User) -> Result<ConnectOptions, Failure> {
        let mut options = match &self.context {
            Some(name) => ConnectOptions::context(Some(name)).map_err(|error| Failure::Usage(error.to_string()))?,
            None => {
                let environment = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
                let stack = || stack_env().map(|text| exports(&text)).unwrap_or_default();
                ConnectOptions::url(chosen_url(self.nats_url.as_deref(), user, environment, stack))
            }
        };
        if let Some(file) = &self.creds {
            options = options.credentials(file);
        }
        Ok(options.prefix(self.subject_prefix.clone()).name("watershed"))
    }
}

impl Connection {
    /// # Errors
    /// If the installation is not described as it must be, or NATS cannot be reached.
    pub async fn open(installation: &Installation, user: User) -> Result<Self, Failure> {
        let options = installation.options(user)?;
        let client = Client::connect(&options).await.map_err(|error| match error {
            ConnectError::Connection { .. } => Failure::Unanswered(error.to_string()),
            ConnectError::Context(_) | ConnectError::Servers(_) | ConnectError::File { .. } => {
                Failure::Usage(error.to_string())
            }
        })?;
        Ok(Self { client, user: options.user() })
    }

    /// Does what may not be permitted.
    ///
    /// # Errors
    /// If the server reports that something is not permitted before the work is done.
    pub async fn permitted<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        let done = self.client.permitted(work).await;
        done.map_err(|refusal| self.not_permitted(&refusal))
    }

    /// The failure of what the server does not permit, for this reason.
    pub fn not_permitted(&self, reason: &str) -> Failure {
        let user = self.user.as_ref().map(|user| format!(" {user:?}")).unwrap_or_default();
        Failure::Refused(format!("the NATS user{user} may not do this: {reason}"))
    }
}

/// Adds to a refusal who could do it: `what` is done as the operator.
pub fn name_operator(failure: Failure, what: &str) -> Failure {
    match failure {
        Failure::Refused(reason) => Failure::Refused(format!(
            "{reason}\n{what} as the NATS user \"operator\": set NATS_OPERATOR_URL, such as \
             nats://operator:PASSWORD@127.0.0.1:4222"
        )),
        other => other,
    }
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
