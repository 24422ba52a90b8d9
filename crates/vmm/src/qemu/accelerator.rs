//! What executes a guest's instructions.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::probe_kvm;

/// What executes a guest's instructions in QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU itself, which translates them: some ten times slower, and possible everywhere.
    Tcg,
}

impl Accelerator {
    /// KVM where Linux guests run under it.
    pub(super) fn of_host() -> Self {
        match probe_kvm() {
            Ok(kind) if kind.runs_linux() => Self::Kvm,
            _ => Self::Tcg,
        }
    }

    /// Its name for `-accel`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}
