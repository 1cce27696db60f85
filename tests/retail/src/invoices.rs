//! The invoices of a file in the layout of the UCI "Online Retail" data set, and the commands that replay them. The
//! invariant: commands with the same key do the same, whichever file they come from. So every file creates a customer
//! or product in the same way, and what differs from file to file is set by an update afterwards.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    path::Path,
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::{
    KeyedCommand,
    dates::{DateOrder, Evidence, Written},
    id,
    table::{Row, Table},
    text,
    unusable::Unusable,
};

const CURRENCY: &str = "GBP";
/// The customer of an invoice without a customer number.
const GUEST: &str = "guest";

/// Why a line is not a sale.
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

/// The content of a file, in its order.
#[derive(Default)]
pub struct Invoices {
    pub no_sales: BTreeMap<NoSale, usize>,
    /// Identifies the file's content.
    digest: String,
    customers: Vec<Customer>,
    products: Vec<Product>,
    invoices: Vec<Invoice>,
    customer_numbers: HashSet<String>,
    product_indexes: HashMap<String, usize>,
    invoice_indexes: HashMap<String, usize>,
}

struct Customer {
    number: String,
    country: String,
}

struct Product {
    code: String,
    name: String,
    price: i64,
    /// The sales by month, such as `2010-12`.
    sold: BTreeMap<String, Sold>,
}

/// The sales of one product in one month.
#[derive(Default)]
struct Sold {
    pieces: i64,
    /// A hash of the invoices, each with the pieces that it sells.
    hash: Sha256,
}

struct Invoice {
    number: String,
    customer: String,
    placed_at: String,
    lines: Vec<Value>,
}

impl Invoices {
    /// Reads a file. If its dates end with the year, the file shows the order of month and day, unless `order` is
    /// given.
    ///
    /// # Errors
    /// If the file cannot be used, or sells nothing. A line that cannot be read is only counted.
    pub fn read(file: &Path, order: Option<DateOrder>) -> Result<Self, Unusable> {
        let text = text::read(file)?;
        let mut invoices = Self { digest: hex(Sha256::digest(&text)), ..Self::default() };
        let table = Table::of(&text)?;
        let mut evidence = Evidence::default();
        let mut rows = Vec::new();
        for row in table.rows() {
            let dated = match row {
                Ok(row) if row.date.is_empty() => Err(NoSale::Unreadable),
                Ok(row) => match Written::parse(&row.date) {
                    Some(written) => {
                        evidence.note(row.line, &row.date, &written, &row.invoice);
                        Ok((row, written))
                    }
                    None => return Err(Unusable::DateLayout { line: row.line, found: row.date }),
                },
                Err(reason) => Err(reason),
            };
            rows.push(dated);
        }
        if rows.is_empty() {
            return Err(Unusable::HeaderOnly);
        }
        let order = evidence.order(order)?;
        for row in rows {
            if let Err(reason) = row.and_then(|(row, written)| invoices.add(row, &written, order)) {
                *invoices.no_sales.entry(reason).or_default() += 1;
            }
        }
        if invoices.invoices.is_empty() { Err(Unusable::NoSales(invoices.no_sales)) } else { Ok(invoices) }
    }

    pub fn sales(&self) -> usize {
        self.invoices.iter().map(|invoice| invoice.lines.len()).sum()
    }

    /// The commands to customers and products, one chain for each. A product comes into stock last, so that it cannot
    /// be bought before it has its name and price. The views batch changes that come so close together.
    pub fn preparations(&self) -> Vec<Vec<KeyedCommand>> {
        let customers = self.customers.iter().map(|customer| {
            let updated = customer.update(&self.digest);
            [customer.register()].into_iter().chain(updated).collect()
        });
        let products = self.products.iter().map(|product| {
            let updated = product.update(&self.digest);
            [product.create(), updated].into_iter().chain(product.restock()).collect()
        });
        customers.chain(products).collect()
    }

    /// The commands that place the orders, to be sent after the preparations.
    pub fn orders(&self) -> Vec<KeyedCommand> {
        self.invoices.iter().map(Invoice::place).collect()
    }

