//! The settings of a replica that all services have, and how settings are read. Invariant: an empty variable counts as
//! unset, and no password is ever shown.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::builder::{OsStr, Resettable};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use uuid::Uuid;

#[derive(Clone, clap::Args)]
pub struct ReplicaConfig {
    /// Name of this replica, unique among all replicas: letters, digits, `-` and `_` [default: generated at the start]
    #[arg(long = "replica", env = "REPLICA", value_parser = replica_name)]
    name: Option<String>,
    /// A file that exists while the service is ready
    #[arg(long, env = "READY_FILE")]
    pub ready_file: Option<PathBuf>,
    /// Address of an HTTP port for /metrics, /healthz and /readyz, such as 127.0.0.1:9400
    #[arg(long, env = "METRICS_ADDRESS")]
    pub metrics_address: Option<SocketAddr>,
    /// A collector of traces, which takes OTLP over HTTP, such as http://127.0.0.1:4318
    #[arg(long = "otel-exporter-otlp-endpoint", env = "OTEL_EXPORTER_OTLP_ENDPOINT", hide_env_values = true)]
    pub otlp_endpoint: Option<String>,
    /// Milliseconds that shutting down may take
    #[arg(long, env = "SHUTDOWN_MS", default_value_t = 10_000)]
    shutdown_ms: u64,
}

impl ReplicaConfig {
    /// The configured name, or else a new one at each call.
    pub fn name(&self) -> String {
        // A default of clap's would be the same for all replicas in one process.
        self.name.clone().unwrap_or_else(|| Uuid::now_v7().to_string())
    }

    /// Keeps the name that is generated if none is configured.
    pub fn keep_name(&mut self) {
        self.name = Some(self.name());
    }

    pub fn shutdown_deadline(&self) -> Duration {
        Duration::from_millis(self.shutdown_ms)
    }
}

/// Checks a name, which must be a token of a subject.
fn replica_name(text: &str) -> Result<String, String> {
    let is_token = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..=64).contains(&text.len()) && text.chars().all(is_token) {
        return Ok(text.to_owned());
    }
    Err("expected 1 to 64 letters, digits, '-' or '_'".to_owned())
}

/// A password from a file, as Docker and Kubernetes mount secrets.
#[derive(Clone)]
pub struct Password(String);

impl Password {
    /// Reads the file. Newlines at its end are not part of the password, as in the servers' images.
    ///
    /// # Errors
    /// If the file cannot be read or is empty.
    pub fn from_file(path: &str) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|error| format!("the file cannot be read: {error}"))?;
        match text.trim_end_matches('\n') {
            "" => Err("the file is empty, where a password is expected".to_owned()),
            password => Ok(Self(password.to_owned())),
        }
    }
}

/// Puts the password, if there is one, into the URL, or into the first of comma-separated URLs that names a user.
///
/// # Errors
/// If there is a password, but the URL names no user.
pub fn with_password(url: &str, password: Option<&Password>) -> anyhow::Result<String> {
    let Some(Password(password)) = password else {
        return Ok(url.to_owned());
    };
    // The error must not quote the URL, which may contain another password.
    let (before, behind) =
        around_password(url).context("a file with a password is given, but the URL names no user")?;
    Ok(format!("{before}:{}@{behind}", utf8_percent_encode(password, NON_ALPHANUMERIC)))
}

/// The parts of the URL before and after the first user's password, without the `:` and the `@` around it.
fn around_password(url: &str) -> Option<(&str, &str)> {
    let mut start = 0;
    for server in url.split_inclusive(',') {
        let authority = server.find("://").map_or(0, |scheme| scheme + 3);
        let end = server[authority..].find(['/', '?', '#']).map_or(server.len(), |length| authority + length);
        if let Some(at) = server[authority..end].rfind('@') {
            let login = &server[authority..authority + at];
            let user = login.find(':').unwrap_or(at);
            let named = user > 0;
            return named.then_some((&url[..start + authority + user], &url[start + authority + at + 1..]));
        }
        start += server.len();
    }
    None
}

