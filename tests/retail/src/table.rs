//! The lines of the CSV file by their columns, whose names and order differ between copies of the data set.

use csv::{ReaderBuilder, StringRecord, Trim};

use crate::{NoSale, unusable::Unusable};

/// The delimiters between columns. Where it is not the comma, the comma may be the decimal separator.
const DELIMITERS: [u8; 3] = [b',', b';', b'\t'];

/// A column, with the names that copies give it.
struct Column {
    names: &'static [&'static str],
    /// The names for error messages.
    expected: &'static str,
}

const INVOICE: Column = Column { names: &["InvoiceNo", "Invoice"], expected: "InvoiceNo or Invoice" };
const CODE: Column = Column { names: &["StockCode"], expected: "StockCode" };
const DESCRIPTION: Column = Column { names: &["Description"], expected: "Description" };
const QUANTITY: Column = Column { names: &["Quantity"], expected: "Quantity" };
const DATE: Column = Column { names: &["InvoiceDate"], expected: "InvoiceDate" };
const PRICE: Column = Column { names: &["UnitPrice", "Price"], expected: "UnitPrice or Price" };
const CUSTOMER: Column = Column { names: &["CustomerID"], expected: "CustomerID or Customer ID" };
const COUNTRY: Column = Column { names: &["Country"], expected: "Country" };

/// A CSV text whose header has all columns.
pub struct Table<'a> {
    text: &'a str,
    delimiter: u8,
    indexes: Indexes,
}

/// The index of each column.
#[derive(Clone, Copy)]
struct Indexes {
    invoice: usize,
    code: usize,
    description: usize,
    quantity: usize,
    date: usize,
    price: usize,
    customer: usize,
    country: usize,
}

/// A line of the file, with the blanks around its values removed.
pub struct Row {
    pub line: u64,
    pub invoice: String,
    pub code: String,
    pub description: String,
    pub quantity: String,
    pub date: String,
    pub price: String,
    pub customer: String,
    pub country: String,
}

impl<'a> Table<'a> {
    /// # Errors
    /// If a column is missing.
    pub fn of(text: &'a str) -> Result<Self, Unusable> {
        let found = DELIMITERS.map(|delimiter| Self::delimited(text, delimiter));
        let (mut found, mut refused) = (found.into_iter(), None);
        // The error is that of the delimiter that splits the header into the most columns.
        found
            .find_map(|table| match table {
                Ok(table) => Some(table),
                Err((columns, error)) => {
                    if refused.as_ref().is_none_or(|(most, _)| columns > *most) {
                        refused = Some((columns, error));
                    }
                    None
                }
            })
            .ok_or_else(|| refused.map_or(Unusable::Empty, |(_, error)| error))
    }

    /// An error comes with the number of columns that the delimiter makes.
    fn delimited(text: &'a str, delimiter: u8) -> Result<Self, (usize, Unusable)> {
        let mut reader = ReaderBuilder::new().delimiter(delimiter).trim(Trim::All).from_reader(text.as_bytes());
        let header = reader.headers().cloned().unwrap_or_default();
        let first_line = || text.lines().next().unwrap_or_default().to_owned();
        Indexes::of(&header, first_line)
            .map(|indexes| Self { text, delimiter, indexes })
            .map_err(|error| (header.len(), error))
    }

    /// The lines below the header.
    pub fn rows(&self) -> impl Iterator<Item = Result<Row, NoSale>> {
        let indexes = self.indexes;
        let has_decimal_commas = self.delimiter != b',';
        let reader = ReaderBuilder::new().delimiter(self.delimiter).trim(Trim::All).from_reader(self.text.as_bytes());
        reader.into_records().map(move |record| match record {
            Ok(record) => Ok(Row::of(&record, indexes, has_decimal_commas)),
            // The text is in memory and valid UTF-8, so that only the number of columns can be wrong.
            Err(_) => Err(NoSale::Unreadable),
        })
    }
}

