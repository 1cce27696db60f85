//! Whole numbers for sums. The invariant: no sum over events can overflow one. A number has up to 34 digits, as many as
//! a Decimal128 of MongoDB holds exactly. Positions are limited to 64 bits, and even if each of them added the largest
//! amount, the sum would be smaller.

use std::fmt;

use bson::Decimal128;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A whole number that is never below zero. It is a `Decimal128` in documents and a plain integer in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct WholeNumber(u128);

/// The exclusive upper bound: [`WholeNumber::MAX`] plus one.
const UPPER_BOUND: u128 = 10_u128.pow(WholeNumber::DIGITS);

/// A Decimal128 consists of a sign, an exponent of ten in 14 bits with this bias, and a coefficient in 113 bits.
const EXPONENT_BIAS: i32 = 6176;
const COEFFICIENT_BITS: u32 = 113;

impl WholeNumber {
    /// The largest number of digits.
    pub const DIGITS: u32 = 34;
    pub const ZERO: Self = Self(0);
    pub const MAX: Self = Self(UPPER_BOUND - 1);

    /// The sum; `None` if it is above [`WholeNumber::MAX`].
    pub fn checked_add(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).filter(|sum| *sum < UPPER_BOUND).map(Self)
    }

    /// The difference; `None` if it is below zero.
    pub fn checked_sub(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// The number in the bytes of a Decimal128; `None` if it is not a whole number from 0 to [`WholeNumber::MAX`]. Any
    /// exponent is accepted, since sums that MongoDB computes may have other exponents than stored numbers.
    pub fn from_decimal128(bytes: [u8; 16]) -> Option<Self> {
        let bits = u128::from_le_bytes(bytes);
        let coefficient = bits & ((1 << COEFFICIENT_BITS) - 1);
        let sign_and_exponent = u16::try_from(bits >> COEFFICIENT_BITS).ok()?;
        let (is_negative, exponent) = (sign_and_exponent >> 14 == 1, sign_and_exponent & 0x3fff);
        // These exponents stand for infinity, for NaN, and for coefficients that are too large.
        if exponent >> 12 == 3 || coefficient >= UPPER_BOUND || (is_negative && coefficient != 0) {
            return None;
        }
        let exponent = i32::from(exponent) - EXPONENT_BIAS;
        let power = 10_u128.checked_pow(exponent.unsigned_abs());
        let number = match (coefficient, power) {
            (0, _) => Some(0),
            (_, Some(power)) if exponent >= 0 => coefficient.checked_mul(power),
            (_, Some(power)) => coefficient.is_multiple_of(power).then_some(coefficient / power),
            (_, None) => None,
        };
        number.filter(|number| *number < UPPER_BOUND).map(Self)
    }

    /// The exponent is always 0, so that equal numbers have equal bytes.
    fn to_decimal128(self) -> Decimal128 {
        let exponent = EXPONENT_BIAS.unsigned_abs();
        Decimal128::from_bytes((u128::from(exponent) << COEFFICIENT_BITS | self.0).to_le_bytes())
    }
}

impl TryFrom<i64> for WholeNumber {
    type Error = std::num::TryFromIntError;

    fn try_from(number: i64) -> Result<Self, Self::Error> {
        u128::try_from(number).map(Self)
    }
}

impl fmt::Display for WholeNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for WholeNumber {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // JSON is human-readable in the terms of serde; BSON for documents is not.
        match serializer.is_human_readable() {
            true => serializer.serialize_u128(self.0),
            false => self.to_decimal128().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for WholeNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = match deserializer.is_human_readable() {
            true => Some(u128::deserialize(deserializer)?).filter(|number| *number < UPPER_BOUND).map(Self),
            false => Self::from_decimal128(Decimal128::deserialize(deserializer)?.bytes()),
        };
        number.ok_or_else(|| de::Error::custom("expected a whole number of at most 34 digits"))
    }
}

