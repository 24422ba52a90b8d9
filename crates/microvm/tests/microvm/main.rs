//! The real binary over its real socket, on the real /dev/kvm, with a small guest assembled into this test.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, helpers included"
)]

mod boots;
mod ends;
mod guest;
mod lost;
mod process;
mod replies;
mod served;
mod snapshots;
mod vmm;
mod waits;
