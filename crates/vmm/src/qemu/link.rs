//! The one connection to a QEMU's monitor, which takes one client at a time: opened when it is first needed, kept for as long as
//! the QEMU lives, and owned by a task. Calls of any number send their commands through it, one at a time.
//!
//! It remembers what QEMU said that its VM does, until an event or a command may have changed that: most often nobody has to ask.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Value, json};
use stencil_core::InstanceDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::sync::{OnceCell, broadcast, mpsc, oneshot};

use super::monitor::RunState;
use crate::descriptor::send_with;
use crate::{Call, MAX_REPLY_BYTES, VmmError};

/// How many commands can wait for their turn before whoever sends another one waits himself.
const WAITING: usize = 64;
/// For how long it is believed what QEMU said, where nothing has happened since.
const BELIEVED: Duration = Duration::from_secs(1);
/// How many events are kept for who follows them.
const EVENTS: usize = 64;
/// After how long a connection is tried again that QEMU has no room for.
const AGAIN: Duration = Duration::from_millis(10);

/// The connections to all QEMUs of a server.
#[derive(Debug, Default)]
pub(super) struct Links(Mutex<HashMap<Key, Arc<OnceCell<Arc<Link>>>>>);

/// Which socket it is: an instance's directory takes other names in its life.
type Key = (u64, u64);

/// One connection. Dropped, it is closed.
#[derive(Debug)]
pub(super) struct Link {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    /// The turn to ask what the VM does.
    pub(super) asking: tokio::sync::Mutex<()>,
    /// Of the QEMU, such as `7.2.22`.
    pub(super) version: String,
}

/// What the task tells.
#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    events: broadcast::Sender<Event>,
}

#[derive(Debug, Default)]
struct Known {
    /// What the VM does, and when QEMU said so, unless that may have changed since.
    state: Option<(RunState, Instant)>,
    /// Counts what may have changed it.
    changes: u64,
    /// The last error of a disk that stopped the VM.
    disk_error: Option<DiskError>,
    /// Why the guest is down (`ShutdownCause`, qapi/run-state.json), as of the last `SHUTDOWN` event.
    shutdown: Option<String>,
    /// Why the connection is closed.
    fault: Option<Fault>,
}

/// An error of a disk (`BLOCK_IO_ERROR`, qapi/block-core.json).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct DiskError {
    /// Whether the host's file system was full.
    #[serde(default)]
    pub(super) nospace: bool,
    /// What the system said.
    #[serde(default)]
    pub(super) reason: String,
}

/// Something that happened.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) name: String,
    pub(super) data: Value,
}

/// What somebody wants to have said.
#[derive(Debug)]
struct Command {
    name: &'static str,
    arguments: Value,
    file: Option<OwnedFd>,
    answer: oneshot::Sender<Result<Value, String>>,
}

/// Why a connection cannot be used any more.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// The other side closed it, or it broke.
    HungUp(ErrorKind),
    /// What it said is not the protocol.
    Protocol(String),
    /// A line was longer than any of a monitor.
    TooLarge,
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

impl Links {
    /// The connection to the QEMU in `dir`: the one that is there, or a new one. Where QEMU has another client, it is waited for.
    pub(super) async fn to(&self, dir: &InstanceDir, call: Call) -> Result<Arc<Link>, VmmError> {
        let socket = dir.vmm_socket();
        let unreachable = |source| VmmError::Connect {
            call,
            socket: socket.clone(),
            source,
        };
        let found = std::fs::metadata(&socket).map_err(unreachable)?;
        let cell = self.cell((found.dev(), found.ino()));
        let link = cell.get_or_try_init(|| async {
            let stream = connect(&socket).await.map_err(unreachable)?;
            Link::open(stream).await.map_err(|fault| fault.of(call))
        });
        link.await.cloned()
    }

    /// Where the connection by this key is or will be. One that is closed makes room for a new one.
    fn cell(&self, key: Key) -> Arc<OnceCell<Arc<Link>>> {
        // Nothing panics while it holds this lock.
        let mut links = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        links.retain(|_, cell| cell.get().is_none_or(|link| !link.is_closed()));
        Arc::clone(links.entry(key).or_default())
    }
}

/// Connects, also where QEMU's queue of one is full for the moment.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::time::sleep(AGAIN).await,
            connected => return connected,
        }
    }
}

