//! A conversation with a QEMU by its machine protocol, QMP: one JSON object a line; a greeting, then commands and replies one
//! at a time, with events in between.
//!
//! Source: QEMU, docs/interop/qmp-spec and qapi/*.json, as of 7.2. What comes from the other side is bounded: in size by
//! [`MAX_REPLY_BYTES`] a line, in time by the deadline of the call that the conversation is for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Deserialize;
use serde_json::{Value, json};
use stencil_core::InstanceDir;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout_at};

use crate::descriptor::send_with;
use crate::rest::utf8;
use crate::{Call, MAX_REPLY_BYTES, VmmError};

/// What an open file is called in QEMU after it was handed over.
const HANDED_OVER: &str = "state";

/// Tells this server's commands apart; its process id goes before it.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// An open conversation; dropping it closes the connection, and QEMU then accepts the next one.
#[derive(Debug)]
pub(super) struct Monitor {
    call: Call,
    until: Instant,
    stream: BufReader<UnixStream>,
    /// The id of the command that opened it.
    opening: u64,
    /// There when the greeting and the reply to what opened the conversation have been read.
    version: Option<String>,
}

/// What QEMU says that its VM does (qapi/run-state.json, `RunState`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RunState {
    Prelaunch,
    Inmigrate,
    Running,
    Suspended,
    Paused,
    Debug,
    IoError,
    FinishMigrate,
    Postmigrate,
    SaveVm,
    RestoreVm,
    Watchdog,
    Colo,
    Shutdown,
    GuestPanicked,
    InternalError,
}

/// One line from QEMU: one of its fields is there.
#[derive(Debug, Deserialize)]
struct Line {
    /// Of the command that a reply is to; not there where QEMU could not read the command.
    id: Option<u64>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
    event: Option<String>,
    data: Option<Value>,
    #[serde(rename = "QMP")]
    greeting: Option<Greeting>,
}

#[derive(Debug, Deserialize)]
struct Refusal {
    desc: String,
}

#[derive(Debug, Deserialize)]
struct Greeting {
    version: GreetingVersion,
}

#[derive(Debug, Deserialize)]
struct GreetingVersion {
    qemu: Version,
}

#[derive(Debug, Deserialize)]
struct Version {
    major: u32,
    minor: u32,
    micro: u32,
}

#[derive(Debug, Deserialize)]
struct StatusReply {
    status: RunState,
}

#[derive(Debug, Deserialize)]
struct MigrationEvent {
    status: String,
}

impl Monitor {
    /// Connects to the QEMU in `dir` for one call, which has the call's deadline from here to its end.
    ///
    /// Nothing is waited for: what opens a conversation goes out at once, and its replies are read before that of the first
    /// command. To ask for the status takes one turn instead of three.
    pub(super) async fn open(dir: &InstanceDir, call: Call) -> Result<Self, VmmError> {
        let until = Instant::now() + call.deadline();
        let socket = dir.vmm_socket();
        let stream = UnixStream::connect(&socket)
            .await
            .map_err(|source| VmmError::Connect { call, socket, source })?;
        let mut monitor = Self {
            call,
            until,
            stream: BufReader::new(stream),
            opening: 0,
            version: None,
        };
        monitor.opening = monitor.send("qmp_capabilities", &json!({}), None).await?;
        Ok(monitor)
    }

    /// The version of this QEMU, such as `7.2.22`.
    pub(super) async fn version(&mut self) -> Result<String, VmmError> {
        if let Some(version) = &self.version {
            return Ok(version.clone());
        }
        let greeting = loop {
            match self.line().await? {
                Line {
                    greeting: Some(greeting),
                    ..
                } => break greeting,
                // Of something that happened while QEMU took the connection, which still has the last one's rights then.
                Line { event: Some(_), .. } | Line { id: Some(_), .. } => {}
                _ => return Err(self.unexpected("a greeting")),
            }
        };
        let Version { major, minor, micro } = greeting.version.qemu;
        self.reply("qmp_capabilities", self.opening).await?;
        let version = format!("{major}.{minor}.{micro}");
        self.version = Some(version.clone());
        Ok(version)
    }

    /// What the VM does.
    pub(super) async fn status(&mut self) -> Result<RunState, VmmError> {
        let reply = self.execute("query-status", &json!({})).await?;
        self.parse::<StatusReply>(reply).map(|reply| reply.status)
    }

    /// Refuses the call unless the VM does this.
    pub(super) async fn expect(&mut self, state: RunState) -> Result<(), VmmError> {
        let found = self.status().await?;
        if found == state {
            Ok(())
        } else {
            Err(self.refused(format!("the VM is {found:?}; it takes one that is {state:?}")))
        }
    }

    /// Lets the vCPUs run.
    pub(super) async fn cont(&mut self) -> Result<(), VmmError> {
        self.execute("cont", &json!({})).await.map(drop)
    }

    /// Stops the vCPUs.
    pub(super) async fn stop(&mut self) -> Result<(), VmmError> {
        self.execute("stop", &json!({})).await.map(drop)
    }

    /// Presses the machine's power button.
    pub(super) async fn press_power_button(&mut self) -> Result<(), VmmError> {
        self.execute("system_powerdown", &json!({})).await.map(drop)
    }

    /// Asks QEMU to end.
    pub(super) async fn quit(&mut self) -> Result<(), VmmError> {
        self.execute("quit", &json!({})).await.map(drop)
    }

