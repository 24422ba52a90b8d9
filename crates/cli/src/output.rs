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
            // Some of it are words of guests and of other clients.
            Self::Person => write(printable(&told(reply)).as_bytes()),
            Self::Program => {
                let json = serde_json::to_string(reply).map_err(|error| Failure::Output(error.into()))?;
                write(json.as_bytes())
            }
        }?;
        write(b"\n")
    }
}

/// Text of several lines in which nothing moves the cursor, changes colours or rings the bell of a terminal: control characters are
/// escaped.
pub(crate) fn printable(text: &str) -> String {
    escaped(text, |char| char.is_control() && char != '\n')
}

/// The same of text that is one line.
pub(crate) fn one_line(text: &str) -> String {
    escaped(text, char::is_control)
}

fn escaped(text: &str, is_bad: fn(char) -> bool) -> String {
    let mut told = String::with_capacity(text.len());
    for char in text.chars() {
        if is_bad(char) {
            told.extend(char.escape_default());
        } else {
            told.push(char);
        }
    }
    told
}

/// Writes bytes as they are, at once.
pub(crate) fn write(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = io::stdout().lock();
    output
        .write_all(bytes)
        .and_then(|()| output.flush())
        .map_err(Failure::Output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_told_moves_the_cursor() {
        let words = "é\u{1b}[2J\r\u{9b}1m\u{7}\n\tend";
        assert_eq!(printable(words), "é\\u{1b}[2J\\r\\u{9b}1m\\u{7}\n\\tend");
        assert_eq!(one_line("a\nb"), "a\\nb");
    }
}
