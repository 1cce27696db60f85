//! The writes of a batch to stored documents, and the MongoDB commands that carry them out. The invariant: afterwards a
//! stored document has the same fields as the one in memory, in the same order; and only the fields that changed are
//! sent.

use anyhow::{bail, ensure};
use bson::{
    Document, RawArrayBuf, RawDocument, RawDocumentBuf,
    raw::{CStr, cstr},
    rawdoc,
};

/// The largest size of a command's statements in bytes, unless it is a single one. The server accepts 16 MiB for a
/// whole command, but nothing bounds the time that it takes over it: see [`MAX_STATEMENTS`].
const MAX_BYTES: usize = 256 << 10;
/// The largest number of statements in a command. The server accepts 100,000, and nothing bounds the time that it takes
/// over them. The bytes do not tell what a statement costs: a product that comes into stock, or gets another name,
/// changes about a hundred keys in its indexes, which takes 0.3 to 1 ms. While a month of orders was loaded and views
/// were rebuilt on two busy cores, a command with 2,300 products occupied the server for up to 2.6 s. Split into
/// commands of 200, none took longer than 0.5 s, and all of them together took about as long.
const MAX_STATEMENTS: usize = 200;

/// A change to one document.
#[derive(Clone, Debug, PartialEq)]
pub struct DocumentWrite {
    id: String,
    change: Change,
}

#[derive(Clone, Debug, PartialEq)]
enum Change {
    Insert(RawDocumentBuf),
    Replace(RawDocumentBuf),
    /// Sets fields that the document already has. Indexes over other fields are not touched.
    Set(RawDocumentBuf),
    Delete,
}

/// A command for the server.
pub struct MongoCommand {
    pub body: RawDocumentBuf,
    /// How many documents the command must insert or match.
    pub documents: usize,
}

impl DocumentWrite {
    /// The write that turns one document into the other; `None` if they are equal.
    ///
    /// # Errors
    /// If one of them is not valid BSON.
    pub fn between(
        id: &str,
        before: Option<&RawDocument>,
        after: Option<&RawDocument>,
    ) -> bson::error::Result<Option<Self>> {
        let change = match (before, after) {
            (None, None) => return Ok(None),
            (None, Some(after)) => Change::Insert(after.to_owned()),
            (Some(_), None) => Change::Delete,
            (Some(before), Some(after)) if before == after => return Ok(None),
            (Some(before), Some(after)) => match changed_fields(before, after)? {
                Some(fields) => Change::Set(fields),
                None => Change::Replace(after.to_owned()),
            },
        };
        Ok(Some(Self { id: id.to_owned(), change }))
    }

    /// Does what MongoDB does.
    ///
    /// # Panics
    /// If it would refuse the write, or write nothing.
    #[cfg(test)]
    pub fn apply_to(&self, documents: &mut std::collections::BTreeMap<String, RawDocumentBuf>) {
        let before = documents.remove(&self.id);
        assert_eq!(before.is_none(), matches!(self.change, Change::Insert(_)), "{self:?}");
        let after = match &self.change {
            Change::Insert(document) | Change::Replace(document) => document.clone(),
            Change::Set(fields) => {
                let mut after = RawDocumentBuf::new();
                for (name, value) in before.iter().flat_map(|before| before.iter()).map(Result::unwrap) {
                    after.append(name, fields.get(name).unwrap().unwrap_or(value));
                }
                after
            }
            Change::Delete => return,
        };
        documents.insert(self.id.clone(), after);
    }

    /// The write as an element of its command's list.
    fn statement(&self) -> RawDocumentBuf {
        let mut statement = rawdoc! { "q": { "_id": self.id.as_str() } };
        match &self.change {
            Change::Insert(document) => return document.clone(),
            Change::Replace(document) => statement.append(cstr!("u"), document),
            Change::Set(fields) => {
                let mut set = RawDocumentBuf::new();
                set.append(cstr!("$set"), fields);
                statement.append(cstr!("u"), set);
            }
            Change::Delete => statement.append(cstr!("limit"), 1),
        }
        statement
    }
}