#[cfg(test)]
mod tests {
    use bson::RawBsonRef;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Holder {
        sum: WholeNumber,
    }

    fn decimal(text: &str) -> [u8; 16] {
        text.parse::<Decimal128>().unwrap().bytes()
    }

    #[test]
    fn no_sum_over_events_can_overflow() {
        let (events, largest) = (i64::MAX as u128, domain::MAX_AMOUNT as u128);
        assert!(events * largest < WholeNumber::MAX.0);
        let (lines, pieces) = (domain::order::MAX_LINES as u128, domain::order::MAX_QUANTITY as u128);
        assert!(events * lines * pieces < WholeNumber::MAX.0);
    }

    #[test]
    fn a_number_is_a_decimal_in_bson_and_an_integer_in_json() {
        for number in
            [0, 1, 10, 1_000, i64::MAX as u128 + 1, u128::from(u64::MAX) + 1, UPPER_BOUND / 10, WholeNumber::MAX.0]
        {
            let holder = Holder { sum: WholeNumber(number) };
            let bson = bson::serialize_to_raw_document_buf(&holder).unwrap();
            let digits = RawBsonRef::Decimal128(Decimal128::from_bytes(decimal(&number.to_string())));
            assert_eq!(bson.get("sum").unwrap(), Some(digits), "the `bson` crate encodes {number} differently");
            assert_eq!(bson::deserialize_from_slice::<Holder>(bson.as_bytes()).unwrap(), holder);
            let json = format!(r#"{{"sum":{number}}}"#);
            assert_eq!(serde_json::to_string(&holder).unwrap(), json);
            assert_eq!(serde_json::from_str::<Holder>(&json).unwrap(), holder);
        }
        for bad in [UPPER_BOUND.to_string(), "-1".to_owned(), "1.5".to_owned(), "null".to_owned()] {
            assert!(serde_json::from_str::<Holder>(&format!(r#"{{"sum":{bad}}}"#)).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_encoding_of_a_number_is_read_as_the_same_number() {
        for (text, number) in [
            ("1000", 1_000),
            ("1E+3", 1_000),
            ("1000.00", 1_000),
            ("0E+3", 0),
            ("0.000", 0),
            ("0E-6176", 0),
            ("0E+6111", 0),
            ("-0", 0),
            ("1E+33", 10_u128.pow(33)),
            ("9223372036854775808", 1 << 63),
        ] {
            assert_eq!(WholeNumber::from_decimal128(decimal(text)), Some(WholeNumber(number)), "{text}");
        }
    }

    #[test]
    fn other_numbers_are_not_read() {
        for text in ["-1", "0.5", "1E-6176", "1E+34", "1E+6111", "NaN", "Infinity", "-Infinity", "10E+33"] {
            assert_eq!(WholeNumber::from_decimal128(decimal(text)), None, "{text}");
        }
        // This coefficient of 113 bits has more than 34 digits.
        let mut bytes = WholeNumber::MAX.to_decimal128().bytes();
        bytes[..14].fill(0xff);
        bytes[14] |= 1;
        assert_eq!(WholeNumber::from_decimal128(bytes), None);
        let integer = bson::rawdoc! { "sum": 5_i64 };
        assert!(bson::deserialize_from_slice::<Holder>(integer.as_bytes()).is_err());
    }

    #[test]
    fn arithmetic_is_checked() {
        assert_eq!(WholeNumber(2).checked_add(WholeNumber(3)), Some(WholeNumber(5)));
        assert_eq!(WholeNumber::MAX.checked_add(WholeNumber::ZERO), Some(WholeNumber::MAX));
        assert_eq!(WholeNumber::MAX.checked_add(WholeNumber(1)), None);
        assert_eq!(WholeNumber(3).checked_sub(WholeNumber(2)), Some(WholeNumber(1)));
        assert_eq!(WholeNumber(2).checked_sub(WholeNumber(3)), None);
        assert!(WholeNumber::try_from(-1).is_err());
    }
}
