//! The pages are true: every example is answered as shown, in the order of the pages, and the tables of subjects, codes
//! and settings are complete.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use async_nats::{HeaderMap, Request};
use clap::CommandFactory;
use serde_json::Value;
use tests::System;

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
const README: &str = include_str!("../../README.md");
const REQUESTS: &str = include_str!("../../docs/requests.md");
const OPERATIONS: &str = include_str!("../../docs/operations.md");
const ALERTS: &str = include_str!("../../docs/observability/alerts.yml");
const ALERT_TESTS: &str = include_str!("../../docs/observability/alerts.test.yml");
/// `make run`, which shows a first command and a first query.
const RUN: &str = include_str!("../../scripts/run");

/// Where the log lines come from that an operator sees.
const LOGGING: [&str; 4] = ["services/command", "services/projection", "services/query", "shared/runtime"];

const MAX_README_LINES: usize = 120;

/// Directories that are not part of the project's pages.
const NO_PAGES: [&str; 3] = [".git", ".stack", "target"];

/// What somebody sees who types what `make run` shows, then the tour, then docs/requests.md, from top to bottom.
#[tokio::test(flavor = "multi_thread")]
async fn every_example_is_answered_as_shown_in_the_order_of_the_pages() {
    let (system, _replicas) = System::complete().await;
    let welcome = RUN.replace("{{", "{").replace("}}", "}");
    let (welcome, tour, page) = (typed(&welcome), typed(README), examples());
    assert!(welcome.len() >= 2 && tour.len() >= 3, "the pages show requests");
    for example in [welcome, tour, page].into_iter().flatten() {
        let reply = example.send(&system).await;
        example.check(&reply);
    }
}

/// The page may leave an aggregate or a view out, but shows it wholly if it shows anything of it.
#[test]
fn every_subject_and_every_code_stands_in_the_tables() {
    let shown: BTreeSet<String> = examples().into_iter().map(|example| example.subject).collect();
    let views = views::queries();
    let commands =
        domain::commands().map(|it| (("aggregate", it.aggregate), format!("cmd.{}.{}", it.aggregate, it.verb)));
    let queries = views.iter().map(|(view, it)| (("view", *view), format!("qry.{}.{}", it.noun, it.verb)));
    let subjects: Vec<_> = commands.chain(queries).collect();
    let owners: BTreeSet<_> =
        subjects.iter().filter(|(_, subject)| shown.contains(subject)).map(|(owner, _)| *owner).collect();
    for (owner, subject) in &subjects {
        assert!(shown.contains(subject) || !owners.contains(owner), "docs/requests.md: add an example of {subject}");
    }
    let unknown: Vec<_> = shown.iter().filter(|it| !subjects.iter().any(|(_, subject)| subject == *it)).collect();
    assert!(unknown.is_empty(), "docs/requests.md: no service answers {unknown:?}");

    let codes = documented_codes();
    // The kind is empty for the codes that all aggregates have.
    let rejections = domain::rejections()
        .map(|(kind, code, _)| (kind.is_empty() || owners.contains(&("aggregate", kind)), code.to_owned()));
    let known: Vec<_> = service_codes().into_iter().map(|code| (true, code)).chain(rejections).collect();
    for (is_demanded, code) in &known {
        assert!(codes.contains_key(code) || !is_demanded, "docs/requests.md: add the code `{code}`");
    }
    for (_, code, meaning) in domain::rejections() {
        let shown = codes.get(code).map_or(meaning, |shown| &**shown);
        assert_eq!(shown, meaning, "docs/requests.md and REJECTIONS of the aggregate: the meaning of `{code}`");
    }
    let unknown: Vec<_> = codes.keys().filter(|it| !known.iter().any(|(_, code)| code == *it)).collect();
    assert!(unknown.is_empty(), "docs/requests.md: no request is answered with {unknown:?}");
}

