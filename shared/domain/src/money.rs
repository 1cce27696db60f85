//! Money is a whole number of minor units (pence, cents) of one currency, never a float. Arithmetic on it is checked.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::strict::{self, Object};

/// The largest price or total, in minor units. It is far above any real one, yet exact in JSON parsers that read all
/// numbers as doubles.
pub const MAX_AMOUNT: i64 = 1_000_000_000_000_000;

/// An amount of money.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(deny_unknown_fields)]
pub struct Money {
    /// Minor units of the currency, such as pence or cents, from 0 to 1,000,000,000,000,000.
    #[schemars(range(min = 0, max = MAX_AMOUNT))]
    pub amount: i64,
    /// ISO 4217.
    pub currency: Currency,
}

impl Money {
    /// The amount multiplied by `count`; `None` if the product is above [`MAX_AMOUNT`] or below 0.
    pub fn checked_mul(self, count: i64) -> Option<Self> {
        let amount = self.amount.checked_mul(count).filter(|amount| (0..=MAX_AMOUNT).contains(amount))?;
        Some(Self { amount, ..self })
    }

    /// The sum of two amounts; `None` if it is above [`MAX_AMOUNT`], or if the currencies differ.
    pub fn checked_add(self, other: Self) -> Option<Self> {
        let amount = self.amount.checked_add(other.amount).filter(|amount| *amount <= MAX_AMOUNT)?;
        (self.currency == other.currency).then_some(Self { amount, ..self })
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            amount: Amount,
            currency: Currency,
        }

        let Object(Fields { amount: Amount(amount), currency }) = Object::deserialize(deserializer)?;
        Ok(Self { amount, currency })
    }
}

/// Minor units of a request, from 0 to [`MAX_AMOUNT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[schemars(inline)]
pub struct Amount(#[schemars(range(min = 0, max = MAX_AMOUNT))] pub i64);

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let expected = format_args!("a whole number of minor units from 0 to {MAX_AMOUNT}");
        strict::whole_number(deserializer, expected, |amount| (0..=MAX_AMOUNT).contains(&amount)).map(Self)
    }
}

/// A currency that is or was in use, as its ISO 4217 code. Withdrawn currencies stay valid in orders of their time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Currency([u8; 3]);

impl Currency {
    /// The code, which is three upper-case letters.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// The first day on which the currency was no longer in use, such as `2023-01-01`; `None` if it still is.
    pub fn withdrawn(&self) -> Option<&'static str> {
        WITHDRAWN.iter().find(|(code, _)| code.as_bytes() == self.0).map(|(_, day)| *day)
    }
}

impl std::str::FromStr for Currency {
    type Err = InvalidCurrency;

    fn from_str(text: &str) -> Result<Self, InvalidCurrency> {
        let &[a, b, c] = text.as_bytes() else { return Err(InvalidCurrency) };
        let code = [a, b, c];
        // Each code takes four bytes with the space after it.
        let is_active = CODES.as_bytes().chunks(4).any(|active| active.starts_with(&code));
        if is_active || Self(code).withdrawn().is_some() { Ok(Self(code)) } else { Err(InvalidCurrency) }
    }
}

const EXPECTED: &str = "an ISO 4217 currency code such as EUR";

/// The error for a text that is not an ISO 4217 currency code.
#[derive(Debug, thiserror::Error)]
#[error("expected {EXPECTED}")]
pub struct InvalidCurrency;

impl fmt::Display for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Currency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Currency {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl<'de> Deserialize<'de> for Currency {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        strict::text(deserializer, EXPECTED, |text| text.parse().ok())
    }
}

impl JsonSchema for Currency {
    fn schema_name() -> Cow<'static, str> {
        "Currency".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^[A-Z]{3}$", "description": "ISO 4217" })
    }
}

/// The active codes of ISO 4217 (list one, 2026), without precious metals, funds, and codes for testing. A code that is
/// withdrawn has to move to the list below, since stored events and states that contain it must stay readable.
const CODES: &str = "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD \
    CAD CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD \
    HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD \
    MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG \
    QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD \
    TZS UAH UGX USD UYU UZS VED VES VND VUV WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG";