    fn add(&mut self, row: Row, written: &Written, order: DateOrder) -> Result<(), NoSale> {
        let Row { invoice, code, description, quantity, price, customer, country, .. } = row;
        if invoice.starts_with(['C', 'c']) {
            return Err(NoSale::Cancellation);
        }
        let quantity: i64 = quantity.parse().map_err(|_| NoSale::Unreadable)?;
        if quantity <= 0 {
            return Err(NoSale::QuantityNotPositive);
        }
        let price = pence(&price)?;
        let placed_at = written.moment(order).ok_or(NoSale::Unreadable)?;
        if invoice.is_empty() || code.is_empty() {
            return Err(NoSale::Unreadable);
        }
        let index = *self.product_indexes.entry(code.clone()).or_insert_with(|| {
            self.products.push(Product { code: code.clone(), name: code.clone(), price, sold: BTreeMap::new() });
            self.products.len() - 1
        });
        let product = &mut self.products[index];
        // The name is the first description, or the code if there is none.
        if product.name == product.code && !description.is_empty() {
            product.name = description;
        }
        let sold = product.sold.entry(placed_at[.."2010-12".len()].to_owned()).or_default();
        // Saturation only prevents a panic: the service refuses far smaller quantities.
        sold.pieces = sold.pieces.saturating_add(quantity);
        sold.hash.update(format!("{invoice}/{quantity}\n"));
        let line = json!({"product": id("product", &code), "quantity": quantity, "unit_price": money(price)});
        let index = *self.invoice_indexes.entry(invoice.clone()).or_insert_with(|| {
            let customer = customer_number(&customer);
            if self.customer_numbers.insert(customer.clone()) {
                self.customers.push(Customer { number: customer.clone(), country });
            }
            self.invoices.push(Invoice { number: invoice, customer, placed_at, lines: vec![] });
            self.invoices.len() - 1
        });
        self.invoices[index].lines.push(line);
        Ok(())
    }
}

impl Customer {
    fn id(&self) -> Uuid {
        id("user", &self.number)
    }

    fn register(&self) -> KeyedCommand {
        KeyedCommand {
            name: "cmd.user.register",
            key: format!("retail/register/{}", self.id()),
            body: json!({
                "id": self.id(),
                "email": format!("customer-{}@retail.example", self.number),
                "name": format!("Customer {}", self.number),
            }),
        }
    }

    /// Sets the country, which may differ from file to file. Guests come from everywhere, and have none.
    fn update(&self, digest: &str) -> Option<KeyedCommand> {
        let has_country = self.number != GUEST && !self.country.is_empty();
        has_country.then(|| KeyedCommand {
            name: "cmd.user.update",
            key: format!("retail/update/{digest}/{}", self.id()),
            body: json!({"id": self.id(), "country": self.country}),
        })
    }
}

impl Product {
    fn id(&self) -> Uuid {
        id("product", &self.code)
    }

    fn create(&self) -> KeyedCommand {
        KeyedCommand {
            name: "cmd.product.create",
            key: format!("retail/create/{}", self.id()),
            body: json!({"id": self.id(), "sku": self.code, "name": self.code, "price": money(0)}),
        }
    }

    /// Sets name and price, which may differ from file to file.
    fn update(&self, digest: &str) -> KeyedCommand {
        KeyedCommand {
            name: "cmd.product.update",
            key: format!("retail/update/{digest}/{}", self.id()),
            body: json!({"id": self.id(), "name": self.name, "price": money(self.price)}),
        }
    }

    /// Restocks what each month sells. This happens once, even if the month comes again in another copy, or with
    /// others.
    fn restock(&self) -> impl Iterator<Item = KeyedCommand> {
        self.sold.iter().map(|(month, Sold { pieces, hash })| KeyedCommand {
            name: "cmd.product.restock",
            key: format!("retail/stock/{}/{month}/{}", self.id(), hex(hash.clone().finalize())),
            body: json!({"id": self.id(), "quantity": pieces}),
        })
    }
}

impl Invoice {
    fn place(&self) -> KeyedCommand {
        KeyedCommand {
            name: "cmd.order.create",
            key: format!("retail/order/{}", id("order", &self.number)),
            body: json!({
                "id": id("order", &self.number),
                "user": id("user", &self.customer),
                "placed_at": self.placed_at,
                "lines": self.lines,
            }),
        }
    }
}

/// `17850.0` stands for 17850, and an empty number for the guest.
fn customer_number(number: &str) -> String {
    let number = number.strip_suffix(".0").unwrap_or(number);
    if number.is_empty() { GUEST.to_owned() } else { number.to_owned() }
}

/// Converts a price in pounds into pennies, without rounding.
fn pence(price: &str) -> Result<i64, NoSale> {
    let (pounds, fraction) = price.split_once('.').unwrap_or((price, ""));
    if pounds.starts_with('-') {
        return Err(NoSale::PriceNotPositive);
    }
    let digits = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_digit());
    if pounds.is_empty() || !digits(pounds) || !digits(fraction) {
        return Err(NoSale::Unreadable);
    }
    let (pennies, rest) = fraction.split_at_checked(2).unwrap_or((fraction, ""));
    if !rest.bytes().all(|digit| digit == b'0') {
        return Err(NoSale::PriceNotInPence);
    }
    let price: i64 = format!("{pounds}{pennies:0<2}").parse().map_err(|_| NoSale::Unreadable)?;
    if price == 0 { Err(NoSale::PriceNotPositive) } else { Ok(price) }
}