impl Link {
    /// Greets and is greeted.
    async fn open(stream: UnixStream) -> Result<Arc<Self>, Fault> {
        let mut lines = Lines::new(stream);
        lines.send("qmp_capabilities", &json!({}), None).await?;
        let greeting = loop {
            match lines.next().await? {
                Line {
                    greeting: Some(greeting),
                    ..
                } => break greeting,
                // Of something that happened while QEMU took the connection, which still has the last one's rights then.
                Line { event: Some(_), .. } | Line { id: Some(_), .. } => {}
                _ => return Err(Fault::unexpected("a greeting")),
            }
        };
        loop {
            match lines.next().await? {
                Line { id: Some(other), .. } if other != lines.last_id => {}
                Line { answer: Some(_), .. } => break,
                Line { event: Some(_), .. } => {}
                _ => return Err(Fault::unexpected("a reply")),
            }
        }
        let Version { major, minor, micro } = greeting.version.qemu;
        let shared = Arc::new(Shared {
            known: Mutex::default(),
            events: broadcast::Sender::new(EVENTS),
        });
        let (commands, asked) = mpsc::channel(WAITING);
        tokio::spawn(keep(lines, asked, Arc::clone(&shared)));
        Ok(Arc::new(Self {
            commands,
            shared,
            asking: tokio::sync::Mutex::default(),
            version: format!("{major}.{minor}.{micro}"),
        }))
    }

    fn is_closed(&self) -> bool {
        self.commands.is_closed()
    }

    /// Returns when the connection is closed.
    pub(super) async fn closed(&self) {
        self.commands.closed().await;
    }

    /// What the VM does, if that is certain without asking. A QEMU that hangs tells no change, so this is not believed for long.
    pub(super) fn known_state(&self) -> Option<RunState> {
        let (state, told) = self.known().state?;
        (told.elapsed() < BELIEVED).then_some(state)
    }

    /// The last error of a disk that stopped the VM.
    pub(super) fn disk_error(&self) -> Option<DiskError> {
        self.known().disk_error.clone()
    }

    /// Why the guest is down, in QEMU's word for it.
    pub(super) fn shutdown_cause(&self) -> Option<String> {
        self.known().shutdown.clone()
    }

    /// How often something has happened that may change what the VM does.
    pub(super) fn changes(&self) -> u64 {
        self.known().changes
    }

    /// Remembers what the VM does, unless something has happened since there were so many changes.
    pub(super) fn learn(&self, state: RunState, changes: u64) {
        let mut known = self.known();
        if known.changes == changes {
            known.state = Some((state, Instant::now()));
        }
    }

    /// What happens from now on.
    pub(super) fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Sends a command when its turn comes, with an open file where it takes one. QEMU's answer, or its refusal in its words.
    pub(super) async fn ask(
        &self,
        name: &'static str,
        arguments: Value,
        file: Option<OwnedFd>,
    ) -> Result<Result<Value, String>, Fault> {
        let (answer, answered) = oneshot::channel();
        let command = Command {
            name,
            arguments,
            file,
            answer,
        };
        self.commands.send(command).await.map_err(|_| self.fault())?;
        answered.await.map_err(|_| self.fault())
    }

    /// Why it is closed.
    pub(super) fn fault(&self) -> Fault {
        let fault = self.known().fault.clone();
        fault.unwrap_or(Fault::HungUp(ErrorKind::UnexpectedEof))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.shared.known()
    }
}

impl Shared {
    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing panics while it holds this lock.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the VM does is not certain any more.
    fn forget_state(&self) {
        let mut known = self.known();
        known.state = None;
        known.changes += 1;
    }

    fn hear(&self, event: Event) {
        if event.name == "BLOCK_IO_ERROR" {
            self.known().disk_error = serde_json::from_value(event.data.clone()).ok();
        }
        if event.name == "SHUTDOWN" {
            self.known().shutdown = event.data["reason"].as_str().map(str::to_owned);
        }
        self.forget_state();
        // Most often nobody follows them.
        let _ = self.events.send(event);
    }
}

