//! Whole numbers for sums. The invariant: no sum overflows in the life of a system. A number has up to 34 digits, which
//! MongoDB's Decimal128 keeps exactly. Positions, which have 64 bits, run out first: the largest amount times their
//! number is less.

use std::fmt;

use bson::Decimal128;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A whole number, never below zero: 128 bits here, a Decimal128 in documents, digits in JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Whole(u128);

/// The least number that is too large.
const END: u128 = 10_u128.pow(Whole::DIGITS);

/// A Decimal128 is a sign, an exponent of ten in 14 bits with this bias, and a coefficient in 113 bits.
const EXPONENT_BIAS: i32 = 6176;
const COEFFICIENT_BITS: u32 = 113;

impl Whole {
    /// The most digits of a number.
    pub const DIGITS: u32 = 34;
    pub const ZERO: Self = Self(0);
    pub const MAX: Self = Self(END - 1);

    /// The sum, unless it is above [`Whole::MAX`].
    pub fn plus(self, other: Self) -> Option<Self> {
        self.0.checked_add(other.0).filter(|sum| *sum < END).map(Self)
    }

    /// The difference, unless it is below zero.
    pub fn minus(self, other: Self) -> Option<Self> {
        self.0.checked_sub(other.0).map(Self)
    }

    /// Reads the bytes of a Decimal128; `None` if they are not a whole number from 0 to [`Whole::MAX`]. Any exponent is
    /// accepted, since a sum that MongoDB has computed may have another than the stored numbers.
    pub fn from_decimal128(bytes: [u8; 16]) -> Option<Self> {
        let bits = u128::from_le_bytes(bytes);
        let coefficient = bits & ((1 << COEFFICIENT_BITS) - 1);
        let sign_and_exponent = u16::try_from(bits >> COEFFICIENT_BITS).ok()?;
        let (is_negative, exponent) = (sign_and_exponent >> 14 == 1, sign_and_exponent & 0x3fff);
        // These exponents stand for infinity, for NaN, and for coefficients that are too large.
        if exponent >> 12 == 3 || coefficient >= END || (is_negative && coefficient != 0) {
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
        number.filter(|number| *number < END).map(Self)
    }

    /// The bytes of the Decimal128, always with the exponent 0, so that equal numbers have equal bytes.
    fn to_decimal128(self) -> Decimal128 {
        let exponent = EXPONENT_BIAS.unsigned_abs();
        Decimal128::from_bytes((u128::from(exponent) << COEFFICIENT_BITS | self.0).to_le_bytes())
    }
}

impl TryFrom<i64> for Whole {
    type Error = std::num::TryFromIntError;

    fn try_from(number: i64) -> Result<Self, Self::Error> {
        u128::try_from(number).map(Self)
    }
}

impl fmt::Display for Whole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for Whole {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Serde calls JSON human-readable, and the BSON that is stored not.
        match serializer.is_human_readable() {
            true => serializer.serialize_u128(self.0),
            false => self.to_decimal128().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Whole {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let decimal = Decimal128::deserialize(deserializer)?;
        Self::from_decimal128(decimal.bytes()).ok_or_else(|| de::Error::custom("expected a whole number"))
    }
}

#[cfg(test)]
mod tests {
    use bson::RawBsonRef;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Holder {
        sum: Whole,
    }

    fn decimal(text: &str) -> [u8; 16] {
        text.parse::<Decimal128>().unwrap().bytes()
    }

    #[test]
    fn no_life_of_the_system_overflows_a_sum() {
        let (events, largest) = (i64::MAX as u128, domain::MAX_AMOUNT as u128);
        assert!(events * largest < Whole::MAX.0);
        let (lines, pieces) = (domain::order::MAX_LINES as u128, domain::order::MAX_QUANTITY as u128);
        assert!(events * lines * pieces < Whole::MAX.0);
    }

    #[test]
    fn a_number_is_a_decimal_in_bson_and_digits_in_json() {
        for number in [0, 1, 10, 1_000, i64::MAX as u128 + 1, u128::from(u64::MAX) + 1, END / 10, Whole::MAX.0] {
            let holder = Holder { sum: Whole(number) };
            let bson = bson::serialize_to_raw_document_buf(&holder).unwrap();
            let digits = RawBsonRef::Decimal128(Decimal128::from_bytes(decimal(&number.to_string())));
            assert_eq!(bson.get("sum").unwrap(), Some(digits), "as the library encodes these digits");
            assert_eq!(bson::deserialize_from_slice::<Holder>(bson.as_bytes()).unwrap(), holder);
            assert_eq!(serde_json::to_string(&holder).unwrap(), format!(r#"{{"sum":{number}}}"#));
        }
    }

    #[test]
    fn every_form_of_a_number_is_read_as_the_one_number() {
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
            assert_eq!(Whole::from_decimal128(decimal(text)), Some(Whole(number)), "{text}");
        }
    }

    #[test]
    fn what_is_no_whole_number_is_not_read() {
        for text in ["-1", "0.5", "1E-6176", "1E+34", "1E+6111", "NaN", "Infinity", "-Infinity", "10E+33"] {
            assert_eq!(Whole::from_decimal128(decimal(text)), None, "{text}");
        }
        // This coefficient fits into 113 bits, and has more than 34 digits.
        let mut bytes = Whole::MAX.to_decimal128().bytes();
        bytes[..14].fill(0xff);
        bytes[14] |= 1;
        assert_eq!(Whole::from_decimal128(bytes), None);
        let integer = bson::rawdoc! { "sum": 5_i64 };
        assert!(bson::deserialize_from_slice::<Holder>(integer.as_bytes()).is_err());
    }

    #[test]
    fn sums_are_checked_at_both_ends() {
        assert_eq!(Whole(2).plus(Whole(3)), Some(Whole(5)));
        assert_eq!(Whole::MAX.plus(Whole::ZERO), Some(Whole::MAX));
        assert_eq!(Whole::MAX.plus(Whole(1)), None);
        assert_eq!(Whole(3).minus(Whole(2)), Some(Whole(1)));
        assert_eq!(Whole(2).minus(Whole(3)), None);
        assert!(Whole::try_from(-1).is_err());
    }
}
