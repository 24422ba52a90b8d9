//! What goes over the wire when a command is run in a guest: as one request and one result, or as a WebSocket.
//!
//! The WebSocket, `GET /instances/{id}/exec`, is for input and output as they come. The client's first message is a text:
//! [`StreamCommand`] as JSON. From then on
//!
//! | | binary messages | text messages, as JSON |
//! |---|---|---|
//! | from the client | [`STDIN`] and bytes to read | [`ToCommand`] |
//! | from the server | [`STDOUT`] or [`STDERR`] and what was written | [`FromCommand`] |
//!
//! The server says [`FromCommand::Started`] first and [`FromCommand::Exited`] or [`FromCommand::Error`] last. A client that
//! hangs up before kills its command. Who does not read is not sent more than the connection holds.
//!
//! Standard input has credit: a client may send [`STDIN_WINDOW`] bytes, and then as many as [`FromCommand::StdinCredit`] grants. One
//! that keeps to it is heard at once, whatever its command reads. Of one that does not, no more is read until there is room:
//! what it says after its input waits behind it.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use stencil_engine::{Captured, End, Exec, ExecOutput, ExecRequest, Exited, TtySize};

use crate::ErrorBody;
use crate::error::ApiError;
use crate::reply::micros;
use crate::timeout::TimeLimit;

/// The first byte of a message with standard input.
pub const STDIN: u8 = 0;
/// The first byte of a message with standard output, or what came from the terminal.
pub const STDOUT: u8 = 1;
/// The first byte of a message with standard error.
pub const STDERR: u8 = 2;

/// How many bytes of standard input a client may send before it was granted more.
pub const STDIN_WINDOW: u32 = 256 << 10;

/// The most bytes of a message from the client.
pub const MESSAGE_LIMIT: usize = 64 << 10;

/// The body of `POST /instances/{id}/exec`: a command whose result is asked for as one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunCommand {
    /// The program, sought in `PATH` if it has no slash, and its arguments.
    pub cmd: Vec<String>,
    /// What is set in its environment.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its working directory; `/` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// What it reads, as text; nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin: Option<String>,
    /// The same, for what is no text; one of both at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdin_base64: Option<String>,
    /// After so long all of its processes are killed; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<TimeLimit>,
}

impl RunCommand {
    /// A command without anything special.
    pub fn new<S: Into<String>>(cmd: impl IntoIterator<Item = S>) -> Self {
        Self {
            cmd: cmd.into_iter().map(Into::into).collect(),
            env: BTreeMap::new(),
            cwd: None,
            stdin: None,
            stdin_base64: None,
            timeout: None,
        }
    }

    /// As the engine takes it.
    pub(crate) fn request(self) -> Result<ExecRequest, ApiError> {
        let stdin = match (self.stdin, self.stdin_base64) {
            (Some(_), Some(_)) => return Err(ApiError::invalid("it takes stdin or stdin_base64, not both")),
            (Some(text), None) => Bytes::from(text),
            (None, Some(base64)) => BASE64_STANDARD
                .decode(base64)
                .map_err(|error| ApiError::invalid(format!("stdin_base64 is no Base64: {error}")))?
                .into(),
            (None, None) => Bytes::new(),
        };
        Ok(ExecRequest {
            exec: Exec {
                argv: self.cmd,
                env: self.env.into_iter().collect(),
                cwd: self.cwd,
                timeout: self.timeout.map(TimeLimit::duration),
                tty: None,
                stdin: false,
            },
            stdin,
        })
    }
}

/// The reply of `POST /instances/{id}/exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandResult {
    /// How it ended.
    #[serde(flatten)]
    pub end: CommandEnd,
    /// The first MiB that it wrote to its standard output; what is no UTF-8 in it is replaced.
    pub stdout: String,
    /// The same bytes, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stdout_base64: Option<String>,
    /// The first MiB that it wrote to its standard error.
    pub stderr: String,
    /// The same bytes, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stderr_base64: Option<String>,
    /// It wrote more than is told here.
    pub truncated: bool,
    /// How long it took.
    pub timings: ExecTimings,
}

/// How a command ended: by itself with an exit code, or by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandEnd {
    /// Its exit code; absent if a signal ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    /// The signal that ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<u8>,
    /// It was killed because its time was over.
    pub timed_out: bool,
}

impl CommandEnd {
    /// As a shell has it: the exit code, or 128 and the signal; 124 when its time was over, as timeout(1) does.
    #[must_use]
    pub fn code(&self) -> u8 {
        match (self.exit_code, self.signal) {
            _ if self.timed_out => 124,
            (Some(code), _) => code,
            (None, Some(signal)) => 128_u8.saturating_add(signal),
            (None, None) => 1,
        }
    }
}

/// How long a command took, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecTimings {
    /// From the request to the result.
    pub total_us: u64,
    /// Of it, in the guest: from before the fork to the end of the process, on the guest's clock.
    pub guest_us: u64,
}

impl From<Exited> for CommandEnd {
    fn from(exited: Exited) -> Self {
        let (exit_code, signal) = match exited.end {
            End::Code(code) => (Some(code), None),
            End::Signal(signal) => (None, Some(signal)),
        };
        Self {
            exit_code,
            signal,
            timed_out: exited.timed_out,
        }
    }
}

impl From<ExecOutput> for CommandResult {
    fn from(output: ExecOutput) -> Self {
        let truncated = output.stdout.truncated || output.stderr.truncated;
        let (stdout, stdout_base64) = text(output.stdout);
        let (stderr, stderr_base64) = text(output.stderr);
        Self {
            end: output.exited.into(),
            stdout,
            stdout_base64,
            stderr,
            stderr_base64,
            truncated,
            timings: ExecTimings {
                total_us: micros(output.took),
                guest_us: micros(output.exited.took),
            },
        }
    }
}

