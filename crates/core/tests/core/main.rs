//! Tests of the crate's surface, by subject.
#![expect(
    clippy::unwrap_used,
    reason = "the functions that tests share fail like the tests themselves"
)]

mod crash;
#[path = "../../../../fixtures/disk.rs"]
mod disk;
mod docs;
mod fork;
mod given;
mod images;
mod lock;
mod metadata;
mod model;
mod observe;
mod power_loss;
mod rules;
#[path = "../../../../fixtures/skipped.rs"]
mod skipped;
mod snapshot;
mod state;
mod store;
mod unreadable;
