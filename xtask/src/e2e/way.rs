//! The ways in which a scenario's forks can be made.

use serde_json::{Value, json};

/// How forks are made that do not say it themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// As the server does by default.
    Plain,
    /// With their memory served by userfaultfd.
    Uffd,
    /// From a pool of armed forks.
    Armed,
}

impl Way {
    /// A request for forks, made this way.
    pub(super) fn request(self, mut request: Value) -> Value {
        if self == Self::Uffd && request.get("memory_mode").is_none() {
            request["memory_mode"] = json!("uffd");
        }
        request
    }

    /// What its server is started with.
    pub(super) fn options(self) -> &'static [&'static str] {
        match self {
            Self::Plain | Self::Uffd => &[],
            Self::Armed => &["--armed", "4"],
        }
    }
}
