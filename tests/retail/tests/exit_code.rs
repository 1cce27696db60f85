//! A file that the importer cannot use ends it with one sentence and exit code 1, before it connects to a server.

use std::{
    path::Path,
    process::{Command, Output},
};

fn replay(file: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_retail"));
    // There is no NATS at this address. The program must end before it tries to connect.
    command.arg(file).env("NATS_URL", "nats://127.0.0.1:1").env_remove("DATES").output().expect("the program starts")
}

#[test]
fn an_unusable_file_ends_the_importer_with_a_sentence_and_exit_code_1() {
    let header = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n";
    let cases = [
        ("empty", String::new(), "the file is empty"),
        ("json", "{}".to_owned(), "expected the column InvoiceNo or Invoice, found the columns \"{}\""),
        ("header", header.to_owned(), "found a header and no lines below it"),
        ("free", format!("{header}536365,71053,LANTERN,6,2010-12-01 08:26:00,0.0,,UK\n"), "expected sales, found none"),
    ];
    for (name, content, expected) in cases {
        let path = std::env::temp_dir().join(format!("watershed-exit-{name}-{}.csv.gz", std::process::id()));
        std::fs::write(&path, content).expect("written");
        let Output { status, stdout, stderr } = replay(&path);
        std::fs::remove_file(&path).expect("removed");
        let said = String::from_utf8(stderr).expect("text");
        assert_eq!((status.code(), stdout.len()), (Some(1), 0), "{said}");
        assert!(said.contains(expected) && said.contains(path.to_str().expect("text")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    for nowhere in [std::env::temp_dir(), "/no/such/file.csv".into()] {
        assert_eq!(replay(&nowhere).status.code(), Some(1));
    }
}