/// The fields that differ; `None` if the two documents do not have the same fields in the same order, since setting
/// fields cannot turn one into the other then.
fn changed_fields(before: &RawDocument, after: &RawDocument) -> bson::error::Result<Option<RawDocumentBuf>> {
    let mut fields = RawDocumentBuf::new();
    let (mut before, mut after) = (before.iter(), after.iter());
    loop {
        let ((name, old), (new_name, new)) = match (before.next(), after.next()) {
            (Some(before), Some(after)) => (before?, after?),
            (None, None) => return Ok(Some(fields)),
            (Some(_), None) | (None, Some(_)) => return Ok(None),
        };
        // `$set` would read such a name as a path or an operator.
        if name != new_name || name.as_str().contains(['.', '$']) {
            return Ok(None);
        }
        if old != new {
            fields.append(name, new);
        }
    }
}

/// The commands that carry out the writes in a collection, each small enough to take a short time.
pub fn commands<'a>(
    collection: &'a str,
    writes: &'a [DocumentWrite],
) -> impl Iterator<Item = MongoCommand> + Send + 'a {
    let (mut inserts, mut updates, mut deletes) = (Vec::new(), Vec::new(), Vec::new());
    for write in writes {
        match write.change {
            Change::Insert(_) => inserts.push(write),
            Change::Replace(_) | Change::Set(_) => updates.push(write),
            Change::Delete => deletes.push(write),
        }
    }
    split(cstr!("insert"), cstr!("documents"), collection, inserts)
        .chain(split(cstr!("update"), cstr!("updates"), collection, updates))
        .chain(split(cstr!("delete"), cstr!("deletes"), collection, deletes))
}

fn split<'a>(
    verb: &'a CStr,
    list: &'a CStr,
    collection: &'a str,
    writes: Vec<&'a DocumentWrite>,
) -> impl Iterator<Item = MongoCommand> + Send + 'a {
    let mut statements = writes.into_iter().map(DocumentWrite::statement).peekable();
    std::iter::from_fn(move || {
        let first = statements.next()?;
        let mut bytes = first.as_bytes().len();
        let mut documents = 1;
        let mut array = RawArrayBuf::new();
        array.push(first);
        while let Some(statement) =
            statements.next_if(|next| documents < MAX_STATEMENTS && bytes + next.as_bytes().len() <= MAX_BYTES)
        {
            bytes += statement.as_bytes().len();
            documents += 1;
            array.push(statement);
        }
        let mut body = RawDocumentBuf::new();
        body.append(verb, collection);
        body.append(list, array);
        Some(MongoCommand { body, documents })
    })
}

