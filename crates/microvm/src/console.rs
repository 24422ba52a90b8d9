//! Where the serial port goes: the console log, and the clients of the console socket.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, Weak};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stencil_vmm_api::{SerialConfig, SerialMode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;

use crate::counters::Counters;
use crate::locked::locked;
use crate::serial::Serial;
use crate::socket::{BoundPath, Listening, SocketError, accept};

/// Bytes that may wait for a client before it is dropped.
const BACKLOG: usize = 256 << 10;

/// The serial port has nowhere to go.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleError {
    #[error("the console log {0:?} cannot be opened")]
    Log(PathBuf, #[source] io::Error),
    #[error("the console socket cannot be served")]
    Socket(#[from] SocketError),
    /// Only while the process ends.
    #[error("the VMM is shutting down")]
    Ending,
}

/// Those who are connected now.
type Clients = Arc<Mutex<Vec<Client>>>;

struct Client {
    output: Sender<u8>,
    task: AbortHandle,
}

/// Takes what the guest writes: to the log at once, in the vCPU's own thread, and to each client's queue.
pub(crate) struct Output {
    log: Option<File>,
    clients: Clients,
    counters: Arc<Counters>,
}

/// Where a serial port goes: files are open, and nobody is served yet.
pub(crate) struct Places {
    pub(crate) output: Output,
    pub(crate) socket: Option<ConsoleSocket>,
}

/// Places that the main thread opens: files that have to be made first take a busy file system milliseconds, in which
/// the rest of the VM can be made.
pub(crate) struct OpeningPlaces(oneshot::Receiver<Result<Places, ConsoleError>>);

impl OpeningPlaces {
    /// Waits for them. Not to be called in the main thread.
    pub(crate) fn wait(self) -> Result<Places, ConsoleError> {
        self.0.blocking_recv().map_err(|_| ConsoleError::Ending)?
    }
}

/// The console socket before it is served.
pub(crate) struct ConsoleSocket {
    listening: Listening,
    clients: Clients,
}

impl Places {
    /// Begins to open what `config` names, in the main thread.
    pub(crate) fn begin(config: &SerialConfig, counters: &Arc<Counters>, runtime: &Handle) -> OpeningPlaces {
        let (config, counters) = (config.clone(), Arc::clone(counters));
        let (opened, opening) = oneshot::channel();
        runtime.spawn(async move {
            // Where nobody waits for them any more, they are closed again.
            drop(opened.send(Self::open(&config, counters)));
        });
        OpeningPlaces(opening)
    }

    /// Opens what `config` names.
    fn open(config: &SerialConfig, counters: Arc<Counters>) -> Result<Self, ConsoleError> {
        let (file, socket) = match config.mode {
            SerialMode::File => (config.file.as_deref(), None),
            SerialMode::Socket => (config.file.as_deref(), config.socket.as_deref()),
            SerialMode::Off | SerialMode::Null | SerialMode::Tty | SerialMode::Pty => (None, None),
        };
        let clients = Clients::default();
        let log = file.map(open_log).transpose()?;
        let listening = socket.map(|path| Listening::bind(Path::new(path))).transpose()?;
        let socket = listening.map(|listening| ConsoleSocket {
            listening,
            clients: Arc::clone(&clients),
        });
        Ok(Self {
            output: Output {
                log,
                clients,
                counters,
            },
            socket,
        })
    }
}

/// Appends: what earlier epochs wrote stays.
fn open_log(path: &str) -> Result<File, ConsoleError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|error| ConsoleError::Log(path.into(), error))
}