/// Sends commands and hears what QEMU says, until nobody needs the connection or it breaks.
async fn keep(mut lines: Lines, mut asked: mpsc::Receiver<Command>, shared: Arc<Shared>) {
    let fault = loop {
        tokio::select! {
            command = asked.recv() => {
                let Some(command) = command else { return };
                if let Err(fault) = serve(&mut lines, command, &shared).await {
                    break fault;
                }
            }
            line = lines.next() => match line {
                Ok(Line { event: Some(name), data, .. }) => shared.hear(Event { name, data: data.unwrap_or_default() }),
                // To a command that was given up.
                Ok(Line { id: Some(_), .. }) => {}
                Ok(_) => break Fault::unexpected("an event"),
                Err(fault) => break fault,
            },
        }
    };
    shared.known().fault = Some(fault);
}

/// Says one thing and waits for the answer, for as long as who asked waits for it.
async fn serve(lines: &mut Lines, command: Command, shared: &Shared) -> Result<(), Fault> {
    let Command {
        name,
        arguments,
        file,
        mut answer,
    } = command;
    if answer.is_closed() {
        return Ok(());
    }
    lines.send(name, &arguments, file.as_ref()).await?;
    loop {
        let line = tokio::select! {
            line = lines.next() => line?,
            // Its reply is passed over when it comes.
            () = answer.closed() => {
                shared.forget_state();
                return Ok(());
            }
        };
        let said = match line {
            Line { id: Some(other), .. } if other != lines.last_id => continue,
            Line {
                event: Some(name),
                data,
                ..
            } => {
                let data = data.unwrap_or_default();
                shared.hear(Event { name, data });
                continue;
            }
            Line {
                answer: Some(said), ..
            } => Ok(said),
            Line {
                error: Some(refusal), ..
            } => Err(refusal.desc),
            _ => return Err(Fault::unexpected("a reply")),
        };
        if name != "query-status" {
            shared.forget_state();
        }
        // Who asked may have gone.
        let _ = answer.send(said);
        return Ok(());
    }
}

impl Fault {
    fn unexpected(wanted: &str) -> Self {
        Self::Protocol(format!("{wanted} was expected"))
    }

    /// The error of a call that met it.
    pub(super) fn of(self, call: Call) -> VmmError {
        match self {
            Self::HungUp(kind) => VmmError::HungUp {
                call,
                source: kind.into(),
            },
            Self::Protocol(why) => VmmError::Protocol {
                call,
                source: serde::de::Error::custom(why),
            },
            Self::TooLarge => VmmError::TooLarge {
                call,
                limit: MAX_REPLY_BYTES,
            },
        }
    }
}

/// The stream as lines of JSON.
struct Lines {
    stream: UnixStream,
    /// What was read and is not taken yet.
    unread: Vec<u8>,
    /// The id of the command that was sent last.
    last_id: u64,
}

impl Lines {
    fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            unread: Vec::new(),
            // A server before this one may have commands without answers: its process id tells them apart.
            last_id: u64::from(std::process::id()) << 32,
        }
    }

    async fn send(&mut self, name: &str, arguments: &Value, file: Option<&OwnedFd>) -> Result<(), Fault> {
        self.last_id += 1;
        let mut request = json!({ "execute": name, "arguments": arguments, "id": self.last_id }).to_string();
        request.push('\n');
        let sent = send(&mut self.stream, request.as_bytes(), file).await;
        sent.map_err(|error| Fault::HungUp(error.kind()))
    }

    /// The next line. Nothing is lost where it is given up.
    async fn next(&mut self) -> Result<Line, Fault> {
        let mut searched = 0;
        loop {
            let found = self.unread[searched..].iter().position(|byte| *byte == b'\n');
            if let Some(end) = found.map(|end| searched + end) {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|error| Fault::Protocol(error.to_string()));
            }
            searched = self.unread.len();
            if searched > MAX_REPLY_BYTES {
                return Err(Fault::TooLarge);
            }
            let read = self.stream.read_buf(&mut self.unread).await;
            if read.map_err(|error| Fault::HungUp(error.kind()))? == 0 {
                return Err(Fault::HungUp(ErrorKind::UnexpectedEof));
            }
        }
    }
}

/// Sends all of `bytes`; an open file goes with the first of them.
async fn send(stream: &mut UnixStream, bytes: &[u8], file: Option<&OwnedFd>) -> io::Result<()> {
    let Some(file) = file else {
        return stream.write_all(bytes).await;
    };
    let sent = stream
        .async_io(Interest::WRITABLE, || {
            send_with(stream.as_fd(), bytes, file.as_fd())
        })
        .await?;
    stream.write_all(&bytes[sent..]).await
}
