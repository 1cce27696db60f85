//! A real Prometheus, which scrapes replicas and evaluates the alert rules every second. The rules are the project's own,
//! with seconds in the place of minutes.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::Value;

use crate::{
    Process, System, eventually,
    http::{free_address, get},
};

const CONFIG: &str = include_str!("../../docs/observability/prometheus.yml");
const RULES: &str = include_str!("../../docs/observability/alerts.yml");

/// What the rules say, and what they say here: seconds in the place of minutes, and bounds that a test can exceed.
const FOR_TESTS: [(&str, &str); 9] = [
    ("[1m]", "[3s]"),
    ("[2m:15s]", "[5s:1s]"),
    ("[5m]", "[10s]"),
    ("[15m]", "[30s]"),
    ("[6h]", "[30s]"),
    ("offset 1m", "offset 3s"),
    ("(watershed_view_lag_seconds) > 60", "(watershed_view_lag_seconds) > 4"),
    ("(watershed_view_lag_seconds) > 10", "(watershed_view_lag_seconds) > 3"),
    ("> 0.8 * process_max_fds", "> 300 + 0 * process_max_fds"),
];

/// The programs of Debian's package `prometheus`.
pub struct Programs {
    prometheus: PathBuf,
    promtool: PathBuf,
}

/// A server that is stopped when this is dropped.
pub struct Prometheus {
    address: SocketAddr,
    directory: PathBuf,
    process: Process,
}

/// The addresses at which replicas show their figures, each with the name of its service.
pub type Targets<'a> = &'a [(&'a str, SocketAddr)];

impl Programs {
    /// Finds the programs; `None` if they are not installed, which is said.
    ///
    /// # Panics
    /// If they are not installed where all tests must run.
    pub fn find() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let find = |name: &str| std::env::split_paths(&path).map(|it| it.join(name)).find(|it| it.is_file());
        let found = find("prometheus").zip(find("promtool"));
        if found.is_none() {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "the package `prometheus` is not installed");
            eprintln!("skipped: the package `prometheus` is not installed");
        }
        found.map(|(prometheus, promtool)| Self { prometheus, promtool })
    }

    /// Runs promtool, in the directory of the rules.
    ///
    /// # Panics
    /// If it finds a fault.
    pub fn promtool(&self, arguments: &[&str]) {
        let rules = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/observability");
        let output = Command::new(&self.promtool).args(arguments).current_dir(rules).output().expect("promtool runs");
        let [out, err] = [output.stdout, output.stderr].map(|it| String::from_utf8_lossy(&it).into_owned());
        assert!(output.status.success(), "promtool {arguments:?}: {out}{err}");
    }
}

