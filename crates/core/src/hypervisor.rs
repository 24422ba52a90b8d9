//! The name of a hypervisor backend. The core carries it and knows none of them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A name in kebab-case, like `microvm` or `cloud-hypervisor`: words of `a-z` and `0-9` joined by single hyphens.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HypervisorName(Cow<'static, str>);

impl HypervisorName {
    /// A backend's own name, checked when it is compiled if it is a constant.
    ///
    /// # Panics
    /// If `name` is not in kebab-case.
    ///
    /// ```
    /// use stencil_core::HypervisorName;
    ///
    /// const NAME: HypervisorName = HypervisorName::from_static("microvm");
    /// assert_eq!(NAME.as_str(), "microvm");
    /// ```
    #[must_use]
    pub const fn from_static(name: &'static str) -> Self {
        assert!(
            is_kebab_case(name),
            "the name of a hypervisor is not in kebab-case"
        );
        Self(Cow::Borrowed(name))
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What was to be a hypervisor's name is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name of a hypervisor is in kebab-case, like \"microvm\" or \"cloud-hypervisor\"")]
pub struct HypervisorNameError;

const fn is_kebab_case(text: &str) -> bool {
    let bytes = text.as_bytes();
    // Also true at the beginning: a hyphen is right only after a letter or a digit.
    let mut after_hyphen = true;
    let mut index = 0;
    while index < bytes.len() {
        let hyphen = bytes[index] == b'-';
        if hyphen && after_hyphen || !hyphen && !matches!(bytes[index], b'a'..=b'z' | b'0'..=b'9') {
            return false;
        }
        after_hyphen = hyphen;
        index += 1;
    }
    !after_hyphen
}

impl fmt::Display for HypervisorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for HypervisorName {
    type Err = HypervisorNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.to_owned().try_into()
    }
}

impl TryFrom<String> for HypervisorName {
    type Error = HypervisorNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if is_kebab_case(&text) {
            Ok(Self(Cow::Owned(text)))
        } else {
            Err(HypervisorNameError)
        }
    }
}

impl From<HypervisorName> for String {
    fn from(name: HypervisorName) -> Self {
        name.0.into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_kebab_case_is_a_name() {
        for name in ["microvm", "cloud-hypervisor", "a", "qemu-7-2"] {
            assert_eq!(name.parse::<HypervisorName>().unwrap().as_str(), name);
        }
        for wrong in ["", "-", "-a", "a-", "a--b", "QEMU", "a b", "../a", "é"] {
            assert_eq!(
                wrong.parse::<HypervisorName>(),
                Err(HypervisorNameError),
                "{wrong:?}"
            );
        }
    }
}
