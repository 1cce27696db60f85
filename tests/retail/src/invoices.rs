//! The invoices of a file in the layout of the UCI "Online Retail" data set, and the commands that replay them.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    fs::File,
    io::Read,
    path::Path,
};

use flate2::read::MultiGzDecoder;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{Command, id};

const CURRENCY: &str = "GBP";
/// Who buys on an invoice without a customer's number.
const GUEST: &str = "guest";

/// Why a line is no sale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoSale {
    Cancellation,
    QuantityNotPositive,
    PriceNotPositive,
    PriceNotInPence,
    Unreadable,
}

impl fmt::Display for NoSale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cancellation => "the invoice is a cancellation",
            Self::QuantityNotPositive => "the quantity is not positive",
            Self::PriceNotPositive => "the price is not positive",
            Self::PriceNotInPence => "the price is not in whole pennies",
            Self::Unreadable => "a column is missing or cannot be read",
        })
    }
}

/// A line as it stands in the file.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Row {
    invoice_no: String,
    stock_code: String,
    description: String,
    quantity: i64,
    invoice_date: String,
    unit_price: String,
    #[serde(rename = "CustomerID")]
    customer: String,
    country: String,
}

/// What a file says, in the order in which it says it.
#[derive(Default)]
pub struct Invoices {
    pub no_sales: BTreeMap<NoSale, usize>,
    /// Identifies the file's content.
    digest: String,
    customers: Vec<(String, String)>,
    products: Vec<Product>,
    invoices: Vec<Invoice>,
    product_places: HashMap<String, usize>,
    invoice_places: HashMap<String, usize>,
}

struct Product {
    code: String,
    name: String,
    price: i64,
    /// Pieces that the file sells.
    sold: i64,
}

struct Invoice {
    number: String,
    customer: String,
    placed_at: String,
    lines: Vec<Value>,
}

impl Invoices {
    /// # Errors
    /// If the file cannot be read. A line that cannot be understood is counted.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let mut compressed = Vec::new();
        File::open(file)?.read_to_end(&mut compressed)?;
        let hash = Sha256::digest(&compressed);
        let digest = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let mut invoices = Self { digest, ..Self::default() };
        let mut reader = csv::Reader::from_reader(MultiGzDecoder::new(&*compressed));
        for row in reader.deserialize::<Row>() {
            let sale = match row {
                Ok(row) => invoices.add(row),
                Err(error) if matches!(error.kind(), csv::ErrorKind::Io(_)) => return Err(error.into()),
                Err(_) => Err(NoSale::Unreadable),
            };
            if let Err(reason) = sale {
                *invoices.no_sales.entry(reason).or_default() += 1;
            }
        }
        Ok(invoices)
    }

    pub fn sales(&self) -> usize {
        self.invoices.iter().map(|invoice| invoice.lines.len()).sum()
    }

    /// The commands, in phases: each needs what those before it have made.
    pub fn commands(&self) -> Vec<Vec<Command>> {
        let users = self.customers.iter().map(|(customer, country)| Command {
            name: "user.register",
            key: format!("retail/user/{customer}"),
            body: json!({
                "id": id("user", customer),
                "email": format!("customer-{customer}@retail.example"),
                "name": format!("Customer {customer}"),
                "country": country,
            }),
        });
        let products = self.products.iter().map(|product| Command {
            name: "product.create",
            // A later file may give another price or name: then this is refused, and the product stays as it is.
            key: format!("retail/product/{}", key(&product.code)),
            body: json!({
                "id": id("product", &product.code),
                "sku": product.code,
                "name": product.name,
                "price": money(product.price),
            }),
        });
        let stock = self.products.iter().map(|product| Command {
            name: "product.restock",
            key: format!("retail/stock/{}/{}", self.digest, key(&product.code)),
            body: json!({"id": id("product", &product.code), "quantity": product.sold}),
        });
        let orders = self.invoices.iter().map(|invoice| Command {
            name: "order.create",
            key: format!("retail/order/{}", key(&invoice.number)),
            body: json!({
                "id": id("order", &invoice.number),
                "user": id("user", &invoice.customer),
                "placed_at": invoice.placed_at,
                "lines": invoice.lines,
            }),
        });
        vec![users.chain(products).collect(), stock.collect(), orders.collect()]
    }

    fn add(&mut self, row: Row) -> Result<(), NoSale> {
        if row.invoice_no.starts_with('C') {
            return Err(NoSale::Cancellation);
        }
        if row.quantity <= 0 {
            return Err(NoSale::QuantityNotPositive);
        }
        let price = pence(&row.unit_price)?;
        let placed_at = format!("{}Z", row.invoice_date.replacen(' ', "T", 1));
        if placed_at.parse::<domain::Timestamp>().is_err() {
            return Err(NoSale::Unreadable);
        }
        let line = json!({
            "product": id("product", &row.stock_code),
            "quantity": row.quantity,
            "unit_price": money(price),
        });
        let customer = customer(&row.customer);
        let place = *self.invoice_places.entry(row.invoice_no.clone()).or_insert_with(|| {
            if !self.customers.iter().any(|(known, _)| *known == customer) {
                self.customers.push((customer.clone(), row.country.clone()));
            }
            self.invoices.push(Invoice { number: row.invoice_no, customer, placed_at, lines: vec![] });
            self.invoices.len() - 1
        });
        self.invoices[place].lines.push(line);
        let place = *self.product_places.entry(row.stock_code.clone()).or_insert_with(|| {
            self.products.push(Product { code: row.stock_code, name: String::new(), price, sold: 0 });
            self.products.len() - 1
        });
        let product = &mut self.products[place];
        product.sold += row.quantity;
        // The first description that there is; the code where there is none.
        if product.name.is_empty() || product.name == product.code {
            let described = !row.description.trim().is_empty();
            product.name = if described { row.description } else { product.code.clone() };
        }
        Ok(())
    }
}

