//! The real router on a real Unix socket, in front of a real engine on a temporary directory. No VM is run: what needs
//! one is in `cargo xtask e2e`.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod bad_input;
mod guard;
mod images;
mod instances;
mod lifetime;
mod templates;
mod world;
