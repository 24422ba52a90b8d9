//! How state.json has the structures of KVM.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

/// A structure of KVM's ABI, written as the hexadecimal digits of its bytes without the zeros at the end. So a later
/// kernel may add fields to it, and the tables that are mostly zero stay small.
#[derive(Clone, Copy, Default)]
pub(crate) struct Raw<T>(pub(crate) T);

impl<T: IntoBytes + Immutable> Serialize for Raw<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = self.0.as_bytes();
        let used = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        serializer.serialize_str(&hex::encode(&bytes[..used]))
    }
}

impl<'de, T: FromBytes + FromZeros + IntoBytes> Deserialize<'de> for Raw<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // JSON's strings can be borrowed where they hold no escapes, which digits never need.
        let digits = <&str>::deserialize(deserializer)?;
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        let length = digits.len() / 2;
        let Some(head) = bytes.get_mut(..length) else {
            return Err(D::Error::invalid_length(
                length,
                &format!("at most {}", size_of::<T>()).as_str(),
            ));
        };
        hex::decode_to_slice(digits, head).map_err(D::Error::custom)?;
        Ok(Self(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_at_the_end_are_not_written() {
        let text = serde_json::to_string(&Raw([1_u8, 0, 2, 0, 0, 0])).unwrap();
        assert_eq!(text, "\"010002\"");
        let back: Raw<[u8; 6]> = serde_json::from_str(&text).unwrap();
        assert_eq!(back.0, [1, 0, 2, 0, 0, 0]);
    }

    #[test]
    fn bytes_that_do_not_fit_are_an_error() {
        let error = serde_json::from_str::<Raw<[u8; 2]>>("\"010203\"").err().unwrap();
        assert!(
            error.to_string().contains("invalid length 3, expected at most 2"),
            "{error}"
        );
        assert!(serde_json::from_str::<Raw<[u8; 2]>>("\"01020\"").is_err());
        assert!(serde_json::from_str::<Raw<[u8; 2]>>("\"zz\"").is_err());
    }
}
