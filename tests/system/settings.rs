//! Settings: an empty variable counts as not set, passwords come from files, and docker-compose.yml passes on every
//! setting.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Output, Stdio},
};

use clap::CommandFactory;
use client::Error;
use serde_json::json;
use tests::{Process, System, program};
use uuid::Uuid;

const COMPOSE: &str = include_str!("../../docker-compose.yml");
const SECRETS: &str = include_str!("../../docker-compose.secrets.yml");

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_variable_counts_as_not_set() {
    let system = System::new().await;
    let mut migrate = program("command");
    migrate.arg("migrate");
    for variable in variables(&command_service::Config::command()).iter().map(String::as_str).chain(["RUST_LOG"]) {
        migrate.env(variable, "");
    }
    let done = migrate.env("POSTGRES_URL", system.postgres_url()).output().unwrap();
    assert!(done.status.success(), "{done:?}");

    // With an empty RUST_LOG, a service logs more than errors.
    let mut query = program("query");
    for variable in variables(&query_service::Config::command()) {
        query.env(variable, "");
    }
    let query = query.env("RUST_LOG", "").env("NATS_URL", system.stack.url("NATS_QUERY_URL"));
    let query = query.env("MONGODB_URL", system.stack.url("MONGODB_QUERY_URL")).stdout(Stdio::piped()).spawn().unwrap();
    let output = first_line(query);
    assert!(output.contains("INFO"), "{output}");
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_come_from_files() {
    let system = System::new().await;
    let nats = Secret::of(system.stack.url("NATS_QUERY_URL"));
    let mongodb = Secret::of(system.stack.url("MONGODB_QUERY_URL"));
    let mut query = program("query");
    query.env("NATS_URL", &nats.url).env("NATS_PASSWORD_FILE", &nats.file);
    query.env("MONGODB_URL", &mongodb.url).env("MONGODB_PASSWORD_FILE", &mongodb.file);
    query.env("SUBJECT_PREFIX", &system.prefix).env("MONGODB_DATABASE", &system.prefix);
    let _projection = system.projection().await;
    let _query = Process::start(query.env("RUST_LOG", "warn"));
    let nobody = json!({"id": Uuid::now_v7()});
    tests::eventually("a query is answered", async || {
        matches!(system.ask("qry.user.get", nobody.clone(), &[]).await, Err(Error::NotFound(_))).then_some(())
    })
    .await;

    let postgres = Secret::of(&system.postgres_url());
    let migrated = migrate(&postgres);
    assert!(migrated.status.success(), "{migrated:?}");
}

#[test]
fn a_file_without_a_password_is_named_but_not_shown() {
    let secret = Secret::of("postgres://watershed:secret@127.0.0.1:1/watershed");
    for content in [None, Some("\n")] {
        match content {
            Some(content) => std::fs::write(&secret.file, content).unwrap(),
            None => std::fs::remove_file(&secret.file).unwrap(),
        }
        let refused = migrate(&secret);
        let output = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(2), "{output}");
        assert!(
            output.contains(secret.file.to_str().unwrap()) && output.contains("--postgres-password-file"),
            "{output}"
        );
        assert!(!output.contains("127.0.0.1"), "{output}");
    }
    std::fs::write(&secret.file, "secret").unwrap();
    let refused = migrate(&Secret { url: "postgres://127.0.0.1:1/watershed".to_owned(), file: secret.file.clone() });
    let output = String::from_utf8(refused.stderr).unwrap();
    assert!(
        output.contains("POSTGRES_URL") && output.contains("names no user") && !output.contains("secret\n"),
        "{output}"
    );
}

#[test]
fn docker_compose_passes_on_every_setting() {
    let services = [
        ("command", command_service::Config::command()),
        ("projection", projection_service::Config::command()),
        ("query", query_service::Config::command()),
    ];
    for (name, settings) in services {
        let own = section(COMPOSE, &format!("  {name}:"));
        let shared = section(COMPOSE, "x-settings: &settings");
        assert!(own.contains("<<: *settings"));
        for variable in variables(&settings) {
            // Each replica creates its own name, and the image sets the path of the ready file.
            if ["REPLICA", "READY_FILE"].contains(&variable.as_str()) {
                continue;
            }
            let passed = if variable.ends_with("_FILE") {
                section(SECRETS, &format!("  {name}:")).contains(&format!("{variable}: /run/secrets/"))
            } else {
                own.contains(&format!("      {variable}:")) || shared.contains(&format!("  {variable}:"))
            };
            assert!(passed, "add {variable} to the environment of {name} in docker-compose.yml");
        }
    }
}

/// A URL with a wrong password, and a file with the right one.
struct Secret {
    url: String,
    file: PathBuf,
}

impl Secret {
    fn of(url: &str) -> Self {
        let (user, server) = url.split_once('@').unwrap();
        let (user, password) = user.rsplit_once(':').unwrap();
        let file = std::env::temp_dir().join(format!("watershed-secret-{}", Uuid::now_v7()));
        std::fs::write(&file, format!("{password}\n")).unwrap();
        Self { url: format!("{user}:wrong@{server}"), file }
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

fn migrate(secret: &Secret) -> Output {
    let mut migrate = program("command");
    migrate.arg("migrate").env("POSTGRES_URL", &secret.url).env("POSTGRES_PASSWORD_FILE", &secret.file);
    migrate.output().unwrap()
}

/// Reads the first line that the process logs, and ends the process.
fn first_line(mut process: Child) -> String {
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
    line
}

fn variables(settings: &clap::Command) -> Vec<String> {
    let variables: Vec<_> =
        settings.get_arguments().filter_map(|it| it.get_env()?.to_str().map(str::to_owned)).collect();
    assert!(variables.contains(&"NATS_URL".to_owned()));
    variables
}

/// The lines below this one that are indented more deeply.
fn section<'a>(text: &'a str, first: &str) -> &'a str {
    let (_, section) = text.split_once(&format!("\n{first}\n")).unwrap_or_else(|| panic!("no section {first}"));
    let indent = first.len() - first.trim_start().len();
    let ends = |line: &str| !line.trim().is_empty() && line.len() - line.trim_start().len() <= indent;
    let length = section.split_inclusive('\n').take_while(|line| !ends(line)).map(str::len).sum();
    &section[..length]
}
