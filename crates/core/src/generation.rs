//! Generations: 128 random bits that tell one running machine, one of its epochs, or one snapshot's memory, from every other.

use serde::{Deserialize, Serialize};

/// What was to be a generation is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a generation has 32 hexadecimal digits")]
pub struct GenerationError;

/// All generations have one form and must not be swapped: hence a type for each from one text.
macro_rules! generation {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            /// Makes a new one from the thread's cryptographic generator.
            #[must_use]
            pub fn random() -> Self {
                Self(rand::random())
            }

            /// The generation that these 16 bytes are, in the order in which its digits are written.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// Its 16 bytes, in the order in which its digits are written.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(&hex::encode(self.0))
            }
        }

        impl std::str::FromStr for $name {
            type Err = GenerationError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let mut bytes = [0; 16];
                hex::decode_to_slice(text, &mut bytes).map_err(|_| GenerationError)?;
                Ok(Self(bytes))
            }
        }

        impl TryFrom<String> for $name {
            type Error = GenerationError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(generation: $name) -> Self {
                generation.to_string()
            }
        }
    };
}

generation! {
    /// The identity of a running machine, which its guest can read (VMGENID). A fork gets a new one.
    VmGeneration
}

generation! {
    /// The identity of one epoch of a guest: each boot, each restore and each fork begins another.
    EpochId
}

generation! {
    /// The identity of one snapshot's memory. Every copy and every link of that memory has the same.
    MemoryGeneration
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_survives_its_string() {
        let generation = VmGeneration::random();
        let text = generation.to_string();
        assert_eq!(text.len(), 32);
        assert_eq!(text.parse(), Ok(generation));
        assert_ne!(VmGeneration::random(), generation);
    }

    #[test]
    fn its_digits_are_its_bytes_in_order() {
        let text = "000102030405060708090a0b0c0d0e0f";
        let generation: MemoryGeneration = text.parse().unwrap();
        assert_eq!(
            generation.as_bytes(),
            &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        );
        assert_eq!(serde_json::to_string(&generation).unwrap(), format!("\"{text}\""));
    }

    #[test]
    fn anything_but_32_digits_is_refused() {
        for wrong in [
            "",
            "00",
            "000102030405060708090a0b0c0d0e0g",
            "000102030405060708090a0b0c0d0e0f00",
        ] {
            assert_eq!(wrong.parse::<VmGeneration>(), Err(GenerationError), "{wrong:?}");
        }
    }
}