/// The codes that ISO 4217 has withdrawn since 1999 (list three), each with the first day on which the currency could
/// no longer be used for payments. Where a currency was withdrawn in steps, it is a day of the month that the list
/// gives.
const WITHDRAWN: &[(&str, &str)] = &[
    ("ADP", "2002-03-01"),
    ("AFA", "2003-01-01"),
    ("ANG", "2025-07-01"),
    ("AOR", "2000-02-01"),
    ("ATS", "2002-03-01"),
    ("AZM", "2006-01-01"),
    ("BEF", "2002-03-01"),
    ("BGL", "1999-07-05"),
    ("BGN", "2026-01-01"),
    ("BYB", "2001-01-01"),
    ("BYR", "2017-01-01"),
    ("CSD", "2006-10-25"),
    ("CUC", "2021-07-01"),
    ("CYP", "2008-01-01"),
    ("DEM", "2002-03-01"),
    ("ECS", "2000-09-15"),
    ("EEK", "2011-01-01"),
    ("ESP", "2002-03-01"),
    ("FIM", "2002-03-01"),
    ("FRF", "2002-03-01"),
    ("GHC", "2008-01-01"),
    ("GRD", "2002-03-01"),
    ("HRK", "2023-01-01"),
    ("IEP", "2002-03-01"),
    ("ITL", "2002-03-01"),
    ("LTL", "2015-01-01"),
    ("LUF", "2002-03-01"),
    ("LVL", "2014-01-01"),
    ("MGF", "2005-01-01"),
    ("MRO", "2018-01-01"),
    ("MTL", "2008-01-01"),
    ("MZM", "2006-07-01"),
    ("NLG", "2002-03-01"),
    ("PTE", "2002-03-01"),
    ("ROL", "2005-07-01"),
    ("RUR", "2004-01-01"),
    ("SDD", "2007-07-01"),
    ("SIT", "2007-01-01"),
    ("SKK", "2009-01-01"),
    ("SLL", "2024-01-01"),
    ("SRG", "2004-01-01"),
    ("STD", "2018-01-01"),
    ("TJR", "2001-04-01"),
    ("TMM", "2009-01-01"),
    ("TPE", "2002-05-20"),
    ("TRL", "2006-01-01"),
    ("VEB", "2008-01-01"),
    ("VEF", "2018-08-20"),
    ("YUM", "2003-07-01"),
    ("ZMK", "2013-01-01"),
    ("ZRN", "1999-07-01"),
    ("ZWD", "2006-08-22"),
    ("ZWL", "2024-09-01"),
    ("ZWN", "2008-08-01"),
    ("ZWR", "2009-06-01"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_checked() {
        let gbp = |amount| Money { amount, currency: "GBP".parse().unwrap() };
        assert_eq!(gbp(255).checked_mul(6), Some(gbp(1530)));
        assert_eq!(gbp(MAX_AMOUNT).checked_mul(2), None);
        assert_eq!(gbp(i64::MAX / 2).checked_mul(3), None);
        assert_eq!(gbp(1).checked_add(gbp(MAX_AMOUNT - 1)), Some(gbp(MAX_AMOUNT)));
        assert_eq!(gbp(1).checked_add(gbp(MAX_AMOUNT)), None);
        assert_eq!(gbp(1).checked_add(Money { amount: 1, currency: "EUR".parse().unwrap() }), None);
    }

    #[test]
    fn a_currency_is_either_in_use_or_has_a_day_of_withdrawal() {
        for code in CODES.split(' ') {
            assert_eq!(code.parse::<Currency>().unwrap().withdrawn(), None, "{code}");
        }
        for (code, day) in WITHDRAWN {
            let (currency, noon) = (code.parse::<Currency>().unwrap(), format!("{day}T12:00:00Z"));
            assert_eq!((currency.as_str(), currency.withdrawn()), (*code, Some(*day)));
            assert_eq!(noon.parse::<crate::Timestamp>().unwrap().day(), *day);
        }
    }

    #[test]
    fn only_real_currencies_are_parsed() {
        for bad in ["", "gbp", "GB", "GBPX", "XXX", "D A", "ZZZ"] {
            assert!(bad.parse::<Currency>().is_err(), "{bad}");
        }
    }
}
