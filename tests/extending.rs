//! `docs/extending.md` is true: what it adds, and what the skeletons are, is one file and one line each, and passes all
//! that is held against every aggregate and every view; what is forgotten is noticed, and named. All of it happens in a
//! copy of the project, which shares the dependencies that are built already.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;

use tests::Project;

const PAGE: &str = include_str!("../docs/extending.md");

const UNIT_TESTS: [&str; 5] = ["test", "--locked", "--offline", "-p", "domain"];

const FROZEN_EVENTS: &str = "shared/domain/src/frozen/events.jsonl";

#[test]
fn an_aggregate_and_a_view_are_one_file_and_one_line_each() {
    let copy = Project::copy("extending");
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
    freeze(copy);
    let changes = code_blocks(PAGE, "diff");
    assert!(changes.len() > 5, "{changes:?}");
    let (form, others): (Vec<_>, Vec<_>) = changes.into_iter().partition(|(_, change)| change.contains("const FORM"));
    others.iter().for_each(|(path, change)| copy.change(path, change));
    let told = copy.fails("cargo", &UNIT_TESTS);
    assert!(told.contains("the state of review has changed: raise its FORM"), "{told}");
    form.iter().for_each(|(path, change)| copy.change(path, change));
    freeze(copy);
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

/// Adds to the frozen files what the tests say is missing.
fn freeze(copy: &Project) {
    let told = copy.fails("cargo", &UNIT_TESTS);
    let (events, states) = told
        .split_once("add these lines to frozen/events.jsonl:\n")
        .and_then(|(_, lines)| lines.split_once("and these to frozen/states.jsonl:\n"))
        .unwrap_or_else(|| panic!("nothing is said to be missing\n{told}"));
    let lines = |text: &str| -> String {
        text.lines().take_while(|line| line.starts_with("[\"")).map(|line| format!("{line}\n")).collect()
    };
    copy.append(FROZEN_EVENTS, &lines(events));
    copy.append("shared/domain/src/frozen/states.jsonl", &lines(states));
    copy.succeeds("cargo", &UNIT_TESTS);
}
