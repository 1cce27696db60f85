//! Reads the text of a file of invoices, plain or gzipped, in UTF-8 or Latin-1. The bytes decide what the file is, not
//! its name. A file of another kind is refused with a sentence that says what it is.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use flate2::read::MultiGzDecoder;

use crate::unusable::Unusable;

const GZIP: &[u8] = &[0x1f, 0x8b];
/// The beginning of a ZIP archive, and so of an Excel workbook.
const ZIP: &[u8] = b"PK\x03\x04";
/// The beginning of an Excel workbook from before 2007.
const OLD_WORKBOOK: &[u8] = &[0xd0, 0xcf, 0x11, 0xe0];
const UTF_16: [&[u8]; 2] = [&[0xff, 0xfe], &[0xfe, 0xff]];
/// The characters of Windows-1252 from 0x80 on, where Latin-1 has control characters, which nobody writes into a CSV
/// file.
const WINDOWS_1252: [char; 32] = [
    '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}', '\u{90}', '‘', '’',
    '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
];

/// # Errors
/// If the file cannot be read, or does not hold text.
pub fn read(file: &Path) -> Result<String, Unusable> {
    let mut bytes = Vec::new();
    match File::open(file).and_then(|mut file| file.read_to_end(&mut bytes)) {
        Err(error) if error.kind() == io::ErrorKind::IsADirectory => return Err(Unusable::Directory),
        read => read?,
    };
    if bytes.starts_with(GZIP) {
        bytes = decompress(&bytes)?;
    }
    decode(bytes)
}

fn decompress(compressed: &[u8]) -> Result<Vec<u8>, Unusable> {
    let mut bytes = Vec::new();
    match MultiGzDecoder::new(compressed).read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Unusable::Truncated),
        Err(error) => Err(Unusable::CorruptGzip(error)),
    }
}

fn decode(bytes: Vec<u8>) -> Result<String, Unusable> {
    if bytes.starts_with(ZIP) || bytes.starts_with(OLD_WORKBOOK) {
        return Err(Unusable::Workbook);
    }
    if UTF_16.iter().any(|mark| bytes.starts_with(mark)) {
        return Err(Unusable::Utf16);
    }
    if bytes.contains(&0) {
        return Err(Unusable::Binary);
    }
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => error.as_bytes().iter().map(|byte| latin_1(*byte)).collect(),
    };
    // Excel puts a byte order mark in front of UTF-8.
    let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
    if text.trim().is_empty() { Err(Unusable::Empty) } else { Ok(text) }
}

fn latin_1(byte: u8) -> char {
    match byte {
        0x80..=0x9f => WINDOWS_1252[usize::from(byte - 0x80)],
        other => char::from(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_in_its_own_encoding() {
        let texts: [(&[u8], &str); 5] = [
            (b"a\xc2\xa3", "a£"),
            (b"\xef\xbb\xbfa\xc2\xa3", "a£"),
            (b"a\xa3", "a£"),
            (b"a\x92\x80\xff", "a’€ÿ"),
            (b"plain", "plain"),
        ];
        for (bytes, text) in texts {
            assert_eq!(decode(bytes.to_vec()).unwrap(), text, "{bytes:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_text_is_named_for_what_it_is() {
        assert!(matches!(decode(vec![]), Err(Unusable::Empty)));
        assert!(matches!(decode(b"\xef\xbb\xbf \r\n".to_vec()), Err(Unusable::Empty)));
        assert!(matches!(decode(b"PK\x03\x04\x14\0".to_vec()), Err(Unusable::Workbook)));
        assert!(matches!(decode(b"\xff\xfeI\0n\0".to_vec()), Err(Unusable::Utf16)));
        assert!(matches!(decode(b"\x7fELF\x02\x01\0".to_vec()), Err(Unusable::Binary)));
        assert!(matches!(decompress(b"\x1f\x8b"), Err(Unusable::Truncated)));
        assert!(matches!(decompress(b"\x1f\x8b\x07\0\0\0\0\0\0\0\0\0\0\0"), Err(Unusable::CorruptGzip(_))));
    }
}
