//! A month of a real shop is replayed through NATS, stopped and run again, and comes out right to the penny.

use std::{
    io::Write,
    path::{Path, PathBuf},
};

use flate2::{Compression, write::GzEncoder};
use retail::NoSale;
use serde_json::{Value, json};
use tests::{Expect, System, eventually, journal};

use crate::projection::assert_views_are_journal;

const SMALL: &str = "\
InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country
536365,85123A,WHITE HANGING HEART T-LIGHT HOLDER,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom
536365,71053,,6,2010-12-01 08:26:00,3.39,17850.0,United Kingdom
536365,85123A,\"WHITE HEART, HANGING\",2,2010-12-01 08:26:00,2.5,17850.0,United Kingdom
536370,BANK CHARGES,Bank Charges,1,2010-12-01 08:45:00,15.0,,France
536371,71053,WHITE METAL LANTERN,10,2010-12-02 09:00:00,3,13748.0,EIRE
C536379,D,Discount,-1,2010-12-01 09:41:00,27.5,14527.0,United Kingdom
536381,71053,WHITE METAL LANTERN,-3,2010-12-01 09:41:00,3.39,15311.0,United Kingdom
536382,71053,WHITE METAL LANTERN,1,2010-12-01 09:45:00,0.0,16098.0,United Kingdom
536383,71053,WHITE METAL LANTERN,1,2010-12-01 09:45:00,0.001,16098.0,United Kingdom
536384,71053,WHITE METAL LANTERN,one,2010-12-01 09:45:00,1.0,16098.0,United Kingdom
";

