//! The README's tables are true: every subject and every code stands there, and every example does what it says.

use std::collections::BTreeSet;

use serde_json::Value;
use tests::System;

const README: &str = include_str!("../../README.md");

#[tokio::test(flavor = "multi_thread")]
async fn every_example_is_answered_as_it_says() {
    let (system, _replicas) = System::complete().await;
    let (mut queries, mut commands): (Vec<_>, Vec<_>) =
        examples().into_iter().partition(|it| it.subject.starts_with("qry."));
    // The queries stand behind all commands on the page, but show what is there before things are deleted.
    let deletions = commands.split_off(8);
    for Example { subject, request, reply } in commands.into_iter().chain(queries.drain(..)).chain(deletions) {
        let (kind, name) = subject.split_once('.').unwrap();
        let answer = match kind {
            "cmd" => system.client.command(name, request.clone(), &[]).await.unwrap(),
            _ => system.read(name, request.clone(), 9).await,
        };
        assert_matches(&answer.data(), &reply, &format!("{subject} {request}"));
    }
}

#[test]
fn every_subject_and_every_code_stands_in_the_tables() {
    let subjects: BTreeSet<String> = examples().into_iter().map(|example| example.subject).collect();
    let commands = domain::commands().map(|it| format!("cmd.{}.{}", it.aggregate, it.verb));
    let queries = views::queries().into_iter().map(|(_, it)| format!("qry.{}.{}", it.noun, it.verb));
    let known: BTreeSet<String> = commands.chain(queries).collect();
    assert!(subjects.is_subset(&known));

    // Every code that the domain's sources give to a rejection, and every one of the wire's.
    let sources = [
        include_str!("../../shared/domain/src/user.rs"),
        include_str!("../../shared/domain/src/product.rs"),
        include_str!("../../shared/domain/src/order.rs"),
        include_str!("../../shared/domain/src/aggregates.rs"),
    ];
    let rejections = sources.iter().flat_map(|source| source.split("Rejection::").skip(1)).filter_map(|call| {
        let (constructor, arguments) = call.split_once('(')?;
        let made = ["not_found", "conflict", "refused"].contains(&constructor);
        let code = arguments.trim_start().strip_prefix('"')?.split('"').next()?;
        made.then(|| code.to_owned())
    });
    let wire = include_str!("../../shared/wire/src/failure.rs");
    let (_, codes) = wire.split_once("pub fn as_str").unwrap();
    let (codes, _) = codes.split_once("pub fn status").unwrap();
    let failures = codes.split('"').skip(1).step_by(2).map(str::to_owned);
    let known: BTreeSet<String> = rejections.chain(failures).filter(|code| code != "no_lines").collect();
    let documented = rows().into_iter().filter(|row| row.len() == 3 && row[1].parse::<u16>().is_ok());
    let documented: BTreeSet<String> = documented.map(|row| row[0].trim_matches('`').to_owned()).collect();
    assert_eq!(documented, known);
}

struct Example {
    subject: String,
    request: Value,
    reply: Value,
}

fn examples() -> Vec<Example> {
    let json =
        |cell: &str| serde_json::from_str(cell.trim_matches('`')).unwrap_or_else(|error| panic!("{error}: {cell}"));
    rows()
        .into_iter()
        .filter(|row| row[0].starts_with("`cmd.") || row[0].starts_with("`qry."))
        .map(|row| Example {
            subject: row[0].trim_matches('`').to_owned(),
            request: json(&row[1]),
            reply: json(&row[2]),
        })
        .collect()
}

fn rows() -> Vec<Vec<String>> {
    let tables = README.lines().filter(|line| line.starts_with('|'));
    tables.map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect()).collect()
}

/// In the expected value, `…` stands for any text.
fn assert_matches(actual: &Value, expected: &Value, what: &str) {
    match (actual, expected) {
        (Value::Object(fields), Value::Object(wanted)) => {
            assert_eq!(fields.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{what}: {actual}");
            fields.iter().for_each(|(name, field)| assert_matches(field, &wanted[name], what));
        }
        (Value::Array(items), Value::Array(wanted)) => {
            assert_eq!(items.len(), wanted.len(), "{what}: {actual}");
            items.iter().zip(wanted).for_each(|(item, wanted)| assert_matches(item, wanted, what));
        }
        (Value::String(_), Value::String(any)) if any == "…" => {}
        _ => assert_eq!(actual, expected, "{what}"),
    }
}
