//! The real binary over its real socket, on the real /dev/kvm, with a small guest assembled into this test.

mod boots;
mod ends;
mod guest;
mod process;
mod replies;
mod snapshots;
mod vmm;
