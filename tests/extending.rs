//! `docs/extending.md` is true: what it adds, and what the skeletons are, is one file and one line each, and passes all
//! that is held against every aggregate and every view; what is forgotten is noticed, and named. All of it happens in a
//! copy of the project, which shares the dependencies that are built already.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const PAGE: &str = include_str!("../docs/extending.md");

const UNIT_TESTS: [&str; 5] = ["test", "--locked", "--offline", "-p", "domain"];

const FROZEN_EVENTS: &str = "shared/domain/src/frozen/events.jsonl";

/// What lies in the project's directory and is not part of it.
const OTHERS: [&str; 3] = [".git", ".stack", "target"];

#[test]
fn an_aggregate_and_a_view_are_one_file_and_one_line_each() {
    let copy = Project::copy();
    let mut blocks: BTreeMap<&str, String> = BTreeMap::new();
    for (title, code) in code_blocks(PAGE, "rust") {
        blocks.entry(title).or_default().push_str(code);
    }
    assert_eq!(blocks.len(), 4, "{:?}", blocks.keys());
    for (title, code) in &blocks {
        match title.strip_prefix("a line in ") {
            Some(list) => copy.add_line(list, code),
            None => copy.write(title, code),
        }
    }
    copy.succeeds("python3", &["scripts/new", "aggregate", "gift_card"]);
    copy.succeeds("python3", &["scripts/new", "view", "gift_cards", "gift_card"]);

    copy.succeeds("rustfmt", &["--edition", "2024", "--check", "shared/domain/src/lib.rs", "shared/views/src/lib.rs"]);
    copy.succeeds("cargo", &["clippy", "--locked", "--offline", "-p", "domain", "-p", "views", "--", "-D", "warnings"]);
    copy.succeeds("cargo", &["test", "--locked", "--offline", "-p", "domain", "-p", "views"]);
    let system = ["test", "--locked", "--offline", "-p", "tests", "--test", "system", "--"];
    let through_nats = ["every_sample_and", "every_filter_and_sort", "stands_in_the_tables", "discovered"];
    let told = copy.succeeds("cargo", &[&system[..], &through_nats[..]].concat());
    assert!(told.contains("4 passed"), "{told}");

    let review = "shared/domain/src/review.rs";
    let aggregate = &blocks[review];
    for (forgotten, of_it, named) in [
        ("aggregates: vec![*product, *user],", "aggregates: vec![*product],", "`needs` of the command must name all"),
        (r#"        Sample::accepted("revise""#, r#"        Sample::accepted("write""#, "add one of `revise`"),
        (
            r#"("already_reviewed", "the user has a review"#,
            r#"("reviewed", "the user has a review"#,
            "`already_reviewed`, which is not documented: add it to REJECTIONS",
        ),
        ("claims: vec![authorship(*product, *user)],", "", "`needs` of the command must name it"),
    ] {
        assert!(aggregate.contains(forgotten), "{forgotten}");
        copy.write(review, &aggregate.replace(forgotten, of_it));
        let told = copy.fails("cargo", &UNIT_TESTS);
        assert!(told.contains(named), "{forgotten}: {named:?} is not said\n{told}");
    }
    copy.write(review, aggregate);

    let ratings = "shared/views/src/ratings.rs";
    let view = &blocks[ratings];
    for (forgotten, of_it, named) in [
        (r#".over(&["average", "_id"])"#, r#".over(&["stars_on_average", "_id"])"#, "has a string or a whole number"),
        ("vec![by_average()]", "vec![]", "which `indexes` of the view does not have"),
        (r#"rename = "_id", alias = "id""#, r#"rename = "_id""#, r#"`_id` needs `alias = "id"`"#),
        (r#"&[r#"{"order":"desc"}"#, r#"&[r#"{}"#, "add one with the field `order`"),
    ] {
        assert!(view.contains(forgotten), "{forgotten}");
        copy.write(ratings, &view.replace(forgotten, of_it));
        let told = copy.fails("cargo", &["test", "--locked", "--offline", "-p", "views"]);
        assert!(told.contains(named), "{forgotten}: {named:?} is not said\n{told}");
    }

    change_an_event_and_a_state(&copy, review);
}

/// What the page changes afterwards, and what is forgotten in doing so.
fn change_an_event_and_a_state(copy: &Project, review: &str) {
    for (title, lines) in code_blocks(PAGE, "json") {
        copy.append(title.strip_prefix("a line in ").unwrap(), lines);
    }
    copy.freeze();
    let changes = code_blocks(PAGE, "diff");
    assert!(changes.len() > 5, "{changes:?}");
    let (form, others): (Vec<_>, Vec<_>) = changes.into_iter().partition(|(_, change)| change.contains("const FORM"));
    others.iter().for_each(|(path, change)| copy.change(path, change));
    let told = copy.fails("cargo", &UNIT_TESTS);
    assert!(told.contains("the state of review has changed: raise its FORM"), "{told}");
    form.iter().for_each(|(path, change)| copy.change(path, change));
    copy.freeze();
    let frozen = copy.read(FROZEN_EVENTS);
    let of_schema_1 = r#","review","written",1,"#;
    let others: String = frozen.lines().filter(|it| !it.contains(of_schema_1)).map(|it| format!("{it}\n")).collect();
    copy.write(FROZEN_EVENTS, &others);
    let told = copy.fails("cargo", &UNIT_TESTS);
    assert!(told.contains("frozen/events.jsonl lacks schema 1 of review.written, and what is stored has it"), "{told}");
    copy.write(FROZEN_EVENTS, &frozen);
    let step = r#"given_stored("review.written", 1,"#;
    copy.write(review, &copy.read(review).replace(step, r#"given_stored("review.written", 2,"#));
    let told = copy.fails("cargo", &UNIT_TESTS);
    assert!(told.contains("schema 1 of `written` has no unit test"), "{told}");
}

/// The titles of the page's blocks of code in this language, and what stands in them.
fn code_blocks<'a>(page: &'a str, language: &str) -> Vec<(&'a str, &'a str)> {
    let fence = format!("\n```{language} title=\"");
    page.split(&*fence)
        .skip(1)
        .map(|block| {
            let (title, rest) = block.split_once("\"\n").expect("the title ends");
            let (code, _) = rest.split_once("```").expect("the block ends");
            (title, code)
        })
        .collect()
}

/// A copy of the project with a target directory of its own.
struct Project {
    root: PathBuf,
    target: PathBuf,
}

impl Project {
    fn copy() -> Self {
        let original = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the project");
        // .../target/debug/deps/extending-0123456789abcdef
        let own = std::env::current_exe().expect("the program's own path");
        let profile = own.ancestors().nth(2).expect("cargo has built it");
        let root = profile.with_file_name("extending");
        let target = root.join("target");
        synchronize(original, &root, &OTHERS);
        // The servers' programs, if they are there: the copy need not fetch them again.
        let servers = root.join(".stack/servers");
        if !servers.exists() {
            fs::create_dir_all(root.join(".stack")).unwrap();
            let theirs = original.join(".stack/servers");
            fs::create_dir_all(&theirs).unwrap();
            std::os::unix::fs::symlink(theirs, servers).unwrap();
        }
        for built in ["deps", "build", ".fingerprint"] {
            copy_built(&profile.join(built), &target.join("debug").join(built));
        }
        Self { root, target }
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(self.root.join(path), text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.root.join(path)).unwrap()
    }

    fn append(&self, path: &str, lines: &str) {
        self.write(path, &(self.read(path) + lines));
    }

    /// Changes the file as the diff says.
    fn change(&self, path: &str, diff: &str) {
        let side = |other: char| -> String {
            let lines = diff.lines().filter(|line| !line.starts_with(other));
            lines.map(|line| format!("{}\n", line.get(1..).unwrap_or_default())).collect()
        };
        let (before, after, text) = (side('+'), side('-'), self.read(path));
        assert_eq!(text.matches(&before).count(), 1, "{path}:\n{before}");
        self.write(path, &text.replacen(&before, &after, 1));
    }

    /// Adds to the frozen files what the tests say is missing.
    fn freeze(&self) {
        let told = self.fails("cargo", &UNIT_TESTS);
        let (events, states) = told
            .split_once("add these lines to frozen/events.jsonl:\n")
            .and_then(|(_, lines)| lines.split_once("and these to frozen/states.jsonl:\n"))
            .unwrap_or_else(|| panic!("nothing is said to be missing\n{told}"));
        let lines = |text: &str| -> String {
            text.lines().take_while(|line| line.starts_with("[\"")).map(|line| format!("{line}\n")).collect()
        };
        self.append(FROZEN_EVENTS, &lines(events));
        self.append("shared/domain/src/frozen/states.jsonl", &lines(states));
        self.succeeds("cargo", &UNIT_TESTS);
    }

    /// Adds a line to the list in the file.
    fn add_line(&self, path: &str, line: &str) {
        let text = self.read(path);
        let (list, after) = text.split_once(")\n}\n").expect("the list ends");
        self.write(path, &format!("{list})\n{line}}}\n{after}"));
    }

    fn succeeds(&self, program: &str, arguments: &[&str]) -> String {
        let (success, told) = self.run(program, arguments);
        assert!(success, "{program} {arguments:?}\n{told}");
        told
    }

    fn fails(&self, program: &str, arguments: &[&str]) -> String {
        let (success, told) = self.run(program, arguments);
        assert!(!success, "{program} {arguments:?}\n{told}");
        told
    }

    fn run(&self, program: &str, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(program);
        // What cargo says to this test of this crate would be news to build scripts, and build them again.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("CARGO_") && name != "CARGO_HOME") {
            command.env_remove(name);
        }
        command.args(arguments).current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        let output = command.output().unwrap_or_else(|error| panic!("{program}: {error}"));
        let told = [output.stdout, output.stderr].map(|told| String::from_utf8_lossy(&told).into_owned()).concat();
        (output.status.success(), told)
    }
}

/// Makes the second a copy of the first, but for what has one of these names. What is the same already is not touched,
/// so that it is not built again.
fn synchronize(from: &Path, to: &Path, but: &[&str]) {
    if from.is_file() {
        let text = fs::read(from).unwrap();
        if fs::read(to).ok().as_ref() != Some(&text) {
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::write(to, text).unwrap();
            fs::set_permissions(to, fs::metadata(from).unwrap().permissions()).unwrap();
        }
        return;
    }
    fs::create_dir_all(to).unwrap();
    let names = |directory: &Path| -> Vec<_> {
        let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
        entries.filter(|name| !but.iter().any(|but| name == but)).collect()
    };
    let wanted = names(from);
    for name in names(to).into_iter().filter(|name| !wanted.contains(name)) {
        // What an earlier run added, or what the project has no more.
        let left = to.join(name);
        if left.is_dir() { fs::remove_dir_all(left).unwrap() } else { fs::remove_file(left).unwrap() }
    }
    for name in wanted {
        synchronize(&from.join(&name), &to.join(&name), &["__pycache__"]);
    }
}

/// Copies every library and every record of the first directory into the second, where it is not there yet. Programs,
/// which have no extension and are large, are left out, except those of build scripts. Links would not do: cargo writes
/// some of these files in place. It compares times, so the copies keep them.
fn copy_built(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (entry, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).unwrap();
        if entry.is_dir() {
            copy_built(&entry, &to);
        } else if !to.exists() && (entry.extension().is_some() || !from.ends_with("deps")) {
            fs::copy(&entry, &to).unwrap();
            let modified = fs::metadata(&entry).and_then(|metadata| metadata.modified()).unwrap();
            fs::File::options().write(true).open(&to).and_then(|file| file.set_modified(modified)).unwrap();
        }
    }
}
