//! The protocol: its bytes, and what it does with bytes that are not its own.
#![expect(
    clippy::unwrap_used,
    reason = "the functions that tests share fail like the tests themselves"
)]

mod hostile;
mod samples;
mod wire;
