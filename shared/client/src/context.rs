//! The contexts of the `nats` CLI, each a JSON file that says how to reach a server and as whom. The invariant: what a
//! context demands is done, or refused with a reason; it is never ignored, except for what concerns JetStream or the
//! CLI's own looks.

use std::{
    env, fs, io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// How to reach NATS, in the fields of the CLI's file. An empty field counts as absent.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub struct Context {
    pub url: String,
    pub user: String,
    pub password: String,
    pub token: String,
    /// A file with a JWT and its key.
    pub creds: String,
    /// A file with the seed of a key.
    pub nkey: String,
    pub inbox_prefix: String,
    /// A file with the certificates that sign the server's.
    pub ca: String,
    /// A file with the client's own certificate, and one with its key.
    pub cert: String,
    pub key: String,
    pub tls_first: bool,
    pub nsc: String,
    pub user_jwt: String,
    pub socks_proxy: String,
}

/// Why a context cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    #[error("no context is selected: `nats context select NAME` does so")]
    NoneSelected,
    #[error("{0:?} cannot be the name of a context")]
    Name(String),
    #[error("there is no directory of contexts: neither XDG_CONFIG_HOME nor HOME is set")]
    NoHome,
    #[error("cannot read the context {path}: {error}", path = path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("the context {path} is not valid JSON of the nats CLI: {error}", path = path.display())]
    Json { path: PathBuf, error: serde_json::Error },
    #[error("the context {path} has {field:?}, which is not supported", path = path.display())]
    Unsupported { path: PathBuf, field: &'static str },
}

impl Context {
    /// Reads the context with this name, or else the selected one.
    ///
    /// # Errors
    /// If there is none, or it cannot be read or followed.
    pub fn load(name: Option<&str>) -> Result<Self, ContextError> {
        Self::load_from(&directory().ok_or(ContextError::NoHome)?, name)
    }

    /// Reads from the directory `nats`, which holds `context.txt` and the contexts.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_from(directory: &Path, name: Option<&str>) -> Result<Self, ContextError> {
        let name = match name {
            Some(name) => name.to_owned(),
            None => fs::read_to_string(directory.join("context.txt")).unwrap_or_default().trim().to_owned(),
        };
        if name.is_empty() {
            return Err(ContextError::NoneSelected);
        }
        if name.contains(['/', '\\']) || name.contains("..") {
            return Err(ContextError::Name(name));
        }
        let path = directory.join("context").join(format!("{name}.json"));
        let json = match fs::read(&path) {
            Ok(json) => json,
            Err(error) => return Err(ContextError::File { path, error }),
        };
        let context: Self = match serde_json::from_slice(&json) {
            Ok(context) => context,
            Err(error) => return Err(ContextError::Json { path, error }),
        };
        let Self { nsc, user_jwt, socks_proxy, .. } = &context;
        for (field, value) in [("nsc", nsc), ("user_jwt", user_jwt), ("socks_proxy", socks_proxy)] {
            if !value.is_empty() {
                return Err(ContextError::Unsupported { path, field });
            }
        }
        Ok(context)
    }
}

/// `$XDG_CONFIG_HOME/nats`, or `~/.config/nats`.
fn directory() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config"))).map(|config| config.join("nats"))
}

/// The path of a file in a context, which may begin with `~/`.
pub fn path(text: &str) -> PathBuf {
    match (text.strip_prefix("~/"), env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        (Some(_) | None, _) => text.into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

    use uuid::Uuid;

    use super::*;

    /// A directory of contexts with these files, which is removed at the end.
    struct Directory(PathBuf);

    impl Directory {
        fn with(files: &[(&str, &str)]) -> Self {
            let directory = env::temp_dir().join(format!("watershed-contexts-{}", Uuid::now_v7()));
            fs::create_dir_all(directory.join("context")).unwrap();
            for (name, text) in files {
                fs::write(directory.join(name), text).unwrap();
            }
            Self(directory)
        }

        fn refusal(&self, name: Option<&str>) -> String {
            Context::load_from(&self.0, name).err().unwrap().to_string()
        }
    }

    impl Drop for Directory {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    /// As `nats context save` writes one.
    const SAVED: &str = r#"{
        "description": "the shop", "url": "nats://a:4222,nats://b:4222", "socks_proxy": "", "token": "",
        "user": "client", "password": "secret", "creds": "", "nkey": "", "cert": "", "key": "", "ca": "/etc/ca.pem",
        "nsc": "", "jetstream_domain": "", "jetstream_api_prefix": "", "jetstream_event_prefix": "",
        "inbox_prefix": "_INBOX_shop", "user_jwt": "", "color_scheme": "", "tls_first": false
    }"#;

    #[test]
    fn a_context_is_read_by_its_name_or_as_the_selected_one() {
        let directory = Directory::with(&[("context/shop.json", SAVED), ("context.txt", "shop\n")]);
        for name in [Some("shop"), None] {
            let context = Context::load_from(&directory.0, name).unwrap();
            assert_eq!((&*context.url, &*context.user), ("nats://a:4222,nats://b:4222", "client"));
            assert_eq!((&*context.password, &*context.ca), ("secret", "/etc/ca.pem"));
            assert_eq!((&*context.inbox_prefix, &*context.creds), ("_INBOX_shop", ""));
        }
    }

    #[test]
    fn what_is_missing_or_broken_is_named_without_a_secret() {
        let broken = SAVED.replace("\"client\"", "7");
        let directory =
            Directory::with(&[("context/broken.json", &*broken), ("context/nsc.json", r#"{"nsc":"nsc://x"}"#)]);
        assert!(directory.refusal(None).contains("no context is selected"));
        assert!(directory.refusal(Some("other")).contains("other.json"));
        assert!(directory.refusal(Some("../secrets")).contains("name of a context"));
        assert!(directory.refusal(Some("nsc")).contains("\"nsc\", which is not supported"));
        let refusal = directory.refusal(Some("broken"));
        assert!(refusal.contains("broken.json") && !refusal.contains("secret"), "{refusal}");
    }

    #[test]
    fn a_path_may_begin_at_home() {
        let home = PathBuf::from(env::var_os("HOME").unwrap());
        assert_eq!(path("~/nats/me.creds"), home.join("nats/me.creds"));
        assert_eq!(path("/etc/~/me.creds"), PathBuf::from("/etc/~/me.creds"));
    }
}