#[test]
fn every_setting_is_on_the_page_and_nothing_else() {
    let mut settings: BTreeMap<(String, String), BTreeSet<&str>> = BTreeMap::new();
    for (service, command) in [
        ("command", command_service::Config::command()),
        ("projection", projection_service::Config::command()),
        ("query", query_service::Config::command()),
    ] {
        for argument in command.get_arguments() {
            let Some(variable) = argument.get_env().and_then(|it| it.to_str()) else { continue };
            let default = argument.get_default_values().first().and_then(|it| it.to_str());
            let default = default.unwrap_or(if argument.is_required_set() { "required" } else { "none" });
            settings.entry((variable.to_owned(), default.to_owned())).or_default().insert(service);
        }
    }
    let expected: BTreeSet<_> = settings
        .into_iter()
        .map(|((variable, default), services)| {
            let services = if services.len() == 3 { "all".into() } else { Vec::from_iter(services).join(", ") };
            (variable, services, default)
        })
        .collect();
    let table = rows(OPERATIONS)
        .into_iter()
        .filter(|row| row.len() == 4 && row[0].starts_with('`') && !row[0].starts_with("`ops."));
    let text = |cell: &str| cell.trim_matches('`').to_owned();
    let shown: BTreeSet<_> = table.map(|row| (text(&row[0]), row[1].clone(), text(&row[2]))).collect();
    let missing: Vec<_> = expected.difference(&shown).collect();
    let unknown: Vec<_> = shown.difference(&expected).collect();
    assert!(
        missing.is_empty() && unknown.is_empty(),
        "docs/operations.md, table of settings (variable, services, default): missing {missing:?}, unknown {unknown:?}"
    );
}

#[test]
fn every_alert_has_its_paragraph_and_its_test_and_nothing_else_has() {
    let section = section(OPERATIONS, "## Alerts");
    let shown: BTreeSet<&str> = section.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    let alerts = alerts();
    let names: BTreeSet<&str> = alerts.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), alerts.len(), "an alert's name serves once");
    assert!(
        shown == names,
        "docs/operations.md, Alerts: missing {:?}, unknown {:?}",
        Vec::from_iter(names.difference(&shown)),
        Vec::from_iter(shown.difference(&names))
    );
    for (name, rule) in alerts {
        let runbook = format!("runbook: docs/operations.md#{}\n", name.to_lowercase());
        assert!(rule.contains(&runbook), "docs/observability/alerts.yml, {name}: it needs {runbook}");
        let is_severe = ["page", "ticket"].iter().any(|it| rule.contains(&format!("severity: {it}\n")));
        assert!(is_severe, "docs/observability/alerts.yml, {name}: it needs a severity, page or ticket");
        let firing = format!(r#"- labels: 'ALERTS{{alertname="{name}", alertstate="firing""#);
        assert!(ALERT_TESTS.contains(&firing), "docs/observability/alerts.test.yml: add a test in which {name} fires");
    }
}

#[test]
fn every_error_has_its_paragraph_and_every_paragraph_its_error() {
    let section = section(OPERATIONS, "## Errors").split_whitespace().collect::<Vec<_>>().join(" ");
    let labels = |mark: char| -> BTreeSet<String> {
        let (begin, end) = (format!("**{mark}"), format!("{mark}**"));
        let labels = section.split(&begin).skip(1).filter_map(|rest| rest.split_once(&end));
        labels.map(|(label, _)| label.to_owned()).collect()
    };
    for (what, shown, expected) in
        [("codes", labels('`'), service_codes()), ("log lines", labels('"'), log_lines(Path::new(ROOT)))]
    {
        let missing: Vec<_> = expected.difference(&shown).collect();
        let unknown: Vec<_> = shown.difference(&expected).collect();
        assert!(
            missing.is_empty() && unknown.is_empty(),
            "docs/operations.md, Errors, {what}: missing {missing:#?}, unknown {unknown:#?}"
        );
    }
}

/// The table has every operation, at the service that offers it.
#[tokio::test(flavor = "multi_thread")]
async fn every_operation_is_on_the_page_and_nothing_else() {
    let (system, _replicas) = System::complete().await;
    let mut offered = BTreeSet::new();
    for stats in system.all_stats().await {
        for endpoint in stats["endpoints"].as_array().unwrap() {
            let name = system.subjects.name(endpoint["subject"].as_str().unwrap());
            if name.starts_with("ops.") {
                offered.insert((name.to_owned(), stats["name"].as_str().unwrap().to_owned()));
            }
        }
    }
    let table = rows(OPERATIONS).into_iter().filter(|row| row.len() == 4 && row[0].starts_with("`ops."));
    let shown: BTreeSet<_> = table.clone().map(|row| (row[0].trim_matches('`').to_owned(), row[2].clone())).collect();
    assert_eq!(shown, offered, "docs/operations.md: the table of operations");
    let operator = system.operator().await;
    for row in table {
        let subject = system.subjects.named(row[0].trim_matches('`'));
        let request = row[1].trim_matches('`').to_owned();
        let reply = operator.request(subject, request.into()).await.unwrap();
        // Some need something that is not there in this system; but each is understood.
        assert!(matches!(wire::failure_status(&reply), None | Some(404 | 409)), "{row:?}: {reply:?}");
    }
}

#[test]
fn the_readme_is_short() {
    let lines = README.lines().count();
    assert!(lines <= MAX_README_LINES, "README.md has {lines} lines; move something to docs/");
}