impl Output {
    #[cfg(test)]
    pub(crate) fn nowhere(counters: Arc<Counters>) -> Self {
        Self {
            log: None,
            clients: Clients::default(),
            counters,
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.counters.serial_out.fetch_add(bytes.len() as u64, Relaxed);
        let logged = self.log.as_mut().map_or(Ok(()), |log| log.write_all(bytes));
        let mut clients = locked(&self.clients);
        if !clients.is_empty() {
            clients.retain(|client| {
                let kept_up = bytes.iter().all(|byte| client.output.try_send(*byte).is_ok());
                // Its task is either over, or waits for a client that does not read.
                if !kept_up && !client.output.is_closed() {
                    client.task.abort();
                    self.counters.clients_dropped.fetch_add(1, Relaxed);
                    tracing::warn!("a console client did not keep up and is dropped");
                }
                kept_up
            });
        }
        logged.map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Serves the console socket while it lives. Its clients see the end of the output when the serial port is dropped.
pub(crate) struct Console {
    accepting: AbortHandle,
    _path: Option<BoundPath>,
}

impl ConsoleSocket {
    /// Lets clients in from now on.
    pub(crate) fn serve(self, serial: &Arc<Serial>, runtime: &Handle) -> Console {
        let Listening { listener, path } = self.listening;
        let clients = self.clients;
        let input = Input {
            serial: Arc::downgrade(serial),
            room: serial.room(),
        };
        let accepting = runtime.spawn(async move {
            match UnixListener::from_std(listener) {
                Ok(listener) => accept_all(&listener, &clients, &input).await,
                Err(error) => tracing::error!(%error, "the console socket cannot be served"),
            }
        });
        Console {
            accepting: accepting.abort_handle(),
            _path: path,
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept_all(listener: &UnixListener, clients: &Clients, input: &Input) {
    loop {
        let stream = accept(listener).await;
        let (output, queue) = mpsc::channel(BACKLOG);
        let task = tokio::spawn(attend(stream, queue, input.clone()));
        let mut clients = locked(clients);
        clients.retain(|client| !client.output.is_closed());
        clients.push(Client {
            output,
            task: task.abort_handle(),
        });
    }
}

/// The way in to a serial port, which does not keep it alive.
#[derive(Clone)]
struct Input {
    serial: Weak<Serial>,
    room: Arc<Notify>,
}

impl Input {
    /// Hands `bytes` over when there is room for them; says whether the serial port was still there.
    async fn send(&self, bytes: &[u8]) -> bool {
        loop {
            let room = self.room.notified();
            tokio::pin!(room);
            // Registered before the attempt, so that room made in between is noticed.
            room.as_mut().enable();
            match self.serial.upgrade() {
                None => return false,
                Some(serial) if serial.try_input(bytes) => return true,
                Some(_) => {}
            }
            room.await;
        }
    }
}

/// One client, both ways, until it hangs up or there is no more output.
async fn attend(mut stream: UnixStream, mut queue: Receiver<u8>, to_guest: Input) {
    let (mut reader, mut writer) = stream.split();
    let gone = Notify::new();
    let output = async {
        let mut bytes = Vec::new();
        let mut listens = true;
        while queue.recv_many(&mut bytes, 4096).await > 0 {
            // Who listens no more may still have sent input that is not read yet.
            if listens && writer.write_all(&bytes).await.is_err() {
                listens = false;
                gone.notify_one();
            }
            bytes.clear();
        }
    };
    let input = async {
        let mut bytes = [0; 4096];
        loop {
            match reader.read(&mut bytes).await {
                Ok(0) => break,
                Ok(count) if to_guest.send(&bytes[..count]).await => {}
                Ok(_) | Err(_) => return,
            }
        }
        // It sends no more. If it only closed that direction, it still gets the output.
        if !hung_up(reader.as_ref()) {
            gone.notified().await;
        }
    };
    tokio::select! {
        () = output => {}
        () = input => {}
    }
}

/// Whether the other side has closed both directions.
fn hung_up(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An output with one client, and that client's end of the connection.
    fn attached(counters: &Arc<Counters>) -> (Output, UnixStream) {
        let output = Output::nowhere(Arc::clone(counters));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let input = Input {
            serial: Weak::new(),
            room: Arc::default(),
        };
        let (sender, queue) = mpsc::channel(BACKLOG);
        let task = tokio::spawn(attend(ours, queue, input)).abort_handle();
        locked(&output.clients).push(Client { output: sender, task });
        (output, theirs)
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_dropped() {
        let counters = Arc::new(Counters::new(1));
        let (mut output, mut client) = attached(&counters);
        let mut written = 0;
        while counters.clients_dropped.load(Relaxed) == 0 {
            output.write_all(&[b'x'; 1024]).unwrap();
            written += 1024;
            tokio::task::yield_now().await;
        }
        assert!(written >= BACKLOG);
        assert!(locked(&output.clients).is_empty());
        // It sees the end, after what it was sent.
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert!(read.len() < written);
    }

    #[tokio::test]
    async fn the_last_output_reaches_a_client_before_the_end() {
        let counters = Arc::new(Counters::new(1));
        let (mut output, mut client) = attached(&counters);
        output.write_all(b"the end\n").unwrap();
        drop(output);
        let mut read = Vec::new();
        client.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, b"the end\n");
        assert_eq!(counters.clients_dropped.load(Relaxed), 0);
    }
}
