//! The id of an instance: a ULID in 26 lowercase characters, so that ids sort by the time of their making, as values
//! and as strings alike.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use ulid::{Generator, Ulid};

/// One generator for the process: ids made within the same millisecond are ordered, too.
static GENERATOR: Mutex<Generator> = Mutex::new(Generator::new());

/// Identifies an instance for all time. Unique, and ordered by the time at which it was made.
///
/// Written and parsed as 26 lowercase characters of Crockford's base 32, in exactly one form: an id is also the name
/// of a directory, so that two spellings of one id must not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceId(Ulid);

impl InstanceId {
    /// Makes a new id, greater than every other that this process has made.
    #[must_use]
    pub fn generate() -> Self {
        // A panic elsewhere cannot leave the generator half-changed: its state is one assignment.
        let mut generator = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        // The random part counts up within a millisecond. Where it overflows, go on in the next millisecond: later
        // ids follow, because the generator never falls behind its last id.
        Self(
            generator
                .generate()
                .unwrap_or_else(|overflow| overflow.commit_overflow_increment()),
        )
    }

    /// How many first characters of an id people may give instead of the whole id. Fewer are too easily all of a name, or of
    /// another instance's id once theirs is gone.
    pub const SHORTEST_PREFIX: usize = 8;

    /// The ids whose string begins with `prefix`: they follow each other. `None` if no id does.
    #[must_use]
    pub fn beginning_with(prefix: &str) -> Option<RangeInclusive<Self>> {
        // The first character goes to 7 only: 26 characters hold two bits more than an id has.
        let greatest = if prefix.is_empty() { "7" } else { prefix };
        Some(format!("{prefix:0<26}").parse().ok()?..=format!("{greatest:z<26}").parse().ok()?)
    }
}

/// What was to be an instance id is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "an instance id has 26 characters, digits and lowercase letters without i, l, o and u, and begins with 0 to 7"
)]
pub struct InstanceIdError;

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0.to_string().to_ascii_lowercase())
    }
}

impl FromStr for InstanceId {
    type Err = InstanceIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = Self(Ulid::from_string(text).map_err(|_| InstanceIdError)?);
        // ULID's own parser also takes uppercase and values that overflow; only the one form that we write is ours.
        if id.to_string() == text {
            Ok(id)
        } else {
            Err(InstanceIdError)
        }
    }
}

impl TryFrom<String> for InstanceId {
    type Error = InstanceIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<InstanceId> for String {
    fn from(id: InstanceId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_of_one_process_rise_as_values_and_as_strings() {
        let ids: Vec<InstanceId> = (0..10_000).map(|_| InstanceId::generate()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(
            ids.windows(2)
                .all(|pair| pair[0].to_string() < pair[1].to_string())
        );
    }

    #[test]
    fn ids_of_many_threads_are_distinct() {
        let threads: Vec<_> = (0..4)
            .map(|_| thread::spawn(|| (0..1000).map(|_| InstanceId::generate()).collect::<Vec<_>>()))
            .collect();
        let mut ids: Vec<_> = threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 4000);
    }

    #[test]
    fn only_the_one_spelling_parses() {
        let id = InstanceId::generate();
        let text = id.to_string();
        assert_eq!(text.len(), 26);
        assert_eq!(text.parse(), Ok(id));
        for wrong in [
            text.to_uppercase(),
            text[..25].to_owned(),
            format!("{text}0"),
            format!(" {text}"),
            "8zzzzzzzzzzzzzzzzzzzzzzzzz".to_owned(), // beyond 128 bits
            "0000000000000000000000000i".to_owned(),
            "0000000000000000000000000é".to_owned(),
            "../0000000000000000000000".to_owned(),
            String::new(),
        ] {
            assert_eq!(wrong.parse::<InstanceId>(), Err(InstanceIdError), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn every_id_survives_its_string(value: u128) {
            let id = InstanceId(Ulid::from(value));
            prop_assert_eq!(id.to_string().parse(), Ok(id));
        }

        #[test]
        fn ids_that_begin_alike_are_one_range(value: u128, other: u128, length in 0..27_usize) {
            let (id, other) = (InstanceId(Ulid::from(value)), InstanceId(Ulid::from(other)));
            let text = id.to_string();
            let range = InstanceId::beginning_with(&text[..length]).unwrap();
            prop_assert!(range.contains(&id));
            prop_assert_eq!(range.contains(&other), other.to_string().starts_with(&text[..length]));
        }

        #[test]
        fn what_no_id_begins_with_has_no_range(text in "\\PC{1,30}") {
            let is_prefix = text.len() <= 26
                && text.starts_with(|first| ('0'..='7').contains(&first))
                && text.chars().all(|c| "0123456789abcdefghjkmnpqrstvwxyz".contains(c));
            prop_assert_eq!(InstanceId::beginning_with(&text).is_some(), is_prefix);
        }

        #[test]
        fn order_of_strings_is_order_of_values(a: u128, b: u128) {
            let (a, b) = (InstanceId(Ulid::from(a)), InstanceId(Ulid::from(b)));
            prop_assert_eq!(a.cmp(&b), a.to_string().cmp(&b.to_string()));
        }
    }
}