#[test]
fn every_relative_link_leads_somewhere() {
    let pages = files(Path::new(ROOT), "md");
    assert!(pages.len() > 10, "{pages:?}");
    let mut broken = Vec::new();
    for page in &pages {
        for link in links(&fs::read_to_string(page).unwrap()) {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            let is_found = target.exists()
                && (anchor.is_empty() || anchors(&fs::read_to_string(&target).unwrap()).contains(anchor));
            if !is_found {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// A request as a page shows it, and what the page says of the reply.
struct Example {
    subject: String,
    request: String,
    headers: Vec<(String, String)>,
    reply_headers: Vec<(String, String)>,
    reply: Option<Value>,
}

struct Reply {
    headers: HeaderMap,
    body: Value,
}

impl Example {
    async fn send(&self, system: &System) -> Reply {
        let mut headers = HeaderMap::new();
        self.headers.iter().for_each(|(name, value)| headers.insert(name.as_str(), value.as_str()));
        // The views are behind for milliseconds, which pass while a person types.
        if self.subject.starts_with("qry.") && self.headers.is_empty() {
            headers.insert(wire::MIN_POSITION, system.head().await.to_string());
        }
        let request = Request::new().payload(self.request.clone().into()).headers(headers);
        let subject = format!("{}.{}", system.prefix, self.subject);
        let message = system.client.nats().send_request(subject, request).await.unwrap();
        let body = serde_json::from_slice(&message.payload).unwrap();
        Reply { headers: message.headers.unwrap_or_default(), body }
    }

    fn check(&self, Reply { headers, body }: &Reply) {
        let what = format!("{} {}", self.subject, self.request);
        for (name, value) in &self.reply_headers {
            let actual = headers.get(name.as_str()).map(|it| it.as_str());
            assert!(value == "…" || actual == Some(value), "{what}: {name}: {actual:?}");
        }
        let is_failure = self.reply_headers.iter().any(|(name, _)| name == "Nats-Service-Error-Code");
        assert_eq!(headers.get("Nats-Service-Error-Code").is_some(), is_failure, "{what}: {body}");
        if let Some(reply) = &self.reply {
            assert_matches(body, reply, &format!("{what}: {body}"));
        }
    }
}

/// The lines `nats request SUBJECT 'BODY' -H Name:Value` of a text, or with `watershed call`, each with the comments below
/// it: headers, and the body.
fn typed(text: &str) -> Vec<Example> {
    let mut examples: Vec<Example> = Vec::new();
    let mut is_below = false;
    for line in text.lines().map(str::trim) {
        let request = ["nats request ", "watershed call "].iter().find_map(|program| line.strip_prefix(program));
        if let Some(request) = request.filter(|it| it.contains('\'')) {
            let parts: Vec<&str> = request.split('\'').collect();
            let [subject, body, options] = parts[..] else { panic!("one quoted body: {line}") };
            let headers = options.split("-H ").skip(1).map(|it| split_header(it.trim())).collect();
            let (subject, request) = (subject.trim().to_owned(), body.to_owned());
            examples.push(Example { subject, request, headers, reply_headers: vec![], reply: None });
            is_below = true;
        } else if let Some(shown) = line.strip_prefix("# ").filter(|_| is_below) {
            let example = examples.last_mut().unwrap();
            match shown.starts_with('{') {
                true => example.reply = Some(expected(shown)),
                false => example.reply_headers.push(split_header(shown)),
            }
        } else {
            is_below = false;
        }
    }
    examples
}

fn split_header(text: &str) -> (String, String) {
    let (name, value) = text.split_once(':').unwrap_or_else(|| panic!("a header: {text}"));
    (name.to_owned(), value.trim().to_owned())
}

/// The examples in the tables of docs/requests.md.
fn examples() -> Vec<Example> {
    let is_example = |row: &Vec<String>| row[0].starts_with("`cmd.") || row[0].starts_with("`qry.");
    let cell = |cell: &str| cell.trim_matches('`').to_owned();
    rows(REQUESTS)
        .into_iter()
        .filter(is_example)
        .map(|row| Example {
            subject: cell(&row[0]),
            request: cell(&row[1]),
            headers: vec![],
            reply_headers: vec![],
            reply: Some(expected(&cell(&row[2]))),
        })
        .collect()
}

/// The codes in the table of failures, whose second column is a number, and their meanings.
fn documented_codes() -> BTreeMap<String, String> {
    let failures = rows(REQUESTS).into_iter().filter(|row| row.len() == 3 && row[1].parse::<u16>().is_ok());
    failures.map(|row| (row[0].trim_matches('`').to_owned(), row[2].clone())).collect()
}

/// The codes of the services' own failures, in addition to the domain's.
fn service_codes() -> BTreeSet<String> {
    let source = include_str!("../../shared/wire/src/failure.rs");
    let (_, codes) = source.split_once("pub fn as_str").unwrap();
    let (codes, _) = codes.split_once("pub fn status").unwrap();
    codes.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

fn rows(page: &str) -> Vec<Vec<String>> {
    let tables = page.lines().filter(|line| line.starts_with('|'));
    tables.map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// JSON in which `…` may stand for a value, or for further fields of an object.
fn expected(shown: &str) -> Value {
    let json = shown.replace(":…", r#":"…""#).replace(",…", r#","…":"…""#);
    serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {shown}"))
}

fn assert_matches(actual: &Value, expected: &Value, what: &str) {
    match (actual, expected) {
        (_, Value::String(any)) if any == "…" => {}
        (Value::Object(fields), Value::Object(wanted)) => {
            let missing: Vec<_> = wanted.keys().filter(|name| *name != "…" && !fields.contains_key(*name)).collect();
            let unknown: Vec<_> = fields.keys().filter(|name| !wanted.contains_key(*name)).collect();
            let is_whole = unknown.is_empty() || wanted.contains_key("…");
            assert!(missing.is_empty() && is_whole, "missing {missing:?}, not shown {unknown:?}: {what}");
            let both = fields.iter().filter_map(|(name, field)| Some((field, wanted.get(name)?)));
            both.for_each(|(field, wanted)| assert_matches(field, wanted, what));
        }
        (Value::Array(items), Value::Array(wanted)) => {
            assert_eq!(items.len(), wanted.len(), "{what}");
            items.iter().zip(wanted).for_each(|(item, wanted)| assert_matches(item, wanted, what));
        }
        _ => assert_eq!(actual, expected, "{what}"),
    }
}

/// The alerts by name, each with its rule.
fn alerts() -> Vec<(&'static str, &'static str)> {
    ALERTS.split("- alert: ").skip(1).map(|rule| rule.split_once('\n').unwrap()).collect()
}

/// The text below a heading of the second level, up to the next one.
fn section(page: &'static str, heading: &str) -> &'static str {
    let (_, rest) = page.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no {heading}"));
    rest.split_once("\n## ").map_or(rest, |(section, _)| section)
}

/// The texts of the errors and warnings that the services log.
fn log_lines(root: &Path) -> BTreeSet<String> {
    let sources = LOGGING.iter().flat_map(|directory| files(&root.join(directory).join("src"), "rs"));
    let sources: Vec<String> = sources.map(|path| fs::read_to_string(path).unwrap()).collect();
    let sources = sources.iter().filter_map(|source| source.split("#[cfg(test)]").next());
    let calls = sources.flat_map(|source| ["tracing::error!(", "tracing::warn!("].map(|it| source.split(it).skip(1)));
    calls.flatten().map(last_text).collect()
}

/// The last string in the arguments of a call, of which everything behind the opening parenthesis is given.
fn last_text(arguments: &str) -> String {
    let (mut depth, mut last) = (1, "");
    let mut rest = arguments;
    while depth > 0 {
        let at = rest.find(['(', ')', '"']).expect("the call ends");
        let (found, behind) = rest[at..].split_at(1);
        rest = behind;
        match found {
            "(" => depth += 1,
            ")" => depth -= 1,
            _ => (last, rest) = rest.split_once('"').expect("the text ends"),
        }
    }
    last.split("\\\n").map(str::trim_start).collect()
}

/// All files of the project with this extension.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let entries = entries.filter(|path| !NO_PAGES.iter().any(|name| path.ends_with(name)));
    entries
        .flat_map(|path| match path.is_dir() {
            true => files(&path, extension),
            false => Vec::from_iter(path.extension().is_some_and(|it| it == extension).then_some(path)),
        })
        .collect()
}

/// The targets of the links to files and headings.
fn links(page: &str) -> Vec<String> {
    let targets = without_code(page);
    let targets = targets.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0.to_owned()));
    targets.filter(|link| !link.contains("://") && !link.starts_with("mailto:")).collect()
}

/// The anchors that a forge makes of the headings.
fn anchors(page: &str) -> BTreeSet<String> {
    let page = without_code(page);
    let headings = page.lines().filter_map(|line| line.strip_prefix('#'));
    let is_kept = |c: &char| c.is_alphanumeric() || ['-', '_', ' '].contains(c);
    let anchor = |text: &str| text.to_lowercase().chars().filter(is_kept).collect::<String>().replace(' ', "-");
    headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

fn without_code(page: &str) -> String {
    page.split("\n```").step_by(2).collect::<Vec<_>>().join("\n")
}