    /// Where the guest's memory is in QEMU's own address space: all of it is one range, which begins with address 0.
    pub(super) async fn memory_address(&mut self) -> Result<u64, VmmError> {
        let arguments = json!({ "command-line": "gpa2hva 0" });
        let said = self.execute("human-monitor-command", &arguments).await?;
        // "Host virtual address for 0x0 (ram) is 0x7f302be00000"
        said.as_str()
            .and_then(|said| said.split_ascii_whitespace().next_back()?.strip_prefix("0x"))
            .and_then(|address| u64::from_str_radix(address, 16).ok())
            .ok_or_else(|| self.unexpected("an address"))
    }

    /// Writes the state of the vCPUs and devices of a VM that does not run, without its memory.
    ///
    /// Xen's toolstack gave the command its name; every QEMU has it. It is the one that leaves memory out whatever it is
    /// made of: the capability `x-ignore-shared` of a migration does so for memory that is shared, and a fork's is private.
    pub(super) async fn save_devices(&mut self, file: &Path) -> Result<(), VmmError> {
        // `live`: QEMU keeps its disks.
        let arguments = json!({ "filename": utf8(file)?, "live": false });
        self.execute("xen-save-devices-state", &arguments).await.map(drop)
    }

    /// Loads what [`save_devices`](Self::save_devices) wrote into a VM that waits for it, and waits until it is paused.
    pub(super) async fn load_devices(&mut self, file: BorrowedFd<'_>) -> Result<(), VmmError> {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", &events).await?;
        let name = json!({ "fdname": HANDED_OVER });
        self.execute_with("getfd", &name, Some(file)).await?;
        let from = json!({ "uri": format!("fd:{HANDED_OVER}") });
        self.execute("migrate-incoming", &from).await?;
        // Where it fails, QEMU says why in its log and ends.
        while self.migration_status().await? != "completed" {}
        Ok(())
    }

    /// The next change of a migration's status.
    async fn migration_status(&mut self) -> Result<String, VmmError> {
        loop {
            let Line { event, data, .. } = self.line().await?;
            if event.as_deref() == Some("MIGRATION") {
                let event: MigrationEvent = self.parse(data.unwrap_or_default())?;
                return Ok(event.status);
            }
        }
    }

    async fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, VmmError> {
        self.execute_with(command, arguments, None).await
    }

    /// Sends a command, with an open file where it takes one, and waits for its reply.
    async fn execute_with(
        &mut self,
        command: &str,
        arguments: &Value,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<Value, VmmError> {
        let id = self.send(command, arguments, file).await?;
        // It is in what comes before this command's reply, the first time.
        self.version().await?;
        self.reply(command, id).await
    }

    /// Sends a command; the id that its reply will have.
    async fn send(
        &mut self,
        command: &str,
        arguments: &Value,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<u64, VmmError> {
        let id = u64::from(std::process::id()) << 32 | NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let mut request = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        request.push('\n');
        let sent = timeout_at(self.until, send(self.stream.get_mut(), request.as_bytes(), file)).await;
        match sent {
            Ok(sent) => sent.map(|()| id).map_err(|source| self.hung_up(source)),
            Err(_elapsed) => Err(self.too_late()),
        }
    }

    /// The reply to `command`, which was sent with this id. One to a command of a conversation that was given up may come before.
    async fn reply(&mut self, command: &str, id: u64) -> Result<Value, VmmError> {
        loop {
            match self.line().await? {
                Line { id: Some(other), .. } if other != id => {}
                Line {
                    answer: Some(answer), ..
                } => return Ok(answer),
                Line {
                    error: Some(refusal), ..
                } => return Err(self.refused(format!("{command}: {}", refusal.desc))),
                Line { event: Some(_), .. } => {}
                _ => return Err(self.unexpected("a reply")),
            }
        }
    }

    async fn line(&mut self) -> Result<Line, VmmError> {
        let mut line = Vec::new();
        let limit = MAX_REPLY_BYTES as u64 + 1;
        let mut bounded = (&mut self.stream).take(limit);
        let read = timeout_at(self.until, bounded.read_until(b'\n', &mut line)).await;
        match read {
            Err(_elapsed) => Err(self.too_late()),
            Ok(Err(source)) => Err(self.hung_up(source)),
            Ok(Ok(_)) if line.ends_with(b"\n") => {
                let call = self.call;
                serde_json::from_slice(&line).map_err(|source| VmmError::Protocol { call, source })
            }
            Ok(Ok(read)) if read > MAX_REPLY_BYTES => Err(VmmError::TooLarge {
                call: self.call,
                limit: MAX_REPLY_BYTES,
            }),
            Ok(Ok(_)) => Err(self.hung_up(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// A refusal of the call, in QEMU's words or because of its VM's state.
    fn refused(&self, reason: String) -> VmmError {
        VmmError::Refused {
            call: self.call,
            reason,
        }
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, value: Value) -> Result<T, VmmError> {
        let call = self.call;
        serde_json::from_value(value).map_err(|source| VmmError::Protocol { call, source })
    }

    fn unexpected(&self, wanted: &str) -> VmmError {
        VmmError::Protocol {
            call: self.call,
            source: serde::de::Error::custom(format!("{wanted} was expected")),
        }
    }

    fn hung_up(&self, source: io::Error) -> VmmError {
        VmmError::HungUp {
            call: self.call,
            source,
        }
    }

    fn too_late(&self) -> VmmError {
        VmmError::Timeout {
            call: self.call,
            after: self.call.deadline(),
        }
    }
}

/// Sends all of `bytes`; an open file goes with the first of them.
async fn send(stream: &mut UnixStream, bytes: &[u8], file: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let Some(file) = file else {
        return stream.write_all(bytes).await;
    };
    let sent = stream
        .async_io(Interest::WRITABLE, || send_with(stream.as_fd(), bytes, file))
        .await?;
    stream.write_all(&bytes[sent..]).await
}
