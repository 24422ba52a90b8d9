//! Sizes of memory as people write them: `512MiB`, `"2 GiB"`, or a number of bytes.

use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// A size of memory in bytes. In JSON it is read from a number or a text and written as a number.
///
/// ```
/// use stencil_api::memory_size::MemorySize;
///
/// assert_eq!("512MiB".parse(), Ok(MemorySize(512 << 20)));
/// assert_eq!("4096".parse(), Ok(MemorySize(4096)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct MemorySize(pub u64);

impl Default for MemorySize {
    /// What an instance gets that does not ask: 512 MiB.
    fn default() -> Self {
        Self(512 << 20)
    }
}

/// What was to be a size is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemorySizeError {
    /// Neither a number nor a number with a unit.
    #[error("`{0}` is no size; give bytes, or a number with a unit, such as 512MiB or 2GiB")]
    Unreadable(String),
    /// `512M` is 512 MB to some and 512 MiB to others.
    #[error(
        "`{number}{unit}` can be read in two ways; say {number}{unit}iB (1024) or {number}{unit}B (1000)"
    )]
    TwoReadings {
        /// The number before the unit.
        number: String,
        /// The unit, one letter.
        unit: char,
    },
    /// More than a 64-bit number of bytes.
    #[error("`{0}` is more than any host has")]
    TooLarge(String),
}

impl FromStr for MemorySize {
    type Err = MemorySizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let unit_at = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = (&text[..unit_at], text[unit_at..].trim_start());
        if let ("k" | "m" | "g" | "t" | "p" | "e", Some(unit)) =
            (unit.to_ascii_lowercase().as_str(), unit.chars().next())
        {
            return Err(MemorySizeError::TwoReadings {
                number: number.to_owned(),
                unit: unit.to_ascii_uppercase(),
            });
        }
        let is_bytes = !number.is_empty() && unit_at == text.len() && !number.contains('.');
        let size = match number.parse::<u64>() {
            Ok(bytes) if is_bytes => ByteSize(bytes),
            Err(_) if is_bytes => return Err(MemorySizeError::TooLarge(text.to_owned())),
            // A fraction of a byte is no size: a point needs a unit. Without a number there is nothing to parse.
            _ if unit.is_empty() || number.is_empty() => {
                return Err(MemorySizeError::Unreadable(text.to_owned()));
            }
            _ => text
                .parse()
                .map_err(|_| MemorySizeError::Unreadable(text.to_owned()))?,
        };
        // The parser saturates; no host has that much.
        if size.as_u64() == u64::MAX {
            return Err(MemorySizeError::TooLarge(text.to_owned()));
        }
        Ok(Self(size.as_u64()))
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&ByteSize(self.0).display().iec().to_string())
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = MemorySize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size: a whole number of bytes, or a text such as \"512MiB\"")
    }

    fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<MemorySize, E> {
        Ok(MemorySize(bytes))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<MemorySize, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<MemorySize>().unwrap_err().to_string()
    }

    #[test]
    fn bytes_and_units_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("9007199254740993", 9_007_199_254_740_993),
            ("512MiB", 512 << 20),
            ("512 mib", 512 << 20),
            ("1.5GiB", 3 << 29),
            ("64KB", 64_000),
            ("100B", 100),
        ] {
            assert_eq!(text.parse(), Ok(MemorySize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_told_with_an_example() {
        for text in [
            "",
            "lots",
            "-1",
            "1e9",
            "12 parsecs",
            "1.5",
            ".",
            "MiB",
            "512MiB!",
            " 1MiB",
            "+5",
        ] {
            assert!(
                refusal(text).contains("is no size; give bytes"),
                "{text}: {}",
                refusal(text)
            );
        }
    }

    #[test]
    fn a_unit_with_two_readings_is_asked_back() {
        assert_eq!(
            refusal("512m"),
            "`512M` can be read in two ways; say 512MiB (1024) or 512MB (1000)"
        );
    }

    #[test]
    fn more_than_64_bits_is_too_large_and_not_cut() {
        for text in ["18446744073709551616", "99999999EiB", "16EiB"] {
            assert!(refusal(text).ends_with("is more than any host has"), "{text}");
        }
    }

    #[test]
    fn json_takes_numbers_and_texts_only() {
        assert_eq!(
            serde_json::from_str::<MemorySize>("4096").unwrap(),
            MemorySize(4096)
        );
        assert_eq!(
            serde_json::from_str::<MemorySize>("\"1GiB\"").unwrap(),
            MemorySize(1 << 30)
        );
        for wrong in ["-1", "1.5", "true", "null", "[1]", "{}"] {
            let error = serde_json::from_str::<MemorySize>(wrong).unwrap_err().to_string();
            assert!(
                error.contains("expected a size: a whole number of bytes"),
                "{wrong}: {error}"
            );
        }
    }
}