impl Prometheus {
    /// Starts a server, and waits until it has scraped every target.
    pub async fn start(programs: &Programs, system: &System, targets: Targets<'_>) -> Self {
        let directory = system.stack.directory().join(format!("{}-prometheus", system.prefix));
        fs::create_dir_all(&directory).expect("a directory can be made");
        fs::write(directory.join("alerts.yml"), rules()).expect("a file can be written");
        fs::write(directory.join("prometheus.yml"), config(targets)).expect("a file can be written");
        let address = free_address();
        let log = File::create(directory.join("log")).expect("a file can be made");
        let mut command = Command::new(&programs.prometheus);
        command
            .arg(format!("--web.listen-address={address}"))
            .arg(format!("--config.file={}", directory.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", directory.join("data").display()))
            .stderr(log);
        let process = Process::start(&mut command);
        let prometheus = Self { address, directory, process };
        prometheus.all_are_up(targets).await;
        prometheus
    }

    /// Scrapes these targets from now on.
    pub async fn scrape(&self, targets: Targets<'_>) {
        fs::write(self.directory.join("prometheus.yml"), config(targets)).expect("a file can be written");
        self.process.signal("HUP");
        self.all_are_up(targets).await;
    }

    async fn all_are_up(&self, targets: Targets<'_>) {
        eventually("Prometheus has scraped every target", async || {
            (self.value("count(up == 1)").await == Some(targets.len() as f64)).then_some(())
        })
        .await;
    }

    /// The elements of an expression's value: each has its labels and its sample.
    ///
    /// # Panics
    /// If the expression has a fault.
    pub async fn query(&self, expression: &str) -> Vec<Value> {
        let path = format!("/api/v1/query?query={}", percent_encode(expression));
        let Some(reply) = self.get(&path).await else { return vec![] };
        assert_eq!(reply["status"], "success", "{expression}: {reply}");
        match &reply["data"]["result"] {
            Value::Array(elements) if reply["data"]["resultType"] == "vector" => elements.clone(),
            scalar => vec![scalar.clone()],
        }
    }

    /// The value of an expression that has a single element.
    pub async fn value(&self, expression: &str) -> Option<f64> {
        let elements = self.query(expression).await;
        elements.first()?["value"][1].as_str()?.parse().ok()
    }

    /// The expressions of all alerts, as Prometheus writes them.
    pub async fn alerts(&self) -> Vec<String> {
        eventually("Prometheus has the rules", async || {
            let reply = self.get("/api/v1/rules?type=alert").await?;
            let groups = reply["data"]["groups"].as_array()?;
            let rules = groups.iter().flat_map(|group| group["rules"].as_array().into_iter().flatten());
            rules.map(|rule| rule["query"].as_str().map(str::to_owned)).collect::<Option<Vec<_>>>()
        })
        .await
    }

    /// Waits until each of these alerts has fired.
    pub async fn fires(&self, alerts: &[&str]) {
        for alert in alerts {
            eventually(&format!("{alert} fires"), async || self.active("firing").await?.contains(*alert).then_some(()))
                .await;
        }
    }

    /// Waits until each of these alerts has cleared.
    pub async fn clears(&self, alerts: &[&str]) {
        for alert in alerts {
            eventually(&format!("{alert} clears"), async || {
                (!self.active("firing").await?.contains(*alert)).then_some(())
            })
            .await;
        }
    }

    /// Waits until no alert fires, nor is about to.
    pub async fn is_quiet(&self) {
        eventually("no alert fires", async || {
            (self.active("firing").await?.is_empty() && self.active("pending").await?.is_empty()).then_some(())
        })
        .await;
    }

    async fn active(&self, state: &str) -> Option<BTreeSet<String>> {
        let reply = self.get("/api/v1/alerts").await?;
        let alerts = reply["data"]["alerts"].as_array()?;
        for alert in alerts {
            let texts = alert["annotations"].to_string();
            let is_whole = !texts.contains("error expanding") && !texts.contains("<no value>");
            assert!(is_whole, "an annotation cannot be shown: {texts}");
        }
        let alerts = alerts.iter().filter(|alert| alert["state"] == state);
        alerts.map(|alert| alert["labels"]["alertname"].as_str().map(str::to_owned)).collect()
    }

    async fn get(&self, path: &str) -> Option<Value> {
        let (_, body) = get(self.address, path).await.ok()?;
        serde_json::from_str(&body).ok()
    }
}

/// The rules as they are evaluated in tests.
fn rules() -> String {
    let rules = FOR_TESTS.iter().fold(RULES.to_owned(), |rules, (written, for_tests)| {
        assert!(rules.contains(written), "docs/observability/alerts.yml does not have {written} any more");
        rules.replace(written, for_tests)
    });
    let line = |line: &str| match line.trim_start().starts_with("for: ") {
        true => "        for: 2s\n".to_owned(),
        false => format!("{line}\n"),
    };
    rules.lines().map(line).collect()
}

/// The example of a configuration, with these targets.
fn config(targets: Targets<'_>) -> String {
    let mut service = "";
    let mut line = |line: &str| match line.trim().split_once(": ") {
        Some(("- job_name", job)) => {
            service = ["command", "projection", "query"].into_iter().find(|it| job.ends_with(it)).expect("a service");
            format!("{line}\n")
        }
        Some(("- targets", _)) => {
            let addresses = targets.iter().filter(|(of, _)| *of == service).map(|(_, address)| address.to_string());
            format!("      - targets: {:?}\n", Vec::from_iter(addresses))
        }
        Some((name @ ("scrape_interval" | "evaluation_interval"), _)) => format!("  {name}: 1s\n"),
        _ => format!("{line}\n"),
    };
    let mut config = String::new();
    CONFIG.lines().for_each(|it| config.push_str(&line(it)));
    config
}

fn percent_encode(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}
