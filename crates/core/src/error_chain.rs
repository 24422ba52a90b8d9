//! An error with all of its causes in one line: for logs, and for reasons that are text.

use std::error::Error;

/// The message of `error` and those of its sources, outermost first. A source that only repeats what was said is left
/// out: some libraries put the text of a cause into their own.
#[must_use]
pub fn error_chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        source = cause.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{message}")]
    struct Outer {
        message: &'static str,
        source: io::Error,
    }

    fn chain(message: &'static str) -> String {
        error_chain(&Outer {
            message,
            source: io::ErrorKind::PermissionDenied.into(),
        })
    }

    #[test]
    fn a_cause_follows_what_it_caused() {
        assert_eq!(chain("could not read /a"), "could not read /a: permission denied");
    }

    #[test]
    fn a_cause_that_was_told_already_is_not_told_again() {
        assert_eq!(
            chain("could not read /a: permission denied"),
            "could not read /a: permission denied"
        );
    }

    #[test]
    fn an_error_without_a_cause_is_its_message() {
        assert_eq!(
            error_chain(&io::Error::from(io::ErrorKind::NotFound)),
            "entity not found"
        );
    }
}
