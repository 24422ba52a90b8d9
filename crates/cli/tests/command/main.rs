//! The real binary against a real server process: what it prints, and how it exits. No VM is run: what needs one is in
//! `cargo xtask e2e`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod client;
mod doctor;
mod exec;
mod hosted;
mod promises;
mod serve;
mod stencil;
mod usage;
