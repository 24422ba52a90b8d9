//! Standard output: a table or a sentence for people, the API's JSON for programs.

use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// For whom it is printed.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reader {
    Person,
    Program,
}

impl Reader {
    pub(crate) const fn of(json: bool) -> Self {
        if json { Self::Program } else { Self::Person }
    }

    /// Prints `reply` as JSON for programs, and for people what `told` makes of it.
    pub(crate) fn print<T: Serialize>(
        self,
        reply: &T,
        told: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        match self {
            Self::Person => write(told(reply).as_bytes()),
            Self::Program => {
                let json = serde_json::to_string(reply).map_err(|error| Failure::Output(error.into()))?;
                write(json.as_bytes())
            }
        }?;
        write(b"\n")
    }
}

/// Writes bytes as they are, at once.
pub(crate) fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .map_err(Failure::Output)
}