#[tokio::test(flavor = "multi_thread")]
async fn a_small_shop_is_replayed_to_the_penny_and_nothing_happens_twice() {
    let (system, _replicas) = System::complete().await;
    let file = gzipped("small", SMALL);

    let report = retail::replay(&system.client, &file, 8, false).await.unwrap();

    assert_eq!(report.sales, 5);
    let reasons = [
        (NoSale::Cancellation, 1),
        (NoSale::QuantityNotPositive, 1),
        (NoSale::PriceNotPositive, 1),
        (NoSale::PriceNotInPence, 1),
        (NoSale::Unreadable, 1),
    ];
    assert_eq!(report.no_sales, reasons.into());
    // Three customers, of whom the guest has no country; three products, named and stocked; three orders.
    assert_eq!((report.commands, report.accepted), (3 + 3 + 2 + 3 + 3 + 3, 17));
    let day = 6 * 255 + 6 * 339 + 2 * 250 + 1500;
    let sales = daily(&system, "2010-12-01", "2010-12-31").await;
    assert_eq!((&sales["days"][0]["day"], revenue(&sales["days"][0])), (&json!("2010-12-01"), day));
    assert_eq!(revenue(&sales["total"]), day + 3000);
    assert_eq!(sales["total"]["orders"], 3);
    let products = system.ask("qry.product.search", json!({"text": "lantern"}), &[]).await.data();
    assert_eq!((&products["items"][0]["sku"], &products["items"][0]["stock"]), (&json!("71053"), &json!(0)));

    let events = journal::events(&system).await.len();
    let again = retail::replay(&system.client, &file, 8, false).await.unwrap();
    assert_eq!((again.accepted, again.position), (17, report.position));
    assert_eq!(journal::events(&system).await.len(), events, "nothing happened twice");
    assert_views_are_journal(&system).await;
    std::fs::remove_file(file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_month_is_placed_after_a_first_one_and_another_copy_of_it_changes_nothing() {
    let (system, _replicas) = System::complete().await;
    let january = SMALL
        .replace("5363", "5401")
        .replace("2010-12-01", "2011-01-04")
        .replace("2010-12-02", "2011-01-13")
        .replace("WHITE METAL LANTERN", "PALE METAL LANTERN")
        .replace("3.39", "3.79")
        .replace("EIRE", "Cyprus");
    let copy = january
        .replace("InvoiceNo", "Invoice")
        .replace("UnitPrice", "Price")
        .replace("CustomerID", "Customer ID")
        .replace("2011-01-04 0", "1/4/2011 ")
        .replace("2011-01-13 0", "01-13-11 ")
        .replace(":00,", ",")
        .replace("71053", "71053 ");
    let first = gzipped("first", SMALL);
    let months = [gzipped("second", &january), plain("copy", &copy)];

    let before = retail::replay(&system.client, &first, 8, false).await.unwrap();
    for file in &months {
        let report = retail::replay(&system.client, file, 8, false).await.unwrap();
        assert_eq!((report.sales, report.accepted), (before.sales, before.accepted), "{report}");
        assert_eq!((report.refused, report.already_present), ([].into(), 0));
        let sales = daily(&system, "2010-12-01", "2011-01-31").await;
        assert_eq!(sales["total"]["orders"], 6);
        let products = system.ask("qry.product.search", json!({"text": "lantern"}), &[]).await.data();
        let lantern = &products["items"][0];
        assert_eq!((&lantern["name"], &lantern["stock"]), (&json!("PALE METAL LANTERN"), &json!(0)));
        assert_eq!(lantern["price"]["amount"], 379);
        let users = system.ask("qry.user.list", json!({"country": "Cyprus"}), &[]).await.data();
        assert_eq!(users["items"].as_array().unwrap().len(), 1);
    }

    // An aggregate whose key the ledger has forgotten exists all the same, and does not count as a failure.
    system.journal().await.execute("delete from commands", &[]).await.unwrap();
    let again = retail::replay(&system.client, &first, 8, false).await.unwrap();
    assert_eq!((again.refused, again.already_present), ([].into(), 3 + 3 + 3));
    assert_eq!(daily(&system, "2010-12-01", "2011-01-31").await["total"]["orders"], 6);
    assert_views_are_journal(&system).await;
    for file in [&first].into_iter().chain(&months) {
        std::fs::remove_file(file).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_is_vacuumed_until_no_row_is_dead() {
    const DEAD: &str = "select coalesce(sum(n_dead_tup), 0)::bigint from pg_stat_user_tables";
    let (system, _replicas) = System::complete().await;
    let dead = async || system.journal().await.query_one(DEAD, &[]).await.unwrap().get::<_, i64>(0);
    let product = system.product(1_000).await.id;
    let restocked = eventually("rows are dead", async || {
        system.accept("product.restock", json!({"id": product, "quantity": 1})).await;
        (dead().await > 0).then_some(())
    });
    restocked.await;
    // A plain vacuum would leave so few dead rows of many in the indexes.
    let few = "create table many (id int primary key, pad text);
        insert into many select id, repeat('x', 200) from generate_series(1, 20000) as id;
        delete from many where id <= 5";
    system.journal().await.batch_execute(few).await.unwrap();
    tokio::time::timeout(tests::PATIENCE, journal::vacuumed(&system)).await.unwrap();
    assert_eq!(dead().await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_without_a_single_order_is_a_failure() {
    let (system, _replicas) = System::complete().await;
    // A line cannot have so many pieces.
    let file =
        plain("refused", &SMALL.replace(",6,", ",6000000,").replace(",10,", ",6000000,").replace(",1,", ",6000000,"));
    let failed = retail::replay(&system.client, &file, 8, false).await.unwrap_err().to_string();
    assert!(failed.contains("none of the orders was accepted") && failed.contains("malformed"), "{failed}");
    std::fs::remove_file(file).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn december_2010_is_replayed_to_the_penny_even_if_it_is_stopped_in_between() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/online-retail/2010-12.csv.gz");
    if !file.exists() {
        eprintln!("skipped: the file of the data set is not there");
        return;
    }
    let (system, _replicas) = System::complete().await;
    let some = eventually("some of the commands are done", async || (system.head().await > 2_000).then_some(()));
    tokio::select! {
        replayed = retail::replay(&system.client, &file, 64, false) => panic!("the replay ended before it was stopped: {replayed:?}"),
        () = some => {}
    }

    let report = retail::replay(&system.client, &file, 256, false).await.unwrap();

    println!("{report}");
    assert_eq!(report.sales, 41_480);
    assert_eq!(report.no_sales.values().sum::<usize>(), 42_481 - 41_480);
    // 885 customers with a country and the guest, 2,788 products that are named and stocked, 1,559 orders.
    let commands = 886 + 885 + 3 * 2_788 + 1_559;
    assert_eq!((report.commands, report.accepted, report.refused), (commands, commands, [].into()));
    let sales = daily(&system, "2010-12-01", "2010-12-31").await;
    assert_eq!(revenue(&sales["total"]), 82_374_614);
    assert_eq!(sales["total"]["orders"], 1_559);
    for (day, pennies) in [("2010-12-01", 5_896_079), ("2010-12-07", 9_961_820)] {
        assert_eq!(revenue(&daily(&system, day, day).await["total"]), pennies, "{day}");
    }
    let top = json!({"from": "2010-12-01", "to": "2010-12-31", "by": "revenue", "currency": "GBP", "limit": 1});
    let top = system.ask("qry.sales.top", top, &[]).await.data();
    assert_eq!(top["items"].as_array().unwrap().len(), 1);
    assert_views_are_journal(&system).await;
}

async fn daily(system: &System, from: &str, to: &str) -> Value {
    system.ask("qry.sales.daily", json!({"from": from, "to": to}), &[]).await.data()
}

fn revenue(sales: &Value) -> i64 {
    let revenue = sales["revenue"].as_array().unwrap();
    assert_eq!((revenue.len(), &revenue[0]["currency"]), (1, &json!("GBP")));
    revenue[0]["amount"].as_i64().unwrap()
}

fn plain(name: &str, text: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("watershed-{name}-{}.csv", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

fn gzipped(name: &str, text: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("watershed-{name}-{}.csv.gz", std::process::id()));
    let mut encoder = GzEncoder::new(std::fs::File::create(&path).unwrap(), Compression::fast());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap();
    path
}
