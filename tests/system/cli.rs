//! The program `watershed`, as a process: what it prints, and what it exits with. What it does to views is in
//! `cli_views.rs`.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use async_nats::Client;
use futures_util::StreamExt;
use serde_json::{Value, json};
use tests::{System, eventually};
use tokio_util::task::AbortOnDropHandle;

#[tokio::test(flavor = "multi_thread")]
async fn a_call_prints_the_reply_and_exits_with_its_outcome() {
    let (system, _replicas) = System::complete().await;
    let ada = r#"{"email":"ada@example.com","name":"Ada Lovelace"}"#;
    let called = run(system.watershed(&["call", "cmd.user.register", ada, "-H", "Actor: Zoe"]));
    assert_eq!(called.code, 0, "{called:?}");
    let accepted: Value = serde_json::from_str(&called.out).unwrap();
    assert_eq!(called.err, format!("Position: {}\n", accepted["position"]));

    let position = format!("Min-Position:{}", accepted["position"]);
    let read = run(system.watershed(&["call", "qry.user.list", "--header", &position]));
    assert_eq!(read.code, 0, "{read:?}");
    assert_eq!(serde_json::from_str::<Value>(&read.out).unwrap()["items"][0]["name"], "Ada Lovelace");

    let refused = run(system.watershed(&["call", "cmd.user.register", ada]));
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(refused.err.contains("Nats-Service-Error-Code: 409\n"), "{refused:?}");
    assert_eq!(serde_json::from_str::<Value>(&refused.out).unwrap()["error"]["code"], "email_taken");

    let unserved = run(system.watershed(&["call", "qry.user.guess"]));
    let said = format!("watershed: nobody serves {}.qry.user.guess\n", system.prefix);
    assert_eq!((unserved.code, unserved.err), (3, said));

    // What is not permitted is not answered; the program need not wait for that.
    let began = Instant::now();
    let forbidden = run(system.watershed(&["call", "evt.user.registered", "--timeout", "50"]));
    assert_eq!(forbidden.code, 1, "{forbidden:?}");
    assert!(
        forbidden.err.contains(r#"the NATS user "client" may not do this: Permissions Violation"#),
        "{forbidden:?}"
    );
    assert!(began.elapsed() < Duration::from_secs(50));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_reached_and_a_wrong_command_line_have_exit_codes_of_their_own() {
    let system = System::new().await;
    for arguments in [&["status"][..], &["call", "qry.user.list"], &["events"], &["views"], &["rebuild", "orders"]] {
        let away = run(system.watershed(arguments).env("NATS_URL", "nats://u:secret@127.0.0.1:1"));
        assert_eq!(away.code, 3, "{away:?}");
        assert!(away.err.starts_with("watershed: cannot connect to NATS at 127.0.0.1:1: "), "{away:?}");
        assert!(!away.err.contains("secret"));
    }
    let wrong = system.stack.url("NATS_URL").replace("client:", "client:x");
    let wrong = run(system.watershed(&["status"]).env("NATS_URL", wrong));
    assert!(wrong.code == 3 && wrong.err.contains("the user or the password is wrong"), "{wrong:?}");
    for arguments in [
        &["state"][..],
        &["call"],
        &["call", "a b"],
        &["call", "a", "-H", "no colon"],
        &["call", "a", "--timeout", "0"],
        &["events", "--from", "0"],
        &["events", "--no-follow"],
        &["events", "--aggregate", "a.b"],
        &["events", "--id", "7"],
        &["rebuild"],
        &["drop", "orders"],
        &["drop", "orders", "0"],
        &["status", "--subject-prefix", "a.b"],
        &["status", "--nats-url", "::"],
    ] {
        let wrong = run(&mut system.watershed(arguments));
        assert_eq!(wrong.code, 2, "{arguments:?}: {wrong:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_command_has_help_with_exit_codes_and_completions_name_it() {
    let system = System::new().await;
    let help = run(system.watershed(&["--help"]));
    let commands = help.out.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let commands: Vec<&str> = commands.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    let operations = ["status", "call", "events", "journal", "views", "rebuild", "rollback", "drop", "verify"];
    assert_eq!(commands, [&operations[..], &["completions", "help"]].concat());
    assert!(help.out.contains("Exit codes:") && help.code == 0);
    for command in operations {
        let help = run(system.watershed(&[command, "--help"]));
        assert!(help.out.contains("Exit codes:") && help.code == 0, "{help:?}");
        assert!(help.out.lines().all(|line| line.chars().count() <= 100), "{}", help.out);
    }
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = run(system.watershed(&["completions", shell]));
        assert_eq!(script.code, 0);
        for command in &commands {
            assert!(script.out.contains(command), "{shell}: {command}");
        }
    }
    let syntax =
        run(Command::new("bash").args(["-c", r#"eval "$0""#, &run(system.watershed(&["completions", "bash"])).out]));
    assert_eq!(syntax.code, 0, "{syntax:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_shown_in_the_order_of_their_positions() {
    let (system, _replicas) = System::complete().await;
    let product = system.product(1).await;
    let user = system.user().await;
    for _ in 0..8 {
        system.accept("product.restock", json!({"id": product.id, "quantity": 1})).await;
    }
    super::relay::assert_stream_is_journal(&system).await;
    let operator = system.stack.url("NATS_OPERATOR_URL").to_owned();
    let events = |arguments: &[&str]| {
        let mut command = system.watershed(&[&["events"], arguments].concat());
        command.env("NATS_OPERATOR_URL", &operator);
        command
    };
    let json = |arguments: &[&str]| {
        let read = run(&mut events(&[&["--from", "1", "--no-follow", "--json"], arguments].concat()));
        assert_eq!(read.code, 0, "{read:?}");
        read.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let positions = |events: Vec<Value>| events.iter().map(|it| it["position"].as_u64().unwrap()).collect::<Vec<_>>();

    let all = json(&[]);
    assert_eq!((&all[0]["aggregate"], &all[0]["event"]), (&json!("product"), &json!("created")));
    assert_eq!((&all[9]["id"], &all[9]["version"]), (&json!(product.id), &json!(9)));
    assert_eq!(all[9]["payload"]["stock"], 9);
    assert_eq!(positions(all), Vec::from_iter(1..=10));
    assert_eq!(positions(json(&["--limit", "3"])), [1, 2, 3]);
    assert_eq!(positions(json(&["--aggregate", "user"])), [2]);
    assert_eq!(positions(json(&["--id", &user.id.to_string()])), [2]);
    assert_eq!(positions(json(&["--aggregate", "order"])), [0; 0]);
    assert_eq!(positions(json(&["--id", &product.id.to_string(), "--limit", "2"])), [1, 3]);
    let behind = run(&mut events(&["--from", "11", "--no-follow"]));
    assert_eq!((behind.code, &*behind.out), (0, ""));
    let text = run(&mut events(&["--from", "10", "--no-follow"])).out;
    let words: Vec<&str> = text.split_whitespace().collect();
    assert_eq!((words[0], words[2], words[3], words[4]), ("10", "product.restocked", &*product.id.to_string(), "v9"));

    // Who does not say from where sees what happens, until Ctrl-C.
    let mut following = events(&[]).stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(following.stdout.take().unwrap()).lines();
    let first = tokio::task::spawn_blocking(move || shown.next().unwrap().unwrap());
    while !first.is_finished() {
        system.accept("product.restock", json!({"id": product.id, "quantity": 1})).await;
    }
    let position: u64 = first.await.unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert!(position > 10, "{position}");
    Command::new("kill").args(["-INT", &following.id().to_string()]).status().unwrap();
    assert_eq!(following.wait().unwrap().code(), Some(0));

    let forbidden = run(system.watershed(&["events"]));
    assert_eq!(forbidden.code, 1, "{forbidden:?}");
    for said in [r#"the NATS user "client" may not do this"#, "set NATS_OPERATOR_URL"] {
        assert!(forbidden.err.contains(said), "{forbidden:?}");
    }
    let absent = run(events(&["--stream", "NONE"]));
    assert_eq!(absent.code, 1);
    assert!(absent.err.starts_with("watershed: there is no stream NONE"), "{absent:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_tells_what_the_replicas_say_and_who_says_nothing() {
    let system = System::new().await;
    let unanswered = run(system.watershed(&["status"]));
    assert_eq!(unanswered.code, 3, "{unanswered:?}");
    assert!(unanswered.out.starts_with("✗ no replica of any service answers\n"), "{unanswered:?}");

    let operator = system.operator().await;
    let _command = answer(
        &system,
        &operator,
        "command",
        json!({
            "ready": true, "relay": true, "journal": {"position": 1042}, "stream": {"position": 1042},
        }),
    );
    let projection = answer(
        &system,
        &operator,
        "projection",
        json!({
            "ready": true, "stream": {"position": 1042},
            "views": [{"view": "orders", "generation": 1, "position": 1042, "lag_seconds": 0.0, "state": "live"}],
        }),
    );
    let _query = answer(
        &system,
        &operator,
        "query",
        json!({
            "ready": true, "views": [{"view": "orders", "generation": 1, "position": 1042}],
        }),
    );
    eventually("all is well", async || {
        let status = run(system.watershed(&["status"]));
        (status.code == 0 && status.out.starts_with("✓ all is well\n")).then_some(())
    })
    .await;
    let status: Value = serde_json::from_str(&run(system.watershed(&["status", "--json"])).out).unwrap();
    assert_eq!((&status["problems"], &status["journal"]["position"]), (&json!([]), &json!(1042)));
    assert_eq!(status["views"][0]["leader"], "projection-1");
    assert_eq!(status["replicas"].as_array().unwrap().len(), 3);

    let mut watching = system.watershed(&["status", "--watch", "--interval", "1", "--json"]);
    let mut watching = watching.stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut next = || serde_json::from_str::<Value>(&shown.next().unwrap().unwrap()).unwrap();
    assert_eq!(next()["problems"], json!([]));
    drop(projection);
    let stopped = Instant::now();
    let named = loop {
        let problems = next()["problems"].to_string();
        if problems.contains("projection replica projection-1 has not answered for") {
            break problems;
        }
        assert!(stopped.elapsed() < Duration::from_secs(10), "{problems}");
    };
    assert!(
        named.contains("no replica of the projection service answers: the views stand still at 1,042, and no event"),
        "{named}"
    );
    Command::new("kill").args(["-INT", &watching.id().to_string()]).status().unwrap();
    assert_eq!(watching.wait().unwrap().code(), Some(0));

    let status = run(system.watershed(&["status"]));
    assert_eq!(status.code, 1, "{status:?}");
    assert!(status.out.starts_with("✗ no replica of the projection service answers"), "{status:?}");
    // It is not a terminal, so there are no colours.
    assert!(!status.out.contains('\x1b'));
    let forced = run(system.watershed(&["status"]).env("CLICOLOR_FORCE", "1"));
    assert!(forced.out.starts_with("\x1b[31m✗"), "{forced:?}");
    let uncoloured = run(system.watershed(&["status"]).env("CLICOLOR_FORCE", "1").env("NO_COLOR", "1"));
    assert!(!uncoloured.out.contains('\x1b'), "{uncoloured:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_projection_that_is_suspended_beside_a_load_is_named_within_ten_seconds() {
    let system = System::new().await;
    let _command = system.command().await;
    let projection = system.process("projection", &["--replica", "p1"]);
    let _query = system.query().await;
    let product = system.product(1).await.id;
    let load = async {
        loop {
            system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
        }
    };
    let watched = async {
        eventually("all is well", async || {
            let command = system.watershed(&["status"]);
            let status = tokio::task::spawn_blocking(move || run(command)).await.unwrap();
            (status.code == 0).then_some(())
        })
        .await;
        let mut command = system.watershed(&["status", "--watch", "--interval", "1", "--json"]);
        let mut watching = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut shown = BufReader::new(watching.stdout.take().unwrap()).lines();
        let mut next = move || serde_json::from_str::<Value>(&shown.next().unwrap().unwrap()).unwrap();
        let (first, mut next) = tokio::task::spawn_blocking(move || (next(), next)).await.unwrap();
        assert_eq!(first["views"][0]["leader"], "p1", "{first}");
        projection.signal("STOP");
        let suspended = Instant::now();
        let told = tokio::task::spawn_blocking(move || {
            let mut lags = Vec::new();
            loop {
                let status = next();
                lags.extend(status["views"][0]["lag_events"].as_u64());
                let problems = status["problems"].to_string();
                let is_named = problems
                    .contains("no replica of the projection service answers: the views stand still at")
                    && problems.contains("projection replica p1 has not answered for");
                let rises = lags.len() > 2 && lags.last() > lags.first();
                if is_named && rises || suspended.elapsed() > Duration::from_secs(30) {
                    return (suspended.elapsed(), lags, problems);
                }
            }
        });
        let told = told.await.unwrap();
        watching.kill().unwrap();
        watching.wait().unwrap();
        told
    };
    let (after, lags, problems) = tokio::select! {
        () = load => unreachable!("it ends with the test"),
        told = watched => told,
    };
    assert!(after < Duration::from_secs(10), "{after:?} {lags:?} {problems}");
    projection.signal("CONT");
}

/// What a program has printed, and its exit code.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

/// Runs a program to its end.
pub fn run(mut command: impl std::borrow::BorrowMut<Command>) -> Ended {
    let Output { status, stdout, stderr } = command.borrow_mut().stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: status.code().unwrap(), out: text(stdout), err: text(stderr) }
}

/// Answers `$SRV.STATS` as a replica would, until this is dropped.
fn answer(system: &System, nats: &Client, service: &str, data: Value) -> AbortOnDropHandle<()> {
    let metadata = json!({"revision": "d80c91b0a1b2", "stream": system.stream(), "prefix": system.prefix});
    let replica = format!("{service}-1");
    let reply = json!({"name": service, "id": replica, "version": "0.1.0", "metadata": metadata, "data": data});
    let nats = nats.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut questions = nats.subscribe("$SRV.STATS").await.unwrap();
        while let Some(question) = questions.next().await {
            nats.publish(question.reply.unwrap(), reply.to_string().into()).await.unwrap();
        }
    }))
}
