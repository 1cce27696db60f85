//! Private servers on free ports, started by `scripts/stack`. They stop when the process that started them has ended.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, OnceLock},
};

/// The project's directory.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the project").to_owned()
}

/// NATS, PostgreSQL and MongoDB, private to this run.
pub struct Stack {
    directory: PathBuf,
    urls: HashMap<String, String>,
}

impl Stack {
    /// The servers that all tests of this process share.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Stack>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::start("shared", &[]))))
    }

    /// Servers for a single test, which may stop them.
    pub fn private(name: &str) -> Arc<Self> {
        Arc::new(Self::start(name, &[]))
    }

    /// Servers for a measurement, with more memory for MongoDB. It is still less than MongoDB's default, which is half
    /// of the machine's memory.
    pub fn measured(name: &str) -> Arc<Self> {
        Arc::new(Self::start(name, &["--mongodb-cache-gb", "4"]))
    }

    /// The URL of a server, by the name of its variable in the stack's `env`, such as `NATS_QUERY_URL`.
    pub fn url(&self, name: &str) -> &str {
        &self.urls[name]
    }

    /// The directory of the servers' data, logs and process records.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Stops one server: `nats`, `postgres` or `mongodb`.
    pub fn stop(&self, server: &str) {
        script(&["down", server, "--dir"], &self.directory);
    }

    /// Kills one server with SIGKILL.
    ///
    /// # Panics
    /// If it does not run.
    pub fn kill(&self, server: &str) {
        let record = std::fs::read_to_string(self.directory.join("run").join(format!("{server}.json")));
        let record: serde_json::Value = serde_json::from_str(&record.expect("it runs")).expect("JSON");
        signal(&[record["pid"].to_string()], "KILL");
    }

    /// Starts it again on the same port, with the same data.
    pub fn resume(&self, server: &str) {
        script(&["up", server, "--test-databases", "--dir"], &self.directory);
    }

    /// Suspends all processes of PostgreSQL, as a hung disk or a paused machine would.
    pub fn freeze_postgres(&self) {
        signal(&self.postgres_processes(), "STOP");
    }

    /// Resumes the processes of PostgreSQL.
    pub fn thaw_postgres(&self) {
        signal(&self.postgres_processes(), "CONT");
    }

    /// The process identifiers of PostgreSQL, its main process first.
    fn postgres_processes(&self) -> Vec<String> {
        let find = Command::new("find").arg(&self.directory).args(["-name", "postmaster.pid"]).output().expect("find");
        let file = String::from_utf8(find.stdout).expect("a path");
        let first = std::fs::read_to_string(file.trim()).expect("PostgreSQL runs");
        let first = first.lines().next().expect("a process id").trim().to_owned();
        let others = Command::new("pgrep").args(["-P", &first]).output().expect("pgrep");
        let others = String::from_utf8(others.stdout).expect("process ids");
        [first].into_iter().chain(others.lines().map(str::to_owned)).collect()
    }

    fn start(name: &str, options: &[&str]) -> Self {
        let process = std::process::id();
        let directory = std::env::temp_dir().join(format!("watershed-test-{process}-{name}"));
        let while_pid = process.to_string();
        let up = ["up", "--free-ports", "--test-databases", "--while-pid", &while_pid];
        script(&[&up, options, &["--dir"]].concat(), &directory);
        let env = std::fs::read_to_string(directory.join("env")).expect("the stack has written its env");
        let urls = env.lines().filter_map(|line| line.strip_prefix("export ")?.split_once('='));
        let urls = urls.map(|(name, url)| (name.to_owned(), url.trim_matches('\'').to_owned())).collect();
        Self { directory, urls }
    }
}

impl Drop for Stack {
    /// The shared stack is never dropped. It stops with the process.
    fn drop(&mut self) {
        script(&["down", "--wipe", "--dir"], &self.directory);
    }
}

fn signal(processes: &[String], name: &str) {
    // One of them may have ended by itself.
    Command::new("kill").arg(format!("-{name}")).args(processes).output().expect("kill can be run");
}

fn script(arguments: &[&str], directory: &Path) {
    let output = Command::new(root().join("scripts/stack")).args(arguments).arg(directory).output();
    let output = output.expect("scripts/stack can be run");
    assert!(
        output.status.success(),
        "scripts/stack {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
