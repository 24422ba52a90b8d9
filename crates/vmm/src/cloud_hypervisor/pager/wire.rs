//! The messages of Cloud Hypervisor's local migration, as bytes; integers are little-endian.
//!
//! Source: Cloud Hypervisor v53, `vm-migration/src/protocol.rs`, whose protocol version is 0.

use std::fmt;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What a message asks for, by its number on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Start = 1,
    Config = 2,
    State = 3,
    MemoryFd = 7,
    CompletePaused = 8,
    PageFault = 9,
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// The first two bytes of the connection on which pages are asked for (`ConnectionRole::Fault`).
pub(super) const FAULT_ROLE: [u8; 2] = 2_u16.to_le_bytes();

/// The head of a request; so many bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Request {
    pub(super) command: U16,
    /// With `Start` the first two say the protocol's version; else zero.
    pub(super) extra: [u8; 6],
    pub(super) length: U64,
}

impl Request {
    pub(super) fn new(command: Command, length: u64) -> Self {
        Self {
            command: U16::new(command as u16),
            extra: [0; 6],
            length: U64::new(length),
        }
    }
}

/// The head of a response; so many bytes of payload follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Response {
    pub(super) status: U16,
    pub(super) padding: [u8; 6],
    pub(super) length: U64,
}

impl Response {
    pub(super) const OK: u16 = 1;
    pub(super) const ERROR: u16 = 2;

    /// Done, with no payload: a page that was asked for lies in the shared memory.
    pub(super) fn ok() -> Self {
        Self {
            status: U16::new(Self::OK),
            padding: [0; 6],
            length: U64::ZERO,
        }
    }
}

/// A request for a page: its head, and which guest memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct PageFault {
    pub(super) head: Request,
    pub(super) gpa: U64,
    pub(super) length: U64,
}

impl PageFault {
    /// What its head says is the length of the rest.
    pub(super) const PAYLOAD: u64 = (size_of::<Self>() - size_of::<Request>()) as u64;
}