/// Reads the settings from the command line and the environment; exits if they cannot be read.
pub fn settings<C: clap::Parser>() -> C {
    let mut command = C::command().mut_args(|setting| {
        let variable = setting.get_env().and_then(std::env::var_os);
        // Docker Compose, for one, passes on unset variables as empty ones.
        if variable.is_some_and(|value| value.is_empty()) { setting.env(Resettable::<OsStr>::Reset) } else { setting }
    });
    let mut matches = command.clone().get_matches();
    C::from_arg_matches_mut(&mut matches).unwrap_or_else(|error| error.format(&mut command).exit())
}

/// Parses a setting that must not be 0.
///
/// # Errors
/// If the text is not a whole number, or is 0.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("expected at least 1".to_owned()),
        Ok(number) => Ok(number),
        Err(_) => Err("expected a whole number".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;

    fn replaced(url: &str, password: &str) -> anyhow::Result<String> {
        with_password(url, Some(&Password(password.to_owned())))
    }

    #[test]
    fn a_password_replaces_the_one_in_the_url() {
        for (url, expected) in [
            ("nats://command:old@nats:4222", "nats://command:new@nats:4222"),
            ("nats://command@nats:4222", "nats://command:new@nats:4222"),
            ("nats://command:@nats:4222", "nats://command:new@nats:4222"),
            ("command:old@nats:4222", "command:new@nats:4222"),
            ("nats://a:4222,nats://command:old@b:4222,nats://c", "nats://a:4222,nats://command:new@b:4222,nats://c"),
            ("postgres://u:o%40l:d@h1:5432,h2:5433/d?x=a@b", "postgres://u:new@h1:5432,h2:5433/d?x=a@b"),
            ("mongodb://u:old@h1:1,h2:2/?authSource=admin", "mongodb://u:new@h1:1,h2:2/?authSource=admin"),
            ("mongodb+srv://u@h?authSource=admin", "mongodb+srv://u:new@h?authSource=admin"),
        ] {
            assert_eq!(replaced(url, "new").unwrap(), expected);
            assert_eq!(with_password(url, None).unwrap(), url);
        }
    }

    #[test]
    fn a_password_may_hold_anything() {
        let awkward = "p@ss/w:o?r#d %41,ü\\'\"\t";
        let url = replaced("postgres://u:old@localhost/d", awkward).unwrap();
        let (_, rest) = url.split_once("u:").unwrap();
        let (encoded, rest) = rest.split_once('@').unwrap();
        assert_eq!(percent_encoding::percent_decode_str(encoded).decode_utf8().unwrap(), awkward);
        assert_eq!(rest, "localhost/d");
        assert!(encoded.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'%'), "{encoded}");
    }

    #[test]
    fn a_password_requires_a_user() {
        for url in ["nats://nats:4222", "nats://:old@nats:4222", "postgres://localhost/d?x=a@b", "", "a,b"] {
            let error = format!("{:#}", replaced(url, "secret").unwrap_err());
            assert!(error.contains("names no user") && !error.contains("secret") && !error.contains("old"), "{error}");
        }
    }

    #[test]
    fn trailing_newlines_of_a_file_are_not_part_of_the_password() {
        let path = std::env::temp_dir().join(format!("watershed-password-{}", Uuid::now_v7()));
        let read = || Password::from_file(path.to_str().unwrap());
        for (content, expected) in [
            ("secret", Ok("secret")),
            ("secret\n", Ok("secret")),
            ("two words \n\n", Ok("two words ")),
            ("\nsecret", Ok("\nsecret")),
            ("", Err("is empty")),
            ("\n", Err("is empty")),
        ] {
            std::fs::write(&path, content).unwrap();
            match (read(), expected) {
                (Ok(Password(password)), Ok(expected)) => assert_eq!(password, expected),
                (Err(error), Err(expected)) => assert!(error.contains(expected), "{error}"),
                (read, _) => panic!("{content:?}: {:?}", read.map(|Password(password)| password)),
            }
        }
        std::fs::write(&path, [0xff]).unwrap();
        assert!(read().is_err_and(|error| error.contains("cannot be read")));
        std::fs::remove_file(&path).unwrap();
        assert!(read().is_err_and(|error| error.contains("cannot be read")));
    }
}
