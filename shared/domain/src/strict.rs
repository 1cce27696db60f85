//! Deserializers for the parts of a request. Each accepts a single form, and its errors say what it expected.

use std::{fmt, marker::PhantomData};

use schemars::JsonSchema;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{
        self, IntoDeserializer, MapAccess, Unexpected,
        value::{Error, MapAccessDeserializer},
    },
};

/// A JSON object, read as `T`. A derived `Deserialize` would also accept an array, as the fields in their order.
pub(crate) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer.deserialize_map(Visitor(PhantomData)).map(Self)
    }
}

/// One of a few words, read as `T`. A derived `Deserialize` would also accept an object, and its error about a value of
/// another type does not list the words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
#[schemars(inline)]
pub struct Choice<T>(pub T);

impl<'de, T: for<'a> Deserialize<'a>> Deserialize<'de> for Choice<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor<T>(PhantomData<T>);

        impl<T: for<'a> Deserialize<'a>> Visitor<T> {
            fn read(text: &str) -> Result<T, Error> {
                T::deserialize(text.into_deserializer())
            }
        }

        impl<T: for<'a> Deserialize<'a>> de::Visitor<'_> for Visitor<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                // The words are taken from serde's error about an unknown one.
                let error = Self::read("").err().map(|error| error.to_string()).unwrap_or_default();
                f.write_str(error.rsplit_once(", expected ").map_or("a string", |(_, words)| words))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
                Self::read(text).map_err(|_| E::invalid_value(Unexpected::Str(text), &self))
            }
        }

        deserializer.deserialize_str(Visitor(PhantomData)).map(Self)
    }
}

/// Reads an optional field that has a default. `null` means the same as its absence.
///
/// # Errors
/// Returns those of `T`.
pub(crate) fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Reads a string and converts it with `read`. `expected` is a phrase to follow "expected".
///
/// # Errors
/// If the value is not a string, or `read` returns `None`.
pub fn text<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &'static str,
    read: fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    struct Visitor<T> {
        expected: &'static str,
        read: fn(&str) -> Option<T>,
    }

    impl<T> de::Visitor<'_> for Visitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.expected)
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.read)(text).ok_or_else(|| E::invalid_value(Unexpected::Str(text), &self))
        }
    }

    deserializer.deserialize_str(Visitor { expected, read })
}

/// Reads a string like [`text`], or `null`.
///
/// # Errors
/// Returns those of [`text`].
pub(crate) fn text_if_any<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &'static str,
    read: fn(&str) -> Option<T>,
) -> Result<Option<T>, D::Error> {
    struct Visitor<T> {
        expected: &'static str,
        read: fn(&str) -> Option<T>,
    }

    impl<'de, T> de::Visitor<'de> for Visitor<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.expected)
        }

        fn visit_none<E: de::Error>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_unit<E: de::Error>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
            text(deserializer, self.expected, self.read).map(Some)
        }
    }

    deserializer.deserialize_option(Visitor { expected, read })
}

/// Reads a whole number for which `allowed` returns true. `expected` is a phrase to follow "expected".
///
/// # Errors
/// If the value is not a number, has a fraction or an exponent, or is not allowed.
pub fn whole_number<'de, D: Deserializer<'de>>(
    deserializer: D,
    expected: fmt::Arguments<'_>,
    allowed: fn(i64) -> bool,
) -> Result<i64, D::Error> {
    struct Visitor<'a> {
        expected: fmt::Arguments<'a>,
        allowed: fn(i64) -> bool,
    }

    impl de::Visitor<'_> for Visitor<'_> {
        type Value = i64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_fmt(self.expected)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<i64, E> {
            if (self.allowed)(number) {
                return Ok(number);
            }
            Err(E::invalid_value(Unexpected::Signed(number), &self))
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<i64, E> {
            match i64::try_from(number) {
                Ok(number) => self.visit_i64(number),
                Err(_) => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
            }
        }

        fn visit_f64<E: de::Error>(self, number: f64) -> Result<i64, E> {
            let got = Unexpected::Float(number);
            // The parser reads whole numbers of more than 64 bits as floats.
            if number.abs() >= i64::MAX as f64 {
                Err(E::invalid_value(got, &self))
            } else {
                Err(E::invalid_type(got, &self))
            }
        }
    }

    deserializer.deserialize_i64(Visitor { expected, allowed })
}
