//! The ways in which a scenario's forks can be made.

use std::ffi::OsString;

use serde_json::{Value, json};

use crate::hypervisor::Hypervisor;

/// The memory modes in which forks are made once more; what is not named has the server's default, `cow`.
const MODES: [&str; 3] = ["copy", "uffd", "ondemand"];

/// How forks are made that do not say it themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// As the server does by default.
    Plain,
    /// In this memory mode.
    Mode(&'static str),
    /// From a pool of armed forks.
    Armed,
}

impl Way {
    /// Those that the hypervisor has.
    pub(super) fn all(hypervisor: &Hypervisor) -> Vec<Self> {
        let has = |mode: &&str| hypervisor.memory_modes.iter().any(|has| has == mode);
        let modes = MODES.into_iter().filter(has).map(Self::Mode);
        [Self::Plain]
            .into_iter()
            .chain(modes)
            .chain([Self::Armed])
            .collect()
    }

    /// What a scenario's name ends with.
    pub(super) fn suffix(self) -> String {
        match self {
            Self::Plain => String::new(),
            Self::Mode(mode) => format!("; in {mode}"),
            Self::Armed => "; armed".to_owned(),
        }
    }

    /// A request for forks, made this way.
    pub(super) fn request(self, mut request: Value) -> Value {
        if let Self::Mode(mode) = self
            && request.get("memory_mode").is_none()
        {
            request["memory_mode"] = json!(mode);
        }
        request
    }

    /// What its server is started with.
    pub(super) fn options(self) -> Vec<OsString> {
        match self {
            Self::Plain | Self::Mode(_) => Vec::new(),
            Self::Armed => vec!["--armed".into(), "4".into()],
        }
    }
}
