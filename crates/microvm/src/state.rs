//! state.json: everything of a paused VM except its memory, device by device.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::identity::Identity;
use crate::machine::MachineState;
use crate::memory::MemoryRange;
use crate::serial::SerialState;
use crate::vcpu_state::VcpuState;

/// Names of the files in a snapshot's directory.
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const STATE: &str = "state.json";
pub(crate) const MEMORY: &str = "memory-ranges";

/// The version of the format that is written, and the only one that is read.
pub(crate) const STATE_VERSION: u32 = 1;

/// The content of state.json.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState {
    /// [`STATE_VERSION`].
    pub(crate) version: u32,
    /// Which VMM wrote it, such as `stencil-microvm 0.1.0`.
    pub(crate) vmm: String,
    /// Where the contents of memory-ranges belong; they lie in it one after the other.
    pub(crate) memory_ranges: Vec<MemoryRange>,
    pub(crate) identity: Identity,
    pub(crate) machine: MachineState,
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) devices: DeviceStates,
}

/// Devices outside KVM, each a field.
#[derive(Serialize, Deserialize)]
pub(crate) struct DeviceStates {
    pub(crate) serial: Option<SerialState>,
}

/// The version alone, to be read where the rest cannot be.
#[derive(Deserialize)]
pub(crate) struct StateHeader {
    pub(crate) version: u32,
}

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
