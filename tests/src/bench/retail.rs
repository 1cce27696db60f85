//! A month of a shop, replayed by the importer until all views have it, compared to bulk writes of the same documents
//! by the driver.

use std::{fmt::Write as _, path::PathBuf, sync::Arc};

use bson::RawDocumentBuf;
use futures_util::TryStreamExt;
use tokio::time::Instant;

use super::{
    bare::Mongo,
    cost::between,
    installation::{Installation, WORDS},
    load::{Measured, Random},
    report::{Row, Sample, Target},
    rows::ROUNDS,
};
use crate::Stack;

/// Roughly the numbers of December 2010 in the data set.
const ORDERS: usize = 1_500;
const PRODUCTS: usize = 3_700;
const CUSTOMERS: usize = 900;
const DAYS: usize = 23;
/// The most lines of a small and of a large order. One order in ten is large, so that the average is 27 lines.
const SMALL_ORDER: usize = 33;
const LARGE_ORDER: usize = 233;
/// Requests in flight, as many as the importer has by default.
const IN_FLIGHT: usize = 256;

/// Each round has an installation of its own on the same servers, since a second replay would change nothing.
pub async fn retail(stack: &Arc<Stack>) -> Row {
    let file = File::new(&month());
    let mut rounds = Vec::new();
    for _ in 0..ROUNDS {
        let installation = Installation::empty(stack).await;
        let machine = installation.machine();
        let (before, began) = (machine.cpu(), Instant::now());
        let report = ::retail::replay(&installation.system.client, &file.0, IN_FLIGHT, false).await;
        let (elapsed, cpu) = (began.elapsed(), between(&before, &machine.cpu()));
        let report = report.expect("the file is replayed");
        assert!(report.refused.is_empty() && report.accepted == report.commands, "{report}");
        let ours = Measured::counted(report.sales, elapsed, cpu);

        let (mongo, documents) = Mongo::of_views(&installation.system).await;
        let (before, began) = (machine.cpu(), Instant::now());
        for (view, documents) in documents {
            mongo.bulk(view, documents).await;
        }
        let (elapsed, cpu) = (began.elapsed(), between(&before, &machine.cpu()));
        let bare = Measured::counted(report.sales, elapsed, cpu);
        rounds.push((Sample::rate(ours, 1), Sample::rate(bare, 1)));
    }
    Row::of("retail", "lines/s", Target::Open, rounds)
}

/// The invoices of a month. They are always the same.
fn month() -> String {
    let mut random = Random::default();
    let words = |random: &mut Random, number| (0..number).map(|_| WORDS[random.below(WORDS.len())]).collect::<Vec<_>>();
    let products: Vec<(String, String, usize)> = (0..PRODUCTS)
        .map(|product| {
            let number = 3 + random.below(3);
            let name = words(&mut random, number).join(" ").to_uppercase();
            (format!("{}", 20_000 + product), name, 42 + random.below(1_200))
        })
        .collect();
    let mut text = String::from("InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n");
    let mut lines = 0;
    for order in 0..ORDERS {
        let most = if order % 10 == 9 { LARGE_ORDER } else { SMALL_ORDER };
        let (day, hour) = (1 + order * DAYS / ORDERS, 8 + order % 10);
        let (invoice, customer) = (536_365 + order, random.below(CUSTOMERS));
        // One order in ten is by a guest.
        let customer = if order % 10 == 4 { String::new() } else { format!("{}.0", 12_000 + customer) };
        for _ in 0..=random.below(most) {
            // Every tenth line has the next product in sequence, so that each is sold. The others prefer the first
            // products.
            let popular = random.below(PRODUCTS).min(random.below(PRODUCTS));
            let (code, name, price) = &products[if lines % 10 == 0 { lines / 10 % PRODUCTS } else { popular }];
            let quantity = 1 + random.below(24);
            let (pounds, pennies) = (price / 100, price % 100);
            let _ = writeln!(
                text,
                "{invoice},{code},{name},{quantity},2010-12-{day:02} {hour:02}:26:00,{pounds}.{pennies:02},{customer},\
                 United Kingdom"
            );
            lines += 1;
        }
    }
    text
}

/// A file that is removed when this is dropped.
struct File(PathBuf);

impl File {
    fn new(text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("watershed-bench-{}.csv", std::process::id()));
        std::fs::write(&path, text).expect("the file can be written");
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        // The file may have been removed already.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The stored documents of a view.
pub type Stored = Vec<RawDocumentBuf>;

impl Mongo {
    /// Reads the documents of all views, and creates empty collections with the same indexes.
    async fn of_views(system: &crate::System) -> (Self, Vec<(&'static str, Stored)>) {
        let mongo = Self::empty(system).await;
        let mut documents = Vec::new();
        for view in views::names() {
            let from = mongo.views.collection::<RawDocumentBuf>(&views::layout::collection(view, 1));
            let stored = from.find(bson::doc! {}).await.expect("found").try_collect().await.expect("read");
            documents.push((view, stored));
            mongo.index(view).await;
        }
        (mongo, documents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_month_resembles_december_and_is_always_the_same() {
        let text = month();
        assert_eq!(text, month());
        let file = File::new(&text);
        let invoices = ::retail::Invoices::read(&file.0, None).expect("the importer can read the file");
        assert_eq!(invoices.sales(), text.lines().count() - 1);
        let lines = invoices.sales() as f64 / ORDERS as f64;
        assert!((26.0..28.0).contains(&lines), "{lines} lines an order");
        let customers = invoices.preparations().len() - PRODUCTS;
        assert_eq!(invoices.orders().len(), ORDERS);
        assert!((600..=CUSTOMERS + 1).contains(&customers), "{customers} customers");
    }
}
