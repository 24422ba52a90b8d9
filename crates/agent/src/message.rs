//! What is said. The order of variants and fields is the wire format (see the crate's README): adding, removing or
//! reordering any of them asks for another [`VERSION`](crate::VERSION).

use std::fmt;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// How many bytes a stream of a session may carry before its reader has granted more.
pub const WINDOW: u32 = 256 << 10;

/// The most bytes of a stream in one message.
pub const CHUNK: usize = 32 << 10;

/// The most sessions that an agent has at a time.
pub const MAX_SESSIONS: usize = 256;

/// What can travel in a frame.
pub trait Message: Serialize + DeserializeOwned + sealed::Sealed {}

impl Message for ToGuest {}
impl Message for ToHost {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::ToGuest {}
    impl Sealed for super::ToHost {}
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Begins a conversation, under the frame's nonce. Answered by [`ToHost::Hello`].
    Hello,
    /// The guest is a new machine. Answered by [`ToHost::EpochTaken`] or [`ToHost::EpochFailed`].
    Epoch(Epoch),
    /// Stop the user's processes until the next epoch. Answered by [`ToHost::Frozen`] or [`ToHost::FreezeFailed`].
    Freeze,
    /// Run a command. Answered by [`ToHost::Started`] or [`ToHost::ExecFailed`].
    Exec {
        /// A number that this conversation has not used.
        session: SessionId,
        /// The command.
        exec: Exec,
    },
    /// Bytes for the command's standard input, at most [`CHUNK`]. They use up credit.
    Stdin {
        /// Whose.
        session: SessionId,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// The command's standard input ends here. A terminal gets its end-of-file character.
    StdinClosed {
        /// Whose.
        session: SessionId,
    },
    /// So many more bytes of output may come.
    Credit {
        /// Whose.
        session: SessionId,
        /// Which of its streams.
        stream: Output,
        /// How many bytes were taken since the last time.
        bytes: u32,
    },
    /// The terminal has another size.
    Resize {
        /// Whose.
        session: SessionId,
        /// The size.
        size: TtySize,
    },
    /// Send a signal to the command's process group.
    Signal {
        /// Whose.
        session: SessionId,
        /// The signal's number on x86-64 Linux.
        signal: u8,
    },
    /// Power the machine off. There is no answer.
    PowerOff,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// The agent is here.
    Hello {
        /// The last epoch that it took.
        epoch: Option<EpochId>,
        /// Whether the user's processes are stopped.
        frozen: bool,
    },
    /// The guest is the machine that the epoch says, and the user's processes run.
    EpochTaken {
        /// Which epoch.
        id: EpochId,
    },
    /// The guest could not become that machine; the user's processes stay stopped if they were.
    EpochFailed {
        /// Which epoch.
        id: EpochId,
        /// What failed, for a person.
        why: String,
    },
    /// The user's processes are stopped.
    Frozen,
    /// They could not be stopped.
    FreezeFailed {
        /// What failed, for a person.
        why: String,
    },
    /// The command runs.
    Started {
        /// Whose.
        session: SessionId,
        /// Its process id in the guest.
        pid: u32,
    },
    /// The command could not be run; the session is over.
    ExecFailed {
        /// Whose.
        session: SessionId,
        /// Of which kind the reason is.
        error: ExecError,
        /// The reason, for a person.
        why: String,
    },
    /// What the command wrote, at most [`CHUNK`] bytes. They use up credit.
    Output {
        /// Whose.
        session: SessionId,
        /// Where it wrote.
        stream: Output,
        /// The bytes.
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// So many more bytes of standard input may come.
    StdinCredit {
        /// Whose.
        session: SessionId,
        /// How many bytes the command took since the last time.
        bytes: u32,
    },
    /// The command ended and its output was sent; the session is over.
    Exited {
        /// Whose.
        session: SessionId,
        /// How the command ended.
        end: End,
        /// Whether it was killed because its time was over.
        timed_out: bool,
        /// From before the agent forked until the command's end was known, on the guest's monotonic clock.
        took: Duration,
    },
}

/// A session in its conversation; the host picks it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub u32);

/// The identity of an epoch: a UUID.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct EpochId(pub [u8; 16]);

impl fmt::Display for EpochId {
    /// As UUIDs are written: `00112233-4455-6677-8899-aabbccddeeff`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let dash = if matches!(index, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for EpochId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What makes a guest another machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Its identity.
    pub id: EpochId,
    /// Random bytes that nobody else was given.
    pub entropy: Entropy,
    /// The time when the host sent this, since 1970-01-01 00:00 UTC.
    pub wall_clock: Duration,
    /// The guest's host name: 1 to 64 bytes.
    pub host_name: String,
    /// What `/etc/machine-id` shall say in hexadecimal; not all zeros.
    pub machine_id: [u8; 16],
}

/// Fresh random bytes. They are secret, and in no log.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entropy(#[serde(with = "serde_bytes")] pub [u8; 64]);

impl fmt::Debug for Entropy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Entropy(..)")
    }
}

/// A command to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, sought in the command's `PATH` if it has no slash, and its arguments. Not empty.
    pub argv: Vec<String>,
    /// What is set beside, or instead of, the agent's own few variables.
    pub env: Vec<(String, String)>,
    /// Its working directory; `/` if there is none.
    pub cwd: Option<String>,
    /// A terminal of this size is its input, output and error. What it prints comes as [`Output::Stdout`].
    pub tty: Option<TtySize>,
    /// After so long the whole session is killed.
    pub timeout: Option<Duration>,
    /// Whether [`ToGuest::Stdin`] will come; else, and without a terminal, its standard input is empty.
    pub stdin: bool,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// Where a command writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Output {
    /// Its standard output, or its terminal.
    Stdout,
    /// Its standard error.
    Stderr,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// By itself, with this exit code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

/// Why a command could not be run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExecError {
    /// There is no such program.
    NotFound,
    /// It is there and cannot be executed.
    NotExecutable,
    /// The working directory is none.
    BadDirectory,
    /// The request cannot be carried out as it is: no program, a NUL byte, a session number that is in use.
    BadRequest,
    /// The guest has not taken an epoch yet, or its processes are stopped.
    NoEpoch,
    /// The agent has [`MAX_SESSIONS`] already.
    TooManySessions,
    /// The guest's kernel refused something else.
    Failed,
}
