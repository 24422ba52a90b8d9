//! The terminal that this program runs in: its size, and raw mode while a command in a guest has it.

use std::io::{self, IsTerminal};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use stencil_api::exec::TerminalSize;

/// Of a terminal whose size cannot be told.
const USUAL: TerminalSize = TerminalSize {
    rows: 24,
    columns: 80,
};

/// How large it is now.
pub(crate) fn size() -> TerminalSize {
    match tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())) {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => TerminalSize {
            rows: size.ws_row,
            columns: size.ws_col,
        },
        _ => USUAL,
    }
}

/// Every key goes to the command as it is. Dropped, the terminal is as it was.
pub(crate) struct Raw(Termios);

impl Raw {
    /// `None` where the standard input is no terminal.
    pub(crate) fn enter() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        Ok(Some(Self(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone does not mind.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
