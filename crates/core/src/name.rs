//! The name of an instance, as people choose it: `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, at most 63 characters, which
//! also makes it a valid host name.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A checked name: 1 to 63 characters of `a-z`, `0-9` and `-`, with a letter or a digit at both ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceName(String);

impl InstanceName {
    /// The most characters that a name may have; the limit of one label of a host name (RFC 1035, 2.3.4).
    pub const MAX_LENGTH: usize = 63;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is no name. Each message says what was wrong and what would be right.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is nothing.
    #[error("the name is empty: use 1 to 63 characters")]
    Empty,
    /// It is longer than [`InstanceName::MAX_LENGTH`].
    #[error("the name is {length} characters long: 63 is the most")]
    TooLong {
        /// How many characters it has.
        length: usize,
    },
    /// A character that a name may not have.
    #[error("the name has {character:?} at position {position}: use a-z, 0-9 and -")]
    BadCharacter {
        /// The first such character.
        character: char,
        /// Its place, in characters from 1.
        position: usize,
    },
    /// A hyphen at its beginning.
    #[error("the name begins with -: begin it with a letter or a digit")]
    BeginsWithHyphen,
    /// A hyphen at its end.
    #[error("the name ends with -: end it with a letter or a digit")]
    EndsWithHyphen,
}

fn check(text: &str) -> Result<(), NameError> {
    let length = text.chars().count();
    if length == 0 {
        return Err(NameError::Empty);
    }
    if length > InstanceName::MAX_LENGTH {
        return Err(NameError::TooLong { length });
    }
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if let Some((index, character)) = text.chars().enumerate().find(|&(_, c)| !allowed(c)) {
        return Err(NameError::BadCharacter {
            character,
            position: index + 1,
        });
    }
    if text.starts_with('-') {
        return Err(NameError::BeginsWithHyphen);
    }
    if text.ends_with('-') {
        return Err(NameError::EndsWithHyphen);
    }
    Ok(())
}

impl fmt::Display for InstanceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for InstanceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        check(text).map(|()| Self(text.to_owned()))
    }
}

impl TryFrom<String> for InstanceName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        check(&text).map(|()| Self(text))
    }
}

impl From<InstanceName> for String {
    fn from(name: InstanceName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn refusal(text: &str) -> String {
        text.parse::<InstanceName>().unwrap_err().to_string()
    }

    #[test]
    fn a_refusal_says_what_was_wrong_and_what_is_right() {
        assert_eq!(refusal(""), "the name is empty: use 1 to 63 characters");
        assert_eq!(
            refusal(&"a".repeat(64)),
            "the name is 64 characters long: 63 is the most"
        );
        assert_eq!(
            refusal("../x"),
            "the name has '.' at position 1: use a-z, 0-9 and -"
        );
        assert_eq!(
            refusal("webÄ"),
            "the name has 'Ä' at position 4: use a-z, 0-9 and -"
        );
        assert_eq!(
            refusal("web\n"),
            "the name has '\\n' at position 4: use a-z, 0-9 and -"
        );
        assert_eq!(
            refusal("-web"),
            "the name begins with -: begin it with a letter or a digit"
        );
        assert_eq!(
            refusal("web-"),
            "the name ends with -: end it with a letter or a digit"
        );
        assert_eq!(
            refusal("-"),
            "the name begins with -: begin it with a letter or a digit"
        );
    }

    #[test]
    fn names_at_the_limits_are_taken() {
        for name in ["a", "0", "a-b", "a--b", "0-0", &"a".repeat(63)] {
            assert_eq!(name.parse::<InstanceName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn json_carries_only_checked_names() {
        let name: InstanceName = serde_json::from_str("\"web-1\"").unwrap();
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"web-1\"");
        let error = serde_json::from_str::<InstanceName>("\"Web\"").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the name has 'W' at position 1: use a-z, 0-9 and -"
        );
    }

    /// The rule again, from its other side: a table of bytes and a walk over them.
    fn oracle(text: &str) -> bool {
        const INNER: &[u8] = b"abcdefghijklmnopqrstuvwxyz0123456789-";
        let ends = &INNER[..36];
        let bytes = text.as_bytes();
        match bytes {
            [] => false,
            [only] => ends.contains(only),
            [first, inner @ .., last] => {
                bytes.len() < 64
                    && ends.contains(first)
                    && ends.contains(last)
                    && inner.iter().all(|byte| INNER.contains(byte))
            }
        }
    }

    proptest! {
        #[test]
        fn names_near_the_rule_agree_with_the_oracle(text in "[a-c0-1A./ é-]{0,6}|[a-z0-9-]{55,70}") {
            prop_assert_eq!(text.parse::<InstanceName>().is_ok(), oracle(&text));
        }

        #[test]
        fn any_text_agrees_with_the_oracle(text: String) {
            prop_assert_eq!(text.parse::<InstanceName>().is_ok(), oracle(&text));
        }
    }
}
