//! Real memory, real userfaultfd, threads that touch it.
#![expect(
    clippy::unwrap_used,
    reason = "the functions that tests share fail like the tests themselves"
)]

mod failing;
mod hot_pages;
mod image;
mod permission;
mod populating;
mod recording;
mod serving;
mod support;
