//! Private servers on free ports, from `scripts/stack`; they go when the process that started them has ended.

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

/// NATS, PostgreSQL and MongoDB of this run's own.
pub struct Stack {
    directory: PathBuf,
    urls: HashMap<String, String>,
}

impl Stack {
    /// The servers that the tests of this process share.
    pub fn shared() -> Arc<Self> {
        static SHARED: OnceLock<Arc<Stack>> = OnceLock::new();
        Arc::clone(SHARED.get_or_init(|| Arc::new(Self::start("shared", &[]))))
    }

    /// Servers for one test alone, which may stop them.
    pub fn private(name: &str) -> Arc<Self> {
        Arc::new(Self::start(name, &[]))
    }

    /// The same with more memory for MongoDB: still less than it takes by itself, which is half of the machine's.
    pub fn measured(name: &str) -> Arc<Self> {
        Arc::new(Self::start(name, &["--mongodb-cache-gb", "4"]))
    }

    /// The URL of a server for a role, by the name of the variable in the stack's `env`.
    pub fn url(&self, name: &str) -> &str {
        &self.urls[name]
    }

    /// Where its data, logs and records of processes lie.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Stops one server: `nats`, `postgres` or `mongodb`.
    pub fn stop(&self, server: &str) {
        script(&["down", server, "--dir"], &self.directory);
    }

    /// Starts it again, where it was.
    pub fn resume(&self, server: &str) {
        script(&["up", server, "--test-databases", "--dir"], &self.directory);
    }

    /// Stops PostgreSQL as a hung disk or a paused machine does: all its processes are there, and none does anything.
    pub fn freeze_postgres(&self) {
        signal(&self.postgres_processes(), "STOP");
    }

    /// Lets it go on where it was.
    pub fn thaw_postgres(&self) {
        signal(&self.postgres_processes(), "CONT");
    }

    /// The first is the one that makes the others.
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
    /// The shared stack is never dropped: it goes with the process.
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