fn money(amount: i64) -> Value {
    json!({"amount": amount, "currency": CURRENCY})
}

/// The first digits of a hash, enough to tell contents apart.
fn hex(hash: impl AsRef<[u8]>) -> String {
    hash.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
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
        for unreadable in ["free", "", ".", "2.-5", "2.5e", "1,234.50", "99999999999999999999", "2.\u{e9}5"] {
            assert_eq!(pence(unreadable), Err(NoSale::Unreadable), "{unreadable}");
        }
        assert_eq!(customer_number("17850.0"), "17850");
        assert_eq!(customer_number(""), "guest");
    }

    const MONTH: &str = "\
InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country
536365,85123A,CAF\u{c9} LIGHT,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom
536365,71053,,6,2010-12-01 08:26:00,3.39,17850.0,United Kingdom
C536379,D,Discount,-1,2010-12-01 09:41:00,27.5,14527.0,United Kingdom
536384,82484,WOOD BLACK BOARD,3,2010-12-13 09:53:00,6.45,,France
";

    fn read(content: impl AsRef<[u8]>) -> Result<Invoices, Unusable> {
        let path = std::env::temp_dir().join(format!("watershed-invoices-{}.csv", Uuid::new_v4()));
        std::fs::write(&path, content).unwrap();
        let invoices = Invoices::read(&path, None);
        std::fs::remove_file(path).unwrap();
        invoices
    }

    fn gzipped(content: &str) -> Vec<u8> {
        use std::io::Write;

        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(content.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    fn month_first(month: &str) -> String {
        let month =
            month.replace("2010-12-01 08:26:00", "12/1/2010 8:26").replace("2010-12-01 09:41:00", "12/1/2010 9:41");
        month.replace("2010-12-13 09:53:00", "12/13/2010 9:53")
    }

    fn commands(invoices: &Invoices) -> Vec<KeyedCommand> {
        invoices.preparations().into_iter().flatten().chain(invoices.orders()).collect()
    }

    /// The commands without the keys of updates, which differ from file to file.
    fn effects(invoices: &Invoices) -> Vec<(&'static str, String, Value)> {
        let key = |KeyedCommand { name, key, body }| {
            (name, if name.ends_with(".update") { String::new() } else { key }, body)
        };
        commands(invoices).into_iter().map(key).collect()
    }

    #[test]
    fn every_copy_of_a_month_has_the_same_effects() {
        let month = read(MONTH).unwrap();
        assert_eq!((month.sales(), &month.no_sales), (3, &[(NoSale::Cancellation, 1)].into()));
        let expected = effects(&month);
        let second = MONTH
            .replace("InvoiceNo", "Invoice")
            .replace("UnitPrice", "Price")
            .replace("CustomerID", "Customer ID")
            .replace("17850.0", "17850")
            .replace("85123A", "85123A ")
            .replace("71053", " 71053");
        let semicolons = MONTH.replace(',', ";").replace("2.55", "2,55").replace("2010-12-01", "01.12.2010");
        let latin_1: Vec<u8> = MONTH.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect();
        let day_first = MONTH.replace("2010-12-01", "01-12-2010").replace("2010-12-13", "13-12-2010");
        let short = month_first(MONTH).replace("12/1/2010", "12-01-10");
        let copies: [(&str, Vec<u8>); 10] = [
            ("gzipped", gzipped(MONTH)),
            ("in two parts", [gzipped(&MONTH[..90]), gzipped(&MONTH[90..])].concat()),
            ("second edition", second.into()),
            ("Windows", MONTH.replace('\n', "\r\n").into()),
            ("with a mark", format!("\u{feff}{MONTH}").into()),
            ("Latin-1", latin_1),
            ("month first", month_first(MONTH).into()),
            ("day first", day_first.into()),
            ("two layouts", short.into()),
            ("semicolons", semicolons.into()),
        ];
        for (name, copy) in copies {
            assert_eq!(effects(&read(copy).unwrap()), expected, "{name}");
        }
    }

    #[test]
    fn creation_does_not_depend_on_the_file() {
        let later = MONTH
            .replace("5363", "5401")
            .replace("2010-12", "2011-01")
            .replace("2.55", "2.95")
            .replace("LIGHT", "LAMP")
            .replace("United Kingdom", "EIRE");
        let created = |month: &str| {
            let created = read(month).unwrap().preparations().into_iter().filter_map(|chain| chain.into_iter().next());
            created.map(|KeyedCommand { name, key, body }| (name, key, body)).collect::<Vec<_>>()
        };
        assert_eq!(created(MONTH), created(&later));
        let all: HashSet<String> = commands(&read(MONTH).unwrap()).into_iter().map(|it| it.key).collect();
        let mut same = commands(&read(later).unwrap()).into_iter().filter(|it| all.contains(&it.key));
        assert_eq!(
            same.by_ref().filter(|it| !["cmd.user.register", "cmd.product.create"].contains(&it.name)).count(),
            0
        );
        // A file with both months stocks each of them once.
        let both = format!(
            "{MONTH}{}",
            MONTH.lines().skip(1).map(|line| line.replace("2010-12", "2011-01") + "\n").collect::<String>()
        );
        let stocked = |month: &str| -> HashSet<String> {
            let commands = commands(&read(month).unwrap()).into_iter();
            commands.filter(|it| it.name == "cmd.product.restock").map(|it| it.key).collect()
        };
        assert!(stocked(&both).is_superset(&stocked(MONTH)));
        assert_eq!(stocked(&both).len(), 2 * stocked(MONTH).len());
    }

    #[test]
    fn keys_are_valid_idempotency_keys() {
        let odd =
            MONTH.replace("85123A", "BANK \u{2713} CHARGES").replace("536365", "536 365").replace("17850.0", "a b");
        for KeyedCommand { key, .. } in commands(&read(odd).unwrap()) {
            assert!(key.len() <= 128 && key.bytes().all(|byte| byte.is_ascii_graphic()), "{key}");
        }
    }

    #[test]
    fn an_unusable_file_is_refused_with_what_was_expected_and_found() {
        let header = MONTH.lines().next().unwrap();
        let cut = |bytes: Vec<u8>, length: usize| bytes[..length].to_vec();
        let whole = gzipped(MONTH);
        let mut broken = whole.clone();
        broken[40] ^= 0xff;
        let refusals: [(Vec<u8>, &str); 16] = [
            (vec![], "the file is empty"),
            (gzipped(""), "the file is empty"),
            (b"\n\n".to_vec(), "the file is empty"),
            (header.into(), "found a header and no lines below it"),
            (gzipped(&format!("{header}\n")), "found a header and no lines below it"),
            (cut(whole.clone(), whole.len() / 2), "the gzip file is truncated"),
            (cut(whole.clone(), whole.len() - 4), "the gzip file is truncated"),
            (cut(whole.clone(), 5), "the gzip file is truncated"),
            (broken, "the gzip file is corrupt"),
            (b"PK\x03\x04 and so on".to_vec(), "an Excel workbook"),
            (b"\x89PNG\r\n\0\0".to_vec(), "binary data"),
            (b"{\"invoices\":[]}".to_vec(), "expected the column InvoiceNo or Invoice, found the columns \"{"),
            (
                MONTH.replace("Quantity", "Pieces").into(),
                "expected the column Quantity, found the columns \"InvoiceNo,",
            ),
            (MONTH.replace("2010-12-01 08:26:00", "1 Dec 2010").into(), "line 2: expected a date such as 2010-12-01"),
            (MONTH.replace("2010-12-13 09:53:00", "20101213").into(), "line 5: expected a date such as"),
            (
                MONTH.replace(",6,", ",six,").replace(",3,", ",0,").into(),
                "lines that are not sales: 1 (the invoice is a cancellation), 1 (",
            ),
        ];
        for (content, expected) in refusals {
            let refused = read(content).err().unwrap().to_string();
            assert!(refused.contains(expected), "{refused} instead of {expected}");
        }
        assert!(matches!(Invoices::read(&std::env::temp_dir(), None), Err(Unusable::Directory)));
        assert!(matches!(Invoices::read(Path::new("/no/such/file"), None), Err(Unusable::Io(_))));
    }

    #[test]
    fn a_line_that_cannot_be_read_is_counted() {
        let dirt = "536385,71053,LANTERN,1,,3.39,1,UK\n536386,71053,LANTERN,1,2010-02-30 08:26:00,3.39,1,UK\n\
                    536387,,LANTERN,1,2010-12-01 08:26:00,3.39,1,UK\n,71053,LANTERN,1,2010-12-01 08:26:00,3.39,1,UK\n\
                    536388,71053,LANTERN\n536389,71053,LANTERN,1,2010-12-01 08:26:00,3,39,1,UK\n";
        let month = read(format!("{MONTH}{dirt}")).unwrap();
        assert_eq!((month.sales(), month.no_sales[&NoSale::Unreadable]), (3, 6));
    }
}
