//! The CPU that a snapshot's vCPUs are like. A guest has found out what its CPU can do and goes on using that.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A host's CPU, as far as it matters to guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostCpu {
    /// Who made it, such as `GenuineIntel`.
    pub vendor: String,
    /// Its name, for people.
    pub model: String,
    /// What it can do: words of bits, each word with the same meaning on all hosts; a bit that is set is a feature.
    pub features: Vec<u32>,
}

impl HostCpu {
    /// Whether a guest that ran on `self` can go on on `here`: it is of the same vendor and can do all the same.
    #[must_use]
    pub fn can_go_on_on(&self, here: &Self) -> bool {
        let words_here = here.features.iter().copied().chain(std::iter::repeat(0));
        self.vendor == here.vendor
            && self
                .features
                .iter()
                .zip(words_here)
                .all(|(had, has)| had & !has == 0)
    }
}

impl fmt::Display for HostCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.model.is_empty() {
            &self.vendor
        } else {
            &self.model
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: &str, features: &[u32]) -> HostCpu {
        HostCpu {
            vendor: vendor.to_owned(),
            model: "A CPU".to_owned(),
            features: features.to_vec(),
        }
    }

    #[test]
    fn a_guest_goes_on_where_all_that_it_had_is_there() {
        let had = cpu("GenuineIntel", &[0b0110, 0b1000]);
        assert!(had.can_go_on_on(&had));
        assert!(had.can_go_on_on(&cpu("GenuineIntel", &[0b1111, 0b1000, 0b0001])));
        assert!(!had.can_go_on_on(&cpu("GenuineIntel", &[0b0111, 0b0000])));
        assert!(!had.can_go_on_on(&cpu("GenuineIntel", &[0b0110])));
        assert!(!had.can_go_on_on(&cpu("AuthenticAMD", &[0b0110, 0b1000])));
    }
}
