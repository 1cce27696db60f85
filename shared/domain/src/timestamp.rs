//! Timestamps in UTC, to the millisecond. They are passed in with the command or its envelope; nothing here reads a
//! clock.

use std::{fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::strict;

const EXPECTED: &str = "a time in RFC 3339 such as 2026-01-31T09:30:00Z";

/// A point in time, in milliseconds since 1970-01-01T00:00:00Z. On the wire and in documents it is RFC 3339 in UTC with
/// three decimals. All such texts have 24 characters, so they sort chronologically.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// The timestamp that many milliseconds after 1970-01-01T00:00:00Z.
    ///
    /// # Errors
    /// If it is outside the years 0 to 9999, whose texts would not sort chronologically.
    pub fn from_unix_millis(millis: i64) -> Result<Self, InvalidTimestamp> {
        match OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000) {
            Ok(time) if (0..=9999).contains(&time.year()) => Ok(Self(millis)),
            Ok(_) | Err(_) => Err(InvalidTimestamp),
        }
    }

    /// The milliseconds since 1970-01-01T00:00:00Z.
    pub fn unix_millis(self) -> i64 {
        self.0
    }

    /// The day in UTC, such as `2010-12-01`.
    pub fn day(self) -> String {
        let mut text = self.to_string();
        text.truncate(10);
        text
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The conversion cannot fail, since the constructors refuse timestamps out of its range.
        let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(self.0) * 1_000_000)
            .unwrap_or(OffsetDateTime::UNIX_EPOCH);
        write!(
            f,
            "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:03}Z",
            time.year(),
            u8::from(time.month()),
            time.day(),
            time.hour(),
            time.minute(),
            time.second(),
            time.millisecond()
        )
    }
}

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, InvalidTimestamp> {
        let time = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| InvalidTimestamp)?;
        let nanos = time.unix_timestamp_nanos();
        let millis = i64::try_from(nanos.div_euclid(1_000_000)).map_err(|_| InvalidTimestamp)?;
        Self::from_unix_millis(millis)
    }
}

/// The error for a text that is not a time in RFC 3339, or a time outside the years 0 to 9999.
#[derive(Debug, thiserror::Error)]
#[error("expected {EXPECTED}")]
pub struct InvalidTimestamp;

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        strict::text(deserializer, EXPECTED, |text| text.parse().ok())
    }
}

impl JsonSchema for Timestamp {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Timestamp".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "format": "date-time" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timestamp_is_written_in_utc_with_milliseconds() {
        let time: Timestamp = "2010-12-01T09:26:00+01:00".parse().unwrap();
        assert_eq!(time.to_string(), "2010-12-01T08:26:00.000Z");
        assert_eq!(time.day(), "2010-12-01");
        assert_eq!(Timestamp::from_unix_millis(time.unix_millis()).unwrap(), time);
    }

    #[test]
    fn a_timestamp_whose_text_would_not_sort_is_refused() {
        for bad in ["", "2010-12-01", "2010-13-01T00:00:00Z", "0000-01-01T00:00:00+01:00", "9999-12-31T23:59:59-01:00"]
        {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad}");
        }
        assert!(Timestamp::from_unix_millis(i64::MAX).is_err());
    }
}
