//! What an error reply says.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The body of an error: an array of strings, the outermost error first and its causes after it.
///
/// ```
/// use stencil_vmm_api::ErrorBody;
///
/// let body: ErrorBody = serde_json::from_str(r#"["Error from API","VM is not created"]"#)?;
/// assert_eq!(body.to_string(), "Error from API: VM is not created");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ErrorBody(pub Vec<String>);

impl ErrorBody {
    /// The messages of `error` and of all its sources, below Cloud Hypervisor's own outermost line.
    pub fn of(error: &dyn std::error::Error) -> Self {
        let mut lines = vec!["Error from API".to_owned()];
        let mut cause = Some(error);
        while let Some(error) = cause {
            lines.push(error.to_string());
            cause = error.source();
        }
        Self(lines)
    }
}

impl fmt::Display for ErrorBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(": "))
    }
}
