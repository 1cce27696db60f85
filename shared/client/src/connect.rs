//! The connection: by URLs, credentials or a context of the `nats` CLI. The invariant: no error shows a password.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use async_nats::{ConnectErrorKind, Event, ServerAddr, ServerError};
use bytes::Bytes;
use domain::CommandRequest;
use serde_json::Value;
use tokio::sync::broadcast::{self, error::RecvError};
use views::QueryRequest;
use wire::{Accepted, InvalidServers, Prefix, Subjects};

use crate::{
    Request, Session, backoff,
    context::{Context, ContextError, path},
};

const DEFAULT_URL: &str = "nats://127.0.0.1:4222";
/// How long a request may take by default, with all retries.
const DEADLINE: Duration = Duration::from_secs(30);
/// Unread troubles; a request that has missed some counts the connection as lost.
const TROUBLES: usize = 64;

/// Where to connect to, and as whom.
#[derive(Clone, Default)]
pub struct ConnectOptions {
    context: Context,
    prefix: Option<Prefix>,
    name: Option<String>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error(transparent)]
    Context(#[from] ContextError),
    #[error(transparent)]
    Servers(#[from] InvalidServers),
    #[error("cannot use {path}: {error}", path = path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("cannot connect to NATS at {servers}: {reason}")]
    Connection { servers: String, reason: String },
}

impl ConnectOptions {
    /// Servers, comma-separated, the first with the user and password: `nats://user:password@host:port`.
    pub fn url(url: impl Into<String>) -> Self {
        Self { context: Context { url: url.into(), ..Context::default() }, ..Self::default() }
    }

    /// A context of the `nats` CLI, by its name, or the selected one.
    ///
    /// # Errors
    /// If there is no such context, or it has what this client does not support.
    pub fn context(name: Option<&str>) -> Result<Self, ConnectError> {
        Ok(Self { context: Context::load(name)?, ..Self::default() })
    }

    /// The same, from this directory instead of `~/.config/nats`.
    ///
    /// # Errors
    /// As [`Self::context`].
    pub fn context_in(directory: &Path, name: Option<&str>) -> Result<Self, ConnectError> {
        Ok(Self { context: Context::load_from(directory, name)?, ..Self::default() })
    }

    /// A `.creds` file, which holds a JWT and its key.
    #[must_use]
    pub fn credentials(mut self, file: impl Into<String>) -> Self {
        self.context.creds = file.into();
        self
    }

    /// The token in front of every subject.
    #[must_use]
    pub fn prefix(self, prefix: Option<Prefix>) -> Self {
        Self { prefix, ..self }
    }

    /// The name by which NATS lists the connection.
    #[must_use]
    pub fn name(self, name: impl Into<String>) -> Self {
        Self { name: Some(name.into()), ..self }
    }

    /// The name of the NATS user, if a URL or the context says it.
    pub fn user(&self) -> Option<String> {
        let Context { url, user, .. } = &self.context;
        let (_, servers) = wire::nats_options(url).ok()?;
        let named = Some(user.clone()).filter(|user| !user.is_empty());
        named.or_else(|| servers.iter().find_map(|server| server.username().map(str::to_owned)))
    }

    fn nats_options(&self) -> Result<(async_nats::ConnectOptions, Vec<ServerAddr>), ConnectError> {
        let Context { url, user, password, token, creds, nkey, inbox_prefix, ca, cert, key, tls_first, .. } =
            &self.context;
        let (mut options, servers) = wire::nats_options(if url.is_empty() { DEFAULT_URL } else { url })?;
        if !user.is_empty() {
            options = options.user_and_password(user.clone(), password.clone());
        }
        if !creds.is_empty() {
            options = options.credentials(&read(creds)?).map_err(|error| unusable(creds, error))?;
        }
        if !nkey.is_empty() {
            let text = read(nkey)?;
            // A seed of a user, alone or between decorations.
            let seed = text.lines().map(str::trim).find(|line| line.starts_with("SU"));
            let missing = || unusable(nkey, io::Error::other("it has no seed of a user"));
            options = options.nkey(seed.ok_or_else(missing)?.to_owned());
        }
        if !token.is_empty() {
            options = options.token(token.clone());
        }
        if !ca.is_empty() {
            options = options.add_root_certificates(path(ca));
        }
        if !cert.is_empty() {
            options = options.add_client_certificate(path(cert), path(key));
        }
        if *tls_first {
            options = options.tls_first();
        }
        if !inbox_prefix.is_empty() {
            options = options.custom_inbox_prefix(inbox_prefix);
        }
        Ok((options, servers))
    }
}

fn read(file: &str) -> Result<String, ConnectError> {
    fs::read_to_string(path(file)).map_err(|error| unusable(file, error))
}

fn unusable(file: &str, error: io::Error) -> ConnectError {
    ConnectError::File { path: path(file), error }
}

/// A connection to the services. It is cheap to clone; clones share the connection and the session.
#[derive(Clone)]
pub struct Client {
    nats: async_nats::Client,
    subjects: Subjects,
    pub(crate) troubles: broadcast::Sender<Trouble>,
    session: Session,
    pub(crate) deadline: Duration,
}

/// What the connection reports while requests wait for replies.
#[derive(Clone, Debug)]
pub enum Trouble {
    /// The connection was lost, and the replies that were under way with it.
    Lost,
    /// The server has refused something, in these words.
    Refused(String),
}

impl Client {
    /// Connects. A connection that is lost later is made again by itself.
    ///
    /// # Errors
    /// If the options cannot be used, or no server takes the connection.
    pub async fn connect(options: &ConnectOptions) -> Result<Self, ConnectError> {
        let (nats_options, servers) = options.nats_options()?;
        let addresses: Vec<_> = servers.iter().map(|server| format!("{}:{}", server.host(), server.port())).collect();
        let (troubles, _) = broadcast::channel(TROUBLES);
        let reported = troubles.clone();
        let nats_options = nats_options
            .name(options.name.as_deref().unwrap_or("watershed client"))
            .reconnect_delay_callback(backoff::delay)
            .event_callback(move |event| {
                let trouble = match event {
                    Event::Disconnected | Event::Closed => Some(Trouble::Lost),
                    Event::ServerError(ServerError::Other(reason)) => Some(Trouble::Refused(reason)),
                    Event::ServerError(error) => Some(Trouble::Refused(error.to_string())),
                    _ => None,
                };
                if let Some(trouble) = trouble {
                    // An error only says that no request waits.
                    let _ = reported.send(trouble);
                }
                std::future::ready(())
            });
        let connected = nats_options.connect(servers).await;
        let nats = connected
            .map_err(|error| ConnectError::Connection { servers: addresses.join(","), reason: reason(&error) })?;
        let subjects = Subjects::new(options.prefix.as_ref());
        Ok(Self { nats, subjects, troubles, session: Session::default(), deadline: DEADLINE })
    }

    /// Another limit for each request with all its retries. The default is 30 seconds.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// The same connection with another session: for another user, whose queries need not wait for the writes of this
    /// one.
    #[must_use]
    pub fn with_session(&self, session: Session) -> Self {
        Self { session, ..self.clone() }
    }

    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The connection itself.
    pub fn nats(&self) -> &async_nats::Client {
        &self.nats
    }

    /// Does over the connection what the NATS user may not be allowed to do. NATS does not answer what is forbidden, but
    /// reports it separately.
    ///
    /// # Errors
    /// The server's words, if it forbids anything before the work is done.
    pub async fn permitted<T>(&self, work: impl Future<Output = T>) -> Result<T, String> {
        let mut troubles = self.troubles.subscribe();
        let forbidden = async {
            loop {
                match troubles.recv().await {
                    Ok(Trouble::Refused(reason)) if reason.to_lowercase().contains("permissions violation") => {
                        return reason;
                    }
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => std::future::pending().await,
                }
            }
        };
        tokio::select! {
            done = work => Ok(done),
            reason = forbidden => Err(reason),
        }
    }

    pub fn subjects(&self) -> &Subjects {
        &self.subjects
    }

    /// A command, to be awaited.
    pub fn command<C: CommandRequest>(&self, command: &C) -> Request<'_, Accepted> {
        let body = command.to_json().map(|json| json.to_string().into());
        Request::new(self, self.subjects.command(C::AGGREGATE, C::VERB), body)
    }

    /// A query, to be awaited.
    pub fn query<Q: QueryRequest>(&self, query: &Q) -> Request<'_, Q::Reply> {
        let body = serde_json::to_vec(query).map(Bytes::from);
        Request::new(self, self.subjects.query(Q::NOUN, Q::VERB), body)
    }

    /// Any request, by the name of its subject, such as `cmd.order.create`, or by the subject.
    pub fn request(&self, name: &str, body: impl Into<Bytes>) -> Request<'_, Value> {
        Request::new(self, self.subjects.named(name), Ok(body.into()))
    }
}

/// The library's own text may quote the URL, and with it the password.
fn reason(error: &async_nats::ConnectError) -> String {
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation => "the user or the password is wrong".to_owned(),
        // The cause is the operating system's.
        ConnectErrorKind::Io => {
            std::error::Error::source(error).map_or_else(|| "it failed".into(), ToString::to_string)
        }
        kind => kind.to_string(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use super::*;

    #[tokio::test]
    async fn an_error_names_the_server_but_not_the_password() {
        let options = ConnectOptions::url("nats://client:secret@127.0.0.1:1");
        let error = Client::connect(&options).await.err().unwrap();
        let told = format!("{error} {error:?}");
        assert!(told.contains("127.0.0.1:1") && !told.contains("secret"), "{told}");
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_used_is_named() {
        let options = ConnectOptions::url(DEFAULT_URL).credentials("/nowhere/me.creds");
        let error = Client::connect(&options).await.err().unwrap().to_string();
        assert!(error.contains("/nowhere/me.creds"), "{error}");
    }
}