/// What was written as text, and as Base64 where it is none. A character that was cut in two by the limit is left out.
fn text(captured: Captured) -> (String, Option<String>) {
    let mut bytes = captured.bytes;
    if let (true, Err(error)) = (captured.truncated, std::str::from_utf8(&bytes))
        && error.error_len().is_none()
    {
        bytes.truncate(error.valid_up_to());
    }
    match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(error) => {
            let base64 = BASE64_STANDARD.encode(error.as_bytes());
            (
                String::from_utf8_lossy(error.as_bytes()).into_owned(),
                Some(base64),
            )
        }
    }
}

/// The first message of a client on the WebSocket: a command whose input and output are passed on as they come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamCommand {
    /// As in [`RunCommand`].
    pub cmd: Vec<String>,
    /// As in [`RunCommand`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// As in [`RunCommand`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// After so long all of its processes are killed; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<TimeLimit>,
    /// A terminal of this size is its input and output; none when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<TerminalSize>,
    /// Whether it will be given input.
    #[serde(default)]
    pub stdin: bool,
}

impl From<StreamCommand> for Exec {
    fn from(asked: StreamCommand) -> Self {
        Self {
            argv: asked.cmd,
            env: asked.env.into_iter().collect(),
            cwd: asked.cwd,
            tty: asked.tty.map(TtySize::from),
            timeout: asked.timeout.map(TimeLimit::duration),
            stdin: asked.stdin,
        }
    }
}

/// The size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

impl From<TerminalSize> for TtySize {
    fn from(size: TerminalSize) -> Self {
        Self {
            rows: size.rows,
            columns: size.columns,
        }
    }
}

/// What a client does to a command that runs: `{"resize": {"rows": 24, "columns": 80}}`, `{"signal": 15}`, `"stdin_closed"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToCommand {
    /// Its terminal has another size.
    Resize(TerminalSize),
    /// Its process group gets this signal, by its number on x86-64 Linux.
    Signal(u8),
    /// Its standard input ends here.
    StdinClosed,
}

/// What the server tells of a command, beside its output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromCommand {
    /// It runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// So many more bytes of standard input may be sent.
    StdinCredit(u32),
    /// It ended, and all that it wrote was told.
    Exited(CommandEnd),
    /// It was not run, or is lost.
    Error(StreamError),
}

/// An error where there is no HTTP status any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamError {
    /// The status that a reply would have.
    pub status: u16,
    /// The error.
    #[serde(flatten)]
    pub body: ErrorBody,
}

impl From<ApiError> for FromCommand {
    fn from(error: ApiError) -> Self {
        Self::Error(StreamError {
            status: error.status.as_u16(),
            body: *error.body,
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn captured(bytes: &[u8], truncated: bool) -> Captured {
        Captured {
            bytes: bytes.to_vec(),
            truncated,
        }
    }

    #[test]
    fn output_is_text_and_base64_only_where_it_is_none() {
        assert_eq!(text(captured("é\n".as_bytes(), false)), ("é\n".to_owned(), None));
        let (lossy, base64) = text(captured(b"a\xff", false));
        assert_eq!((lossy.as_str(), base64.as_deref()), ("a\u{fffd}", Some("Yf8=")));
        assert_eq!(
            text(captured(b"a\xc3", true)),
            ("a".to_owned(), None),
            "cut in two"
        );
        assert!(text(captured(b"a\xc3", false)).1.is_some());
    }

    #[test]
    fn an_end_has_one_code() {
        let end = |json| serde_json::from_value::<CommandEnd>(json).unwrap().code();
        assert_eq!(end(json!({ "exit_code": 3, "timed_out": false })), 3);
        assert_eq!(end(json!({ "signal": 9, "timed_out": false })), 137);
        assert_eq!(end(json!({ "signal": 9, "timed_out": true })), 124);
    }

    #[test]
    fn messages_are_as_documented() {
        let said = [
            ToCommand::Resize(TerminalSize {
                rows: 24,
                columns: 80,
            }),
            ToCommand::Signal(15),
            ToCommand::StdinClosed,
        ];
        assert_eq!(
            serde_json::to_value(said).unwrap(),
            json!([{ "resize": { "rows": 24, "columns": 80 } }, { "signal": 15 }, "stdin_closed"])
        );
        let heard = [
            FromCommand::Started { pid: 7 },
            FromCommand::StdinCredit(65536),
            FromCommand::Exited(CommandEnd {
                exit_code: Some(0),
                signal: None,
                timed_out: false,
            }),
            ApiError::invalid("wrong").into(),
        ];
        assert_eq!(
            serde_json::to_value(heard).unwrap(),
            json!([
                { "started": { "pid": 7 } },
                { "stdin_credit": 65536 },
                { "exited": { "exit_code": 0, "timed_out": false } },
                { "error": { "status": 400, "code": "invalid_request", "message": "wrong", "details": {} } },
            ])
        );
    }

    #[test]
    fn input_is_text_or_base64() {
        let ask = |json| serde_json::from_value::<RunCommand>(json).unwrap().request();
        assert_eq!(
            ask(json!({ "cmd": ["cat"], "stdin": "é" })).unwrap().stdin,
            "é".as_bytes()
        );
        let binary = ask(json!({ "cmd": ["cat"], "stdin_base64": "AP8=", "timeout": 2 })).unwrap();
        assert_eq!(binary.stdin, &b"\0\xff"[..]);
        assert_eq!(binary.exec.timeout, Some(std::time::Duration::from_secs(2)));
        assert!(ask(json!({ "cmd": ["cat"], "stdin_base64": "?" })).is_err());
        assert!(ask(json!({ "cmd": ["cat"], "stdin": "", "stdin_base64": "" })).is_err());
    }
}
