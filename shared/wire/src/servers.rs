//! The URLs of NATS servers, separated by commas. The invariant: the user and password in a URL count, which the library
//! ignores, and no error quotes a URL, since it may hold a password.

use std::fmt;

use async_nats::{ConnectOptions, ServerAddr};
use percent_encoding::percent_decode_str;

/// The user and password by which a program authenticates.
#[derive(Clone)]
pub struct Credentials {
    pub user: String,
    pub password: String,
}

/// Shows the user, but not the password.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.user.fmt(f)
    }
}

/// The error for a text that is no list of server URLs.
#[derive(Debug, thiserror::Error)]
#[error("expected URLs of NATS servers, separated by commas, such as nats://user:password@host:4222")]
pub struct InvalidServers;

/// Reads comma-separated URLs, of which the first that has a user and password gives the credentials.
///
/// # Errors
/// If a URL cannot be read.
pub fn parse_servers(urls: &str) -> Result<(Vec<ServerAddr>, Option<Credentials>), InvalidServers> {
    let servers: Result<Vec<ServerAddr>, _> = urls.split(',').map(|url| url.trim().parse()).collect();
    let servers = servers.map_err(|_| InvalidServers)?;
    let credentials = servers.iter().find_map(|server| {
        Some(Credentials { user: decoded(server.username()?), password: decoded(server.password()?) })
    });
    Ok((servers, credentials))
}

/// Reads comma-separated URLs, and makes options with their user and password.
///
/// # Errors
/// If a URL cannot be read.
pub fn nats_options(urls: &str) -> Result<(ConnectOptions, Vec<ServerAddr>), InvalidServers> {
    let (servers, credentials) = parse_servers(urls)?;
    let options = match credentials {
        Some(Credentials { user, password }) => ConnectOptions::with_user_and_password(user, password),
        None => ConnectOptions::new(),
    };
    Ok((options, servers))
}

fn decoded(text: &str) -> String {
    percent_decode_str(text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_user_and_password_are_read_and_decoded() {
        let (servers, credentials) = parse_servers("nats://a:4222, nats://us%40er:p%2Fw@b,nats://c:d@e").unwrap();
        assert_eq!(servers.iter().map(ServerAddr::host).collect::<Vec<_>>(), ["a", "b", "e"]);
        let credentials = credentials.unwrap();
        assert_eq!((&*credentials.user, &*credentials.password), ("us@er", "p/w"));
        assert!(parse_servers("nats://a").unwrap().1.is_none());
        assert!(!format!("{credentials:?}").contains("p/w"));
    }

    #[test]
    fn an_error_does_not_quote_the_password() {
        let error = parse_servers("nats://user:secret@:x").unwrap_err();
        assert!(!format!("{error:?} {error}").contains("secret"));
    }
}
