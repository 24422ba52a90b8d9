//! The program as a service, on a Unix socket, in namespaces of its own: what it renames is not this machine.
#![expect(
    clippy::unwrap_used,
    reason = "the functions that tests share fail like the tests themselves"
)]

mod archive;
mod conversation;
mod exec;
mod flow;
mod freeze;
mod host;
mod identity;
mod port;
mod renewal;
#[path = "../../../../fixtures/skipped.rs"]
mod skipped;
mod terminal;
