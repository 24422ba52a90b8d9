//! What the host and the agent inside a Linux guest say to each other, for both sides: messages, and the frames in which
//! they travel. They do no I/O: whoever holds the stream gives bytes to a [`Decoder`] and writes what [`encode`] makes.
//!
//! | module | role |
//! |---|---|
//! | [`message`] | what is said: [`ToGuest`], [`ToHost`] and their parts |
//! | [`frame`] | how a message becomes bytes, and how bytes that may be anything become messages |
//! | [`archive`] | files that go in and out, as what a command reads or writes |
//!
//! The stream is a pipe of bytes that outlives both sides: a host program may vanish in the middle of a frame, an agent may
//! be started anew, and a fork of a VM begins with whatever its template had half said. So frames find their own
//! beginning, and each one carries the [`Nonce`] of the conversation that it belongs to.
//!
//! A conversation:
//!
//! 1. The host picks a nonce that was never used and sends [`ToGuest::Hello`]. The agent forgets the conversation before,
//!    ends its sessions, and answers [`ToHost::Hello`]. Everything with another nonce is ignored from then on, by both.
//! 2. The host sends [`ToGuest::Epoch`] when the guest is a machine that it was not before: after boot and after each restore.
//!    The agent renews what must differ and lets the user's processes run: [`ToHost::EpochTaken`].
//! 3. Sessions: [`ToGuest::Exec`] begins one, [`ToHost::Exited`] or [`ToHost::ExecFailed`] ends it.
//! 4. Before a snapshot, [`ToGuest::Freeze`]: the user's processes stop until the next epoch.
//!
//! An agent that has just been started says [`ToHost::Hello`] with [`Nonce::NONE`]: who sees that begins at 1.
//!
//! **Flow control.** Each stream of a session may carry [`WINDOW`] bytes before its reader has granted more: the host by
//! [`ToGuest::Credit`] for output, the agent by [`ToHost::StdinCredit`] for input. So a reader that does not read stops
//! its own stream only, and nobody keeps more than a window of it in memory.
//!
//! ```
//! use std::num::NonZeroU64;
//!
//! use stencil_agent::{Decoder, Nonce, ToGuest, encode};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let nonce = Nonce::new(NonZeroU64::MIN); // a random one in earnest
//! let mut stream = b"the end of something else".to_vec();
//! encode(nonce, &ToGuest::Hello, &mut stream)?;
//!
//! let mut decoder = Decoder::<ToGuest>::new();
//! let mut unread = &stream[..];
//! assert!(decoder.next(&mut unread).unwrap().is_err()); // what came before the first frame
//! let frame = decoder.next(&mut unread).unwrap()?;
//! assert_eq!((frame.nonce, frame.message), (nonce, ToGuest::Hello));
//! assert!(decoder.next(&mut unread).is_none());
//! # Ok(())
//! # }
//! ```

pub mod archive;
pub mod frame;
pub mod message;

pub use frame::{Decoder, Frame, FrameError, MAX_FRAME, Nonce, TooLarge, VERSION, encode};
pub use message::{
    CHUNK, End, Entropy, Epoch, EpochId, Exec, ExecError, MAX_SESSIONS, Message, Output, SessionId, ToGuest,
    ToHost, TtySize, WINDOW,
};

/// The port on which the agent listens where the host reaches it by vsock.
pub const VSOCK_PORT: u32 = 1024;

/// The name of the virtio-serial port through which the host reaches the agent.
pub const PORT_NAME: &str = "org.stencil.agent";

/// What [`Exec::argv`] names first to run the agent itself, which brings files out and in without anything of the guest's:
/// `[PROGRAM, "pack", PATH]` writes an [`archive`] of `PATH` to its output, `[PROGRAM, "unpack", TARGET]` takes one from its input.
pub const PROGRAM: &str = "/proc/self/exe";
