//! How long to wait, and how long something may take, as people write it: `30`, `500ms`, `1m30s`, `2h`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use jiff::SignedDuration;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// How long a wait may take, or with another most something else: at most [`Timeout::MOST`].
///
/// ```
/// use std::time::Duration;
/// use stencil_api::timeout::Timeout;
///
/// let timeout: Timeout = "1m30s".parse()?;
/// assert_eq!(timeout.duration(), Duration::from_secs(90));
/// # Ok::<(), stencil_api::timeout::TimeoutError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(into = "String")]
pub struct Timeout<const MOST_SECONDS: u64 = 600>(Duration);

/// How long a command may take: up to 30 days.
pub type TimeLimit = Timeout<{ 30 * 24 * 3600 }>;

impl<const MOST_SECONDS: u64> Timeout<MOST_SECONDS> {
    /// The longest one.
    pub const MOST: Duration = Duration::from_secs(MOST_SECONDS);

    /// As a duration.
    #[must_use]
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl Default for Timeout {
    /// The wait of who does not say: 30 seconds.
    fn default() -> Self {
        Self(Duration::from_secs(30))
    }
}

/// What was to be a timeout is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TimeoutError {
    /// Neither seconds nor a duration with units.
    #[error("`{0}` is no time; give seconds, such as 30, or a unit too: 500ms, 30s, 2m, 12h")]
    Unreadable(String),
    /// Longer than [`Timeout::MOST`].
    #[error("`{text}` is too long; it takes at most {}", in_words(*most))]
    TooLong {
        /// What was given.
        text: String,
        /// What is the most.
        most: Duration,
    },
}

/// `10 minutes`, `30 days`.
fn in_words(most: Duration) -> String {
    const DAY: u64 = 24 * 3600;
    match most.as_secs() {
        seconds if seconds >= DAY => format!("{} days", seconds / DAY),
        seconds => format!("{} minutes", seconds / 60),
    }
}

impl<const MOST_SECONDS: u64> FromStr for Timeout<MOST_SECONDS> {
    type Err = TimeoutError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let duration = if is_number {
            // The only way in which digits are no number is that they are too many.
            text.parse().map(Duration::from_secs).unwrap_or(Duration::MAX)
        } else {
            text.parse::<SignedDuration>()
                .ok()
                .and_then(|duration| Duration::try_from(duration).ok())
                .ok_or_else(|| TimeoutError::Unreadable(text.to_owned()))?
        };
        duration
            .try_into()
            .map_err(|_: TimeoutError| TimeoutError::TooLong {
                text: text.to_owned(),
                most: Self::MOST,
            })
    }
}

impl<const MOST_SECONDS: u64> TryFrom<Duration> for Timeout<MOST_SECONDS> {
    type Error = TimeoutError;

    fn try_from(duration: Duration) -> Result<Self, Self::Error> {
        if duration <= Self::MOST {
            Ok(Self(duration))
        } else {
            Err(TimeoutError::TooLong {
                text: format!("{duration:?}"),
                most: Self::MOST,
            })
        }
    }
}

impl<'de, const MOST_SECONDS: u64> Deserialize<'de> for Timeout<MOST_SECONDS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TimeVisitor::<MOST_SECONDS>)
    }
}

struct TimeVisitor<const MOST_SECONDS: u64>;

impl<const MOST_SECONDS: u64> Visitor<'_> for TimeVisitor<MOST_SECONDS> {
    type Value = Timeout<MOST_SECONDS>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a time: a whole number of seconds, or a text such as \"500ms\"")
    }

    fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Self::Value, E> {
        Duration::from_secs(seconds).try_into().map_err(E::custom)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
        text.parse().map_err(E::custom)
    }
}

impl<const MOST_SECONDS: u64> From<Timeout<MOST_SECONDS>> for String {
    fn from(timeout: Timeout<MOST_SECONDS>) -> Self {
        timeout.to_string()
    }
}

impl<const MOST_SECONDS: u64> fmt::Display for Timeout<MOST_SECONDS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}ms", self.0.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_and_units_are_read() {
        for (text, millis) in [
            ("30", 30_000),
            ("0", 0),
            ("500ms", 500),
            ("30s", 30_000),
            ("2m", 120_000),
            ("1m 30s", 90_000),
        ] {
            assert_eq!(
                text.parse::<Timeout>().unwrap().duration(),
                Duration::from_millis(millis),
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let timeout: Timeout = "1m30s".parse().unwrap();
        assert_eq!(timeout.to_string().parse(), Ok(timeout));
    }

    #[test]
    fn what_is_no_time_is_told_with_an_example() {
        for text in ["", "soon", "-3s", "3 parsecs", "1.5.2s"] {
            let error = text.parse::<Timeout>().unwrap_err();
            assert!(
                error.to_string().contains("is no time; give seconds"),
                "{text}: {error}"
            );
        }
    }

    #[test]
    fn more_than_ten_minutes_is_refused() {
        for text in ["601", "11m", "99999999999999999999"] {
            assert_eq!(
                text.parse::<Timeout>(),
                Err(TimeoutError::TooLong {
                    text: text.to_owned(),
                    most: Timeout::<600>::MOST
                })
            );
        }
        let said = "31d".parse::<TimeLimit>().unwrap_err().to_string();
        assert!(said.contains("is no time"), "days are 24 hours: {said}");
        let said = "721h".parse::<TimeLimit>().unwrap_err().to_string();
        assert_eq!(said, "`721h` is too long; it takes at most 30 days");
        assert!("720h".parse::<TimeLimit>().is_ok());
        assert_eq!("10m".parse::<Timeout>().unwrap().duration(), Timeout::<600>::MOST);
    }
}
