//! What the program `watershed` does to the generations of views, and how it follows that.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use bson::{Document, doc};
use runtime::locked;
use serde_json::{Value, json};
use tests::{Proxy, System, eventually, journal};
use tokio::task::spawn_blocking;

use crate::cli::{Ended, run};

const SHORT: [&str; 2] = ["--lease-ms", "1000"];
/// A build takes an event at a time, and rests far longer than that takes, for as long as events keep coming.
const SLOW: [&str; 6] = ["--lease-ms", "1000", "--build-share", "1", "--batch-events", "8"];

#[tokio::test(flavor = "multi_thread")]
async fn a_view_is_rebuilt_returned_to_and_dropped_by_typing_it() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&SHORT));
    for stock in 1..=3 {
        system.product(stock).await;
    }
    journal::caught_up(&system).await;
    system.offers_operations("projection").await;

    let rebuilt = operate(&system, &["rebuild", "products"]).await;
    assert_eq!((rebuilt.code, &*rebuilt.out), (0, "✓ products@2 serves, at position 3\n"), "{rebuilt:?}");
    let begun = operate(&system, &["rebuild", "products", "--no-wait"]).await;
    assert_eq!((begun.code, &*begun.out, &*begun.err), (0, "products@3 is being built\n", ""), "{begun:?}");
    serves(&system, "products", 3).await;
    let returned = operate(&system, &["rollback", "products"]).await;
    assert_eq!((returned.code, &*returned.out), (0, "✓ products@2 serves, at position 3\n"), "{returned:?}");
    let returned = operate(&system, &["rollback", "products", "--json", "--force"]).await;
    let lines: Vec<Value> = returned.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = lines.last().unwrap();
    let expected = (&json!("products"), &json!(3), &json!("serving"));
    assert_eq!((&last["view"], &last["generation"], &last["state"]), expected, "{returned:?}");

    let shown = operate(&system, &["views", "products"]).await;
    assert_eq!(shown.code, 0, "{shown:?}");
    let states: BTreeMap<&str, &str> =
        shown.out.lines().skip(3).map(first_words).map(|[name, it]| (name, it)).collect();
    // The one that is before that is not needed any more.
    assert_eq!((states["products@2"], states["products@3"]), ("previous", "serving"), "{}", shown.out);
    let all = operate(&system, &["views", "--json"]).await;
    let all: Value = serde_json::from_str(&all.out).unwrap();
    assert_eq!(all["views"].as_array().unwrap().len(), views::names().len());

    let dropped = operate(&system, &["drop", "products", "2"]).await;
    assert_eq!((dropped.code, &*dropped.out), (0, "products@2 is being dropped\n"), "{dropped:?}");
    for (arguments, said) in [
        (&["rebuild", "nothing"][..], "there is no view nothing"),
        (&["views", "nothing"], "there is no view nothing"),
        (&["rollback", "orders"], "the view orders has no such generation of version"),
        (&["drop", "products", "3"], "the generation 3 of the view products serves"),
        (&["drop", "products", "9"], "the view products has no generation 9"),
    ] {
        let refused = operate(&system, arguments).await;
        assert_eq!((refused.code, &*refused.out), (1, ""), "{refused:?}");
        assert!(refused.err.starts_with(&format!("watershed: {said}")), "{refused:?}");
    }
    let forbidden = run(system.watershed(&["rebuild", "products"]));
    assert_eq!(forbidden.code, 1, "{forbidden:?}");
    for said in [r#"the NATS user "client" may not do this"#, "set NATS_OPERATOR_URL"] {
        assert!(forbidden.err.contains(said), "{forbidden:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_seen_joined_and_left_and_outlives_whoever_follows_and_builds_it() {
    let system = System::new().await;
    let _command = system.command().await;
    let projection = system.process("projection", &SLOW);
    let product = system.product(1).await.id;
    let restock = async || system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
    for _ in 0..200 {
        restock().await;
    }
    journal::caught_up(&system).await;
    system.offers_operations("projection").await;
    let _query = system.query().await;

    let is_loaded = AtomicBool::new(true);
    let load = async {
        while is_loaded.load(Relaxed) {
            restock().await;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    let followed = async {
        let proxy = Proxy::start(system.stack.url("NATS_OPERATOR_URL")).await;
        let mut first = command(&system, &["rebuild", "products", "--json"]);
        let mut first = Following::start(first.env("NATS_OPERATOR_URL", &proxy.url));
        let begun = first.printed("it is being built", |line| line.contains(r#""position":"#)).await;
        let begun: Value = serde_json::from_str(&begun).unwrap();
        let expected = (&json!("products"), &json!(2), &json!("building"));
        assert_eq!((&begun["view"], &begun["generation"], &begun["state"]), expected, "{begun}");

        // Somebody else joins, and leaves.
        let joining = Following::start(&mut command(&system, &["rebuild", "products"]));
        joining.said("joining", |line| line == "products@2 is being built already: joining it").await;
        joining.said("progress", |line| line.starts_with("products@2: ") && line.contains(" events (")).await;
        joining.signal("INT");
        let left = joining.ended().await;
        assert_eq!((left.code, &*left.out), (130, ""), "{left:?}");
        let said = "products@2 goes on; join it again with the same command: watershed rebuild products\n";
        assert!(left.err.ends_with(said), "{left:?}");

        // What is being built is seen by everybody; a return has to wait.
        let build = eventually("the status shows it", async || {
            let status: Value = serde_json::from_str(&watershed(&system, &["status", "--json"]).await.out).ok()?;
            status["builds"].get(0).filter(|build| build["events_per_second"].is_number()).cloned()
        })
        .await;
        assert_eq!((&build["view"], &build["generation"], &build["state"]), expected, "{build}");
        assert!(build["events_left"].as_u64() > Some(0) && build["seconds_left"].as_f64() > Some(0.0), "{build}");
        let status = watershed(&system, &["status"]).await;
        assert!(status.code == 0 && status.out.contains("\nproducts@2 "), "{status:?}");
        let views = operate(&system, &["views"]).await;
        assert!(views.code == 0 && views.out.contains("\nproducts@2  building "), "{views:?}");
        let refused = operate(&system, &["rollback", "products"]).await;
        assert_eq!(refused.code, 1, "{refused:?}");

        // Neither a cut connection nor the death of the builder ends it.
        proxy.cut();
        projection.kill();
        first.said("nobody answers", |line| line == "products@2: no replica of the projection service answers").await;
        let next = system.start_projection(&SLOW);
        let printed = first.count();
        eventually("it goes on", async || (first.count() > printed).then_some(())).await;
        let again = Following::start(&mut command(&system, &["rebuild", "products"]));
        again.said("joining", |line| line == "products@2 is being built already: joining it").await;
        is_loaded.store(false, Relaxed);
        let ended = first.ended().await;
        let last: Value = serde_json::from_str(ended.out.lines().last().unwrap()).unwrap();
        assert_eq!((ended.code, &last["state"]), (0, &json!("serving")), "{ended:?}");
        let ended = again.ended().await;
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.out.starts_with("✓ products@2 serves, at position "), "{ended:?}");
        next
    };
    let ((), _projection) = tokio::join!(load, followed);
    crate::projection::assert_views_are_journal(&system).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_hangs_does_not_keep_the_operator_waiting() {
    let system = System::new().await;
    let _command = system.command().await;
    system.product(1).await;
    let (hanging, _working) = (
        system.process("projection", &[&SHORT[..], &["--replica", "p1"]].concat()),
        system.process("projection", &[&SHORT[..], &["--replica", "p2"]].concat()),
    );
    system.listens("projection", "p1").await;
    system.listens("projection", "p2").await;
    journal::caught_up(&system).await;
    hanging.signal("STOP");
    eventually("a request goes to the one that hangs", async || {
        let began = Instant::now();
        let begun = operate(&system, &["rebuild", "products", "--no-wait"]).await;
        assert_eq!(begun.code, 0, "{begun:?}");
        (began.elapsed() > Duration::from_secs(3)).then_some(())
    })
    .await;
    let rebuilt = operate(&system, &["rebuild", "products"]).await;
    assert_eq!(rebuilt.code, 0, "{rebuilt:?}");
    hanging.signal("CONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_that_differ_are_named_and_are_the_exit_code() {
    let system = System::new().await;
    let (_command, _projection) = (system.command().await, system.start_projection(&SHORT));
    let (product, other) = (system.product(1).await.id.to_string(), system.product(2).await.id.to_string());
    journal::caught_up(&system).await;
    system.offers_operations("projection").await;

    let verified = operate(&system, &["verify"]).await;
    assert_eq!(verified.code, 0, "{verified:?}");
    assert!(verified.out.starts_with("✓ the views are what the events make of them\n"), "{verified:?}");
    let rows: Vec<[&str; 2]> = verified.out.lines().skip(3).map(first_words).collect();
    assert_eq!(rows, views::names().into_iter().map(|view| [view, "2"]).collect::<Vec<_>>(), "{}", verified.out);

    // Somebody writes into MongoDB.
    let documents = system.views().await.collection::<Document>(&views::layout::collection("products", 1));
    let written = documents.update_one(doc! {"_id": &product}, doc! {"$set": {"name": "Brass lantern"}}).await;
    assert_eq!(written.unwrap().modified_count, 1);
    assert_eq!(documents.delete_one(doc! {"_id": &other}).await.unwrap().deleted_count, 1);
    let first = format!("  {product}  differs in name\n");
    let second = format!("  {other}  is only in the rebuilt generation\n");
    let strange = "  the checkpoint of products@1 has another digest than its documents\n";
    let found = operate(&system, &["verify", "products"]).await;
    assert_eq!((found.code, found.out.lines().next()), (1, Some("✗ products@3: 2 documents differ")), "{found:?}");
    assert!(found.out.ends_with(&format!("\nproducts:\n{first}{second}{strange}")), "{found:?}");
    let found = operate(&system, &["verify", "products", "users", "--values"]).await;
    assert_eq!(found.code, 1, "{found:?}");
    assert!(found.out.contains("      name: \"Brass lantern\" / \"White metal lantern\"\n"), "{found:?}");
    let found = operate(&system, &["verify", "products", "--json"]).await;
    let last: Value = serde_json::from_str(found.out.lines().last().unwrap()).unwrap();
    let expected = (1, &json!("verified"), &json!(2));
    assert_eq!((found.code, &last["state"], &last["comparison"]["different"]), expected, "{found:?}");
    let begun = operate(&system, &["verify", "orders", "--no-wait"]).await;
    assert!(begun.code == 0 && begun.out.starts_with("being verified: orders@"), "{begun:?}");

    // The next event turns what somebody has written into a part of the view.
    let restocked = system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
    journal::caught_up(&system).await;
    let refused = operate(&system, &["rebuild", "products"]).await;
    assert_eq!((refused.code, restocked.position), (1, 3), "{refused:?}");
    let said = "does not serve, as it is not equal to the generation that does: 2 documents differ\n";
    assert!(refused.out.starts_with("✗ products@") && refused.out.contains(said), "{refused:?}");
    assert!(refused.out.contains(&format!("{first}{second}")), "{refused:?}");
    let shown = operate(&system, &["views", "products"]).await;
    assert!(shown.code == 0 && shown.out.contains(&first) && shown.out.contains(" refused "), "{shown:?}");
    let forced = operate(&system, &["rebuild", "products", "--force"]).await;
    assert_eq!(forced.code, 0, "{forced:?}");
    let verified = operate(&system, &["verify", "products"]).await;
    assert_eq!(verified.code, 0, "{verified:?}");
}

fn first_words(row: &str) -> [&str; 2] {
    let mut words = row.split_whitespace();
    [(); 2].map(|()| words.next().unwrap())
}

/// The program, as the operator.
fn command(system: &System, arguments: &[&str]) -> Command {
    let mut command = system.watershed(arguments);
    command.env("NATS_OPERATOR_URL", system.stack.url("NATS_OPERATOR_URL"));
    command
}

/// Runs it to its end, while others go on.
async fn operate(system: &System, arguments: &[&str]) -> Ended {
    let command = command(system, arguments);
    spawn_blocking(move || run(command)).await.unwrap()
}

async fn watershed(system: &System, arguments: &[&str]) -> Ended {
    let command = system.watershed(arguments);
    spawn_blocking(move || run(command)).await.unwrap()
}

async fn serves(system: &System, view: &str, generation: i32) {
    let collection = views::layout::collection(view, generation);
    eventually("the generation serves", async || {
        (journal::serving(system).await.get(view) == Some(&collection)).then_some(())
    })
    .await;
}

/// A running program, and what it has printed so far.
struct Following {
    child: Child,
    out: Printed,
    err: Printed,
}

type Printed = Arc<std::sync::Mutex<Vec<String>>>;

impl Following {
    fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (out, err) = (printed(child.stdout.take().unwrap()), printed(child.stderr.take().unwrap()));
        Self { child, out, err }
    }

    /// Waits for such a line on stdout.
    async fn printed(&mut self, what: &str, is_it: impl Fn(&str) -> bool) -> String {
        eventually(what, async || locked(&self.out).iter().find(|line| is_it(line)).cloned()).await
    }

    /// Waits for such a line on stderr.
    async fn said(&self, what: &str, is_it: impl Fn(&str) -> bool) {
        eventually(what, async || locked(&self.err).iter().any(|line| is_it(line)).then_some(())).await;
    }

    /// How many lines it has printed.
    fn count(&self) -> usize {
        locked(&self.out).len()
    }

    fn signal(&self, name: &str) {
        Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status().unwrap();
    }

    async fn ended(mut self) -> Ended {
        let status = eventually("it ends", async || self.child.try_wait().unwrap()).await;
        // Its last lines may not have been read yet.
        eventually("all is read", async || {
            (Arc::strong_count(&self.out) + Arc::strong_count(&self.err) == 2).then_some(())
        })
        .await;
        let text = |lines: &Printed| locked(lines).iter().map(|line| format!("{line}\n")).collect();
        Ended { code: status.code().unwrap(), out: text(&self.out), err: text(&self.err) }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads lines until the end.
fn printed(pipe: impl Read + Send + 'static) -> Printed {
    let lines = Printed::default();
    let read = Arc::clone(&lines);
    thread::spawn(move || BufReader::new(pipe).lines().map_while(Result::ok).for_each(|line| locked(&read).push(line)));
    lines
}