/// `17850.0` is 17850; nobody is the guest.
fn customer(number: &str) -> String {
    let number = number.trim().trim_end_matches(".0");
    if number.is_empty() { GUEST.to_owned() } else { number.to_owned() }
}

/// A price in pounds, exactly, in pennies.
fn pence(price: &str) -> Result<i64, NoSale> {
    let (pounds, fraction) = price.trim().split_once('.').unwrap_or((price.trim(), ""));
    if pounds.starts_with('-') {
        return Err(NoSale::PriceNotPositive);
    }
    let (pennies, rest) = fraction.split_at_checked(2).unwrap_or((fraction, ""));
    if !rest.bytes().all(|digit| digit == b'0') {
        return Err(NoSale::PriceNotInPence);
    }
    let number = |digits: &str| digits.parse::<i64>().map_err(|_| NoSale::Unreadable);
    let price = number(pounds)? * 100 + number(&format!("{pennies:0<2}"))?;
    if price == 0 { Err(NoSale::PriceNotPositive) } else { Ok(price) }
}

fn money(amount: i64) -> Value {
    json!({"amount": amount, "currency": CURRENCY})
}

/// An idempotency key has no spaces; some stock codes do.
fn key(code: &str) -> String {
    code.replace(' ', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_price_is_read_to_the_penny() {
        assert_eq!(pence("2.55"), Ok(255));
        assert_eq!(pence("2.5"), Ok(250));
        assert_eq!(pence("13541.33"), Ok(1_354_133));
        assert_eq!(pence("7"), Ok(700));
        assert_eq!(pence("0.0"), Err(NoSale::PriceNotPositive));
        assert_eq!(pence("-11062.06"), Err(NoSale::PriceNotPositive));
        assert_eq!(pence("0.001"), Err(NoSale::PriceNotInPence));
        assert_eq!(pence("free"), Err(NoSale::Unreadable));
        assert_eq!(customer("17850.0"), "17850");
        assert_eq!(customer(""), "guest");
    }
}
