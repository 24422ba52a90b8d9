//! An agent that runs, and the host's side of its stream.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use stencil_agent::{
    Decoder, End, Entropy, Epoch, EpochId, Exec, ExecError, Frame, FrameError, Nonce, Output, SessionId,
    ToGuest, ToHost, encode,
};

/// A test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// What of the machine is the agent's own: nothing that a test of it could do any harm to.
const PRIVATE: &str = "mount -t tmpfs none /etc && mount -t tmpfs none /run && echo old > /etc/machine-id";

/// A running agent, and the directory in which its socket lies.
pub(crate) struct Agent {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) process: Child,
}

impl Agent {
    /// With a kernel that is not its own.
    pub(crate) fn start() -> Self {
        Self::start_with(&["--shared-kernel"], "true")
    }

    /// With these options, after `prepare` has run in its namespaces.
    pub(crate) fn start_with(options: &[&str], prepare: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let options = [&["--listen", socket.to_str().unwrap()], options].concat();
        Self::start_in(dir, &options, prepare)
    }

    /// With these options and no others.
    pub(crate) fn start_in(dir: tempfile::TempDir, options: &[&str], prepare: &str) -> Self {
        let mut process = Command::new("unshare")
            .args(["--user", "--map-root-user", "--uts", "--mount", "sh", "-c"])
            .arg(format!(r#"{PRIVATE} && {prepare} && exec "$0" "$@""#))
            .arg(env!("CARGO_BIN_EXE_stencil-agent"))
            .args(options)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("waits for the host") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the agent ended");
        }
        // What it says later is read, so that it can go on saying it.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
        Self { dir, process }
    }

    pub(crate) fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("agent.sock")
    }

    /// A host that has said hello.
    pub(crate) fn greet(&self) -> Host {
        let mut host = Host::new(UnixStream::connect(self.socket()).unwrap());
        host.hello();
        host
    }

    /// A host whose epoch was taken.
    pub(crate) fn enter(&self) -> Host {
        let mut host = self.greet();
        host.epoch(1);
        host
    }

    /// Its most memory until now, in KiB.
    pub(crate) fn peak_memory_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Agent {
    /// Asks it to end, whereupon it ends its sessions.
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.process.wait();
    }
}

/// What a command did.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) end: Option<End>,
    pub(crate) timed_out: bool,
    pub(crate) took: Duration,
}

/// The host's side.
pub(crate) struct Host {
    pub(crate) stream: UnixStream,
    pub(crate) nonce: Nonce,
    decoder: Decoder<ToHost>,
    read: Vec<u8>,
    sessions: u32,
}

fn random() -> NonZeroU64 {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .unwrap()
        .read_exact(&mut bytes)
        .unwrap();
    NonZeroU64::new(u64::from_ne_bytes(bytes) | 1).unwrap()
}

pub(crate) fn shell(script: &str) -> Exec {
    Exec {
        argv: ["sh", "-c", script].map(str::to_owned).to_vec(),
        ..Exec::default()
    }
}

/// An epoch that differs from every other with another number.
pub(crate) fn epoch(number: u8) -> Epoch {
    Epoch {
        id: EpochId([number; 16]),
        entropy: Entropy([number; 64]),
        wall_clock: Duration::from_secs(1_790_000_000),
        host_name: format!("fork-{number}"),
        machine_id: [number; 16],
    }
}

impl Host {
    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            stream,
            nonce: Nonce::new(random()),
            decoder: Decoder::new(),
            read: Vec::new(),
            sessions: 0,
        }
    }

    pub(crate) fn send(&mut self, message: &ToGuest) {
        let mut bytes = Vec::new();
        encode(self.nonce, message, &mut bytes).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next frame, of whatever conversation.
    pub(crate) fn next_frame(&mut self) -> Result<Frame<ToHost>, FrameError> {
        loop {
            let mut unread = &self.read[..];
            let decoded = self.decoder.next(&mut unread);
            let rest = self.read.len() - unread.len();
            self.read.drain(..rest);
            if let Some(decoded) = decoded {
                return decoded;
            }
            let mut bytes = vec![0; 65536];
            let length = match self.stream.read(&mut bytes) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                read => read.unwrap(),
            };
            assert!(length > 0, "the agent hung up");
            self.read.extend(&bytes[..length]);
        }
    }

    /// The next message of this conversation. What a host before this one has half read is none.
    pub(crate) fn next(&mut self) -> ToHost {
        loop {
            match self.next_frame() {
                Ok(frame) if frame.nonce == self.nonce => return frame.message,
                Ok(_) | Err(FrameError::Damaged) => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Begins a conversation; the agent's answer.
    pub(crate) fn hello(&mut self) -> ToHost {
        self.send(&ToGuest::Hello);
        self.next()
    }

    pub(crate) fn epoch(&mut self, number: u8) {
        self.send(&ToGuest::Epoch(epoch(number)));
        assert_eq!(
            self.next(),
            ToHost::EpochTaken {
                id: EpochId([number; 16])
            }
        );
    }

    /// Asks for a command, and does not wait for anything.
    pub(crate) fn ask(&mut self, exec: Exec) -> SessionId {
        self.sessions += 1;
        let session = SessionId(self.sessions);
        self.send(&ToGuest::Exec { session, exec });
        session
    }

    /// Begins a command; its process id.
    pub(crate) fn begin(&mut self, exec: Exec) -> (SessionId, u32) {
        let session = self.ask(exec);
        match self.next() {
            ToHost::Started { session: of, pid } if of == session => (session, pid),
            other => panic!("{other:?}"),
        }
    }

    /// Begins a command that cannot be begun.
    pub(crate) fn refused(&mut self, exec: Exec) -> (ExecError, String) {
        let session = self.ask(exec);
        match self.next() {
            ToHost::ExecFailed {
                session: of,
                error,
                why,
            } if of == session => (error, why),
            other => panic!("{other:?}"),
        }
    }

    /// Lets a command write as much as it likes until it ends. Nothing else may happen meanwhile.
    pub(crate) fn finish(&mut self, session: SessionId) -> Done {
        let mut done = Done::default();
        loop {
            match self.next() {
                ToHost::Output {
                    session: of,
                    stream,
                    bytes,
                } if of == session => {
                    self.send(&ToGuest::Credit {
                        session,
                        stream,
                        bytes: bytes.len().try_into().unwrap(),
                    });
                    let text = String::from_utf8(bytes).unwrap();
                    match stream {
                        Output::Stdout => done.stdout += &text,
                        Output::Stderr => done.stderr += &text,
                    }
                }
                ToHost::StdinCredit { session: of, .. } if of == session => {}
                ToHost::Exited {
                    session: of,
                    end,
                    timed_out,
                    took,
                } if of == session => {
                    (done.end, done.timed_out, done.took) = (Some(end), timed_out, took);
                    return done;
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Runs a command to its end.
    pub(crate) fn run(&mut self, exec: Exec) -> Done {
        let (session, _) = self.begin(exec);
        self.finish(session)
    }

    /// What a script that succeeds prints.
    pub(crate) fn print(&mut self, script: &str) -> String {
        let done = self.run(shell(script));
        assert_eq!(done.end, Some(End::Code(0)), "{done:?}");
        done.stdout
    }
}

/// Waits until there is something at `path`.
pub(crate) fn await_path(host: &mut Host, path: &Path) {
    host.print(&format!("until [ -e {} ]; do :; done", path.display()));
}