/// Checks the reply to a command, which says `ok` even if statements failed.
///
/// # Errors
/// If a statement failed, or if the command did not write this many documents.
pub fn check(reply: &Document, documents: usize) -> anyhow::Result<()> {
    if let Some(error) = reply.get_array("writeErrors").ok().and_then(|errors| errors.first()?.as_document()) {
        // Not the message, which may quote what is stored.
        bail!("MongoDB refused a write with code {}", error.get_i32("code").unwrap_or_default());
    }
    let written = reply.get_i32("n").unwrap_or(-1);
    ensure!(
        usize::try_from(written) == Ok(documents),
        "{written} of {documents} documents were written: somebody else writes to this collection"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use bson::doc;

    use super::*;

    fn between(before: Option<RawDocumentBuf>, after: Option<RawDocumentBuf>) -> Option<Change> {
        DocumentWrite::between("1", before.as_deref(), after.as_deref()).unwrap().map(|write| write.change)
    }

    #[test]
    fn only_what_changed_is_set() {
        let before = rawdoc! { "_id": "1", "total": 5_i64, "lines": [{ "n": 1 }], "status": "placed" };
        let after = rawdoc! { "_id": "1", "total": 5_i64, "lines": [{ "n": 1 }], "status": "paid" };
        assert_eq!(between(Some(before.clone()), Some(after)), Some(Change::Set(rawdoc! { "status": "paid" })));
        assert_eq!(between(Some(before.clone()), Some(before)), None);
    }

    #[test]
    fn added_removed_and_oddly_named_fields_replace_the_document() {
        let before = rawdoc! { "_id": "1", "a": 1 };
        for after in [rawdoc! { "_id": "1" }, rawdoc! { "_id": "1", "a": 1, "b": 2 }, rawdoc! { "_id": "1", "b": 1 }] {
            assert_eq!(between(Some(before.clone()), Some(after.clone())), Some(Change::Replace(after)));
        }
        let (before, after) = (rawdoc! { "_id": "1", "a.b": 1 }, rawdoc! { "_id": "1", "a.b": 2 });
        assert_eq!(between(Some(before), Some(after.clone())), Some(Change::Replace(after)));
    }

    #[test]
    fn documents_are_inserted_and_deleted() {
        let document = rawdoc! { "_id": "1", "a": 1 };
        assert_eq!(between(None, Some(document.clone())), Some(Change::Insert(document.clone())));
        assert_eq!(between(Some(document), None), Some(Change::Delete));
        assert_eq!(between(None, None), None);
    }

    #[test]
    fn commands_are_small_enough_to_take_a_short_time() {
        let large = rawdoc! { "_id": "1", "text": "x".repeat(3 * (MAX_BYTES >> 3)) };
        let mut writes: Vec<_> =
            (0..5).map(|n| DocumentWrite { id: n.to_string(), change: Change::Insert(large.clone()) }).collect();
        writes.push(DocumentWrite { id: "5".to_owned(), change: Change::Delete });
        let commands: Vec<_> = commands("orders@1", &writes).collect();
        assert_eq!(commands.iter().map(|command| command.documents).collect::<Vec<_>>(), [2, 2, 1, 1]);
        assert!(commands.iter().all(|command| command.body.as_bytes().len() < MAX_BYTES + (1 << 10)));
        let delete = Document::try_from(&commands[3].body).unwrap();
        assert_eq!(delete, doc! { "delete": "orders@1", "deletes": [{ "q": { "_id": "5" }, "limit": 1 }] });
    }

    #[test]
    fn many_small_writes_are_split_into_commands_and_none_is_left_out() {
        let one = |n: usize| DocumentWrite { id: n.to_string(), change: Change::Set(rawdoc! { "stock": 1 }) };
        for (writes, split) in
            [(0, vec![]), (MAX_STATEMENTS, vec![MAX_STATEMENTS]), (MAX_STATEMENTS + 1, vec![MAX_STATEMENTS, 1])]
        {
            let writes: Vec<_> = (0..writes).map(one).collect();
            assert_eq!(commands("products@1", &writes).map(|command| command.documents).collect::<Vec<_>>(), split);
        }
        // A write that is larger than a command may be gets one to itself.
        let larger = rawdoc! { "_id": "1", "text": "x".repeat(2 * MAX_BYTES) };
        let writes = [one(0), DocumentWrite { id: "1".to_owned(), change: Change::Replace(larger) }, one(2)];
        assert_eq!(commands("products@1", &writes).map(|command| command.documents).collect::<Vec<_>>(), [1, 1, 1]);
    }

    #[test]
    fn a_reply_that_says_ok_may_report_failures() {
        assert!(check(&doc! { "ok": 1, "n": 2 }, 2).is_ok());
        assert!(check(&doc! { "ok": 1, "n": 1 }, 2).is_err());
        let failed = doc! { "ok": 1, "n": 2, "writeErrors": [{ "index": 1, "code": 11000, "errmsg": "duplicate" }] };
        assert!(check(&failed, 2).unwrap_err().to_string().contains("11000"));
    }
}