impl Indexes {
    fn of(header: &StringRecord, found: impl Fn() -> String) -> Result<Self, Unusable> {
        let index = |column: Column| {
            let mut indexes = (0..).zip(header).filter(|(_, name)| column.is_called(name)).map(|(index, _)| index);
            match (indexes.next(), indexes.next()) {
                (Some(index), None) => Ok(index),
                (Some(_), Some(_)) => Err(Unusable::TwoColumns { column: column.expected, found: found() }),
                (None, _) => Err(Unusable::NoColumn { missing: column.expected, found: found() }),
            }
        };
        Ok(Self {
            invoice: index(INVOICE)?,
            code: index(CODE)?,
            description: index(DESCRIPTION)?,
            quantity: index(QUANTITY)?,
            date: index(DATE)?,
            price: index(PRICE)?,
            customer: index(CUSTOMER)?,
            country: index(COUNTRY)?,
        })
    }
}

impl Column {
    /// `Customer ID`, `CustomerID` and `customer_id` name the same column.
    fn is_called(&self, name: &str) -> bool {
        let plain = name.replace([' ', '_'], "");
        self.names.iter().any(|it| it.eq_ignore_ascii_case(&plain))
    }
}

impl Row {
    fn of(record: &StringRecord, indexes: Indexes, has_decimal_commas: bool) -> Self {
        let value = |index: usize| record.get(index).unwrap_or_default().to_owned();
        let price = value(indexes.price);
        Self {
            line: record.position().map_or(0, csv::Position::line),
            invoice: value(indexes.invoice),
            code: value(indexes.code),
            description: value(indexes.description),
            quantity: value(indexes.quantity),
            date: value(indexes.date),
            price: if has_decimal_commas { price.replace(',', ".") } else { price },
            customer: value(indexes.customer),
            country: value(indexes.country),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country";

    fn first(text: &str) -> [String; 3] {
        let table = Table::of(text).unwrap();
        let Row { code, price, customer, .. } = table.rows().next().unwrap().unwrap();
        [code, price, customer]
    }

    #[test]
    fn columns_are_found_by_their_names_in_any_order() {
        for text in [
            "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n1,A,x,1,d,2.55,7,UK",
            "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country\r\n1,A ,x,1,d,2.55, 7 ,UK\r\n",
            ",invoice_no,stock_code,description,quantity,invoice_date,unit_price,customer_id,country\n0,1,A,x,1,d,2.55,7,UK",
            "\"Country\",Price,Customer ID,Invoice,StockCode,Description,Quantity,InvoiceDate\nUK,2.55,7,1,\" A\",x,1,d",
            "Invoice;StockCode;Description;Quantity;InvoiceDate;Price;Customer ID;Country\n1;A;x, y;1;d;2,55;7;UK",
            "Invoice\tStockCode\tDescription\tQuantity\tInvoiceDate\tPrice\tCustomer ID\tCountry\n1\tA\tx\t1\td\t2.55\t7\tUK",
        ] {
            assert_eq!(first(text), ["A", "2.55", "7"], "{text}");
        }
    }

    #[test]
    fn a_header_that_lacks_a_column_is_shown() {
        let refused = |text: &str| Table::of(text).err().unwrap().to_string();
        assert_eq!(
            refused(&HEADER.replace("UnitPrice", "Cost")),
            "expected the column UnitPrice or Price, found the columns \
             \"InvoiceNo,StockCode,Description,Quantity,InvoiceDate,Cost,CustomerID,Country\""
        );
        let semicolons = HEADER.replace(',', ";").replace("Quantity", "Menge");
        assert!(refused(&semicolons).starts_with("expected the column Quantity, found the columns \"InvoiceNo;"));
        assert!(refused("1,2,3").contains("InvoiceNo or Invoice"));
        assert!(refused(&"x".repeat(1_000)).len() < 300);
        assert!(refused(&format!("{HEADER},Price")).starts_with("expected one column for UnitPrice or Price"));
    }
}
