//! Tells what happens, step by step: a live line on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a live line moves.
const TICK: Duration = Duration::from_millis(100);

/// Does a step and tells that it is done and how long it took; a step that fails tells nothing.
pub(crate) fn step<T, E>(what: &str, act: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let began = Instant::now();
    let live = spinner(what);
    let outcome = act();
    live.finish_and_clear();
    if outcome.is_ok() {
        println!("{} {what:<58} {:>8}", mark(true), duration(began.elapsed()));
    }
    outcome
}

/// A line that moves while something is being done; nothing where standard error is no terminal.
fn spinner(what: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner().with_message(what.to_owned());
    bar.set_draw_target(live_target());
    bar.enable_steady_tick(TICK);
    bar
}

/// A bar that fills up from 0 to `length`; nothing where standard error is no terminal.
pub(crate) fn bar(what: &str, length: u64) -> ProgressBar {
    let bar = ProgressBar::new(length).with_message(what.to_owned());
    if let Ok(style) = ProgressStyle::with_template("  {msg} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar.set_draw_target(live_target());
    bar
}

fn live_target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// A mark for what holds or does not; in colour on a terminal.
pub(crate) fn mark(holds: bool) -> &'static str {
    match (holds, std::io::stdout().is_terminal()) {
        (true, true) => "\x1b[32m✓\x1b[0m",
        (true, false) => "✓",
        (false, true) => "\x1b[31m✗\x1b[0m",
        (false, false) => "✗",
    }
}

/// A duration for people: three digits at most before the unit.
pub(crate) fn duration(duration: Duration) -> String {
    let milliseconds = duration.as_secs_f64() * 1e3;
    if milliseconds < 10.0 {
        format!("{milliseconds:.1} ms")
    } else if milliseconds < 1000.0 {
        format!("{milliseconds:.0} ms")
    } else {
        format!("{:.1} s", milliseconds / 1e3)
    }
}

/// A number of bytes for people.
pub(crate) fn bytes(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// An error and its sources in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}
