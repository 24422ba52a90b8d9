//! One process of a VMM, driven over its REST socket without a server, in a directory of its own. The microVM and Cloud
//! Hypervisor speak the same REST contract.

use std::fs::{self, File};
use std::io::Write as _;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hyper::Method;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use serde_json::Value;

use crate::client::{Body, Client, ClientError, Reply};
use crate::processes;

/// How long a guest may take to answer; filling its memory takes a second or two.
const PATIENCE: Duration = Duration::from_secs(60);

/// A VMM did not do as it was asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmmError {
    #[error("could not {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{call} was answered with {status}: {message}; the VMM said:\n{log}")]
    Refused {
        call: String,
        status: u16,
        message: String,
        log: String,
    },
    #[error(
        "the guest did not print `{wanted}` {count} times in {seconds} s; it printed:\n{printed}\nthe VMM said:\n{log}"
    )]
    Silent {
        wanted: &'static str,
        count: usize,
        seconds: u64,
        printed: String,
        log: String,
    },
    #[error("the guest's input did not arrive: {arrived} of {sent} bytes")]
    InputLost { arrived: u64, sent: u64 },
    #[error("{path} does not say `{field}` of the VMM", path = path.display())]
    NoFigure { path: PathBuf, field: &'static str },
    #[error("could not watch for what guests print")]
    Watch(#[from] Errno),
}

/// A VMM; it is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct Vmm {
    process: Child,
    directory: PathBuf,
    client: Client,
    inotify: OwnedFd,
}

/// What the process has cost so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Footprint {
    /// Page faults of the process, those of its guest that the host had to answer with them.
    pub(crate) faults: u64,
    /// Memory that it shares with nobody, written by it or copied for it. Clean pages of a mapped file are not in it.
    pub(crate) private_bytes: u64,
}

impl Vmm {
    /// Starts one as Stencil does, its socket as its standard input, in a new directory. What it prints, which of Cloud
    /// Hypervisor is its guest's console, goes to `console.log`.
    pub(crate) fn start(binary: &Path, directory: PathBuf) -> Result<Self, VmmError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| VmmError::Io { what, path, source }
        };
        fs::create_dir(&directory).map_err(io("make", &directory))?;
        let socket = directory.join("vmm.sock");
        let listener = UnixListener::bind(&socket).map_err(io("bind", &socket))?;
        let log = directory.join("vmm.log");
        let log_file = File::create(&log).map_err(io("make", &log))?;
        let console = directory.join("console.log");
        let printed = File::options()
            .create(true)
            .append(true)
            .open(&console)
            .map_err(io("make", &console))?;
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&inotify, &directory, WatchFlags::CREATE | WatchFlags::MODIFY)?;
        let process = Command::new(binary)
            .args(["--api-socket", "fd=0"])
            .current_dir(&directory)
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(printed)
            .stderr(log_file)
            .env("RUST_LOG", "info")
            .spawn()
            .map_err(io("run", binary))?;
        let vmm = Self {
            process,
            client: Client::new(socket),
            directory,
            inotify,
        };
        // That it answers is no part of what is measured afterwards.
        vmm.get("vmm.ping")?;
        Ok(vmm)
    }

    /// Its directory.
    pub(crate) fn path(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.join("vmm.log")).unwrap_or_default()
    }

    /// A call that changes something.
    pub(crate) fn put(&self, call: &str, body: Value) -> Result<(), VmmError> {
        let body = if body.is_null() {
            Body::Nothing
        } else {
            Body::Json(body)
        };
        let reply = self.client.call(Method::PUT, &format!("/api/v1/{call}"), body)?;
        self.expect(reply).map(drop)
    }

    pub(crate) fn get(&self, call: &str) -> Result<Value, VmmError> {
        let reply = self.client.get(&format!("/api/v1/{call}"))?;
        self.expect(reply)
    }

    fn expect(&self, reply: Reply) -> Result<Value, VmmError> {
        if (200..300).contains(&reply.status) {
            return Ok(reply.body);
        }
        Err(VmmError::Refused {
            call: reply.call,
            status: reply.status,
            message: reply.body.to_string(),
            log: self.log(),
        })
    }

    /// A counter of `vm.counters`; 0 where the device or the counter is not there.
    pub(crate) fn counter(&self, device: &str, name: &str) -> Result<u64, VmmError> {
        Ok(self.get("vm.counters")?[device][name].as_u64().unwrap_or(0))
    }

    /// Sends lines to the guest's console, and waits until the serial port has them; the guest need not run.
    pub(crate) fn send(&self, input: &str) -> Result<(), VmmError> {
        let path = self.directory.join("console.sock");
        let io = |what| {
            let path = path.clone();
            move |source| VmmError::Io { what, path, source }
        };
        let before = self.counter("serial", "bytes_in")?;
        let mut console = UnixStream::connect(&path).map_err(io("connect to"))?;
        console.write_all(input.as_bytes()).map_err(io("write to"))?;
        let (sent, deadline) = (input.len() as u64, Instant::now() + PATIENCE);
        loop {
            let arrived = self.counter("serial", "bytes_in")?.saturating_sub(before);
            if arrived >= sent {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(VmmError::InputLost { arrived, sent });
            }
        }
    }

    /// Waits until the guest has printed `count` lines that begin with `wanted`; when that was seen, and the lines.
    pub(crate) fn wait_for(
        &self,
        wanted: &'static str,
        count: usize,
    ) -> Result<(Instant, Vec<String>), VmmError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let printed = fs::read_to_string(self.directory.join("console.log")).unwrap_or_default();
            let seen = Instant::now();
            let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let lines = whole.lines().filter(|line| line.starts_with(wanted));
            let lines: Vec<String> = lines.map(str::to_owned).collect();
            if lines.len() >= count {
                return Ok((seen, lines));
            }
            if !processes::readable_by(&self.inotify, deadline)? {
                return Err(VmmError::Silent {
                    wanted,
                    count,
                    seconds: PATIENCE.as_secs(),
                    printed,
                    log: self.log(),
                });
            }
            self.forget_events()?;
        }
    }

    /// What happened before the log is read need not be told again.
    fn forget_events(&self) -> Result<(), VmmError> {
        let mut buffer = [MaybeUninit::uninit(); 4 << 10];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            match events.next() {
                Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => return Ok(()),
                Ok(_) => {}
                Err(Errno::WOULDBLOCK) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(crate) fn footprint(&self) -> Result<Footprint, VmmError> {
        let process = PathBuf::from(format!("/proc/{}", self.process.id()));
        let read = |name: &str| {
            let path = process.join(name);
            let text = fs::read_to_string(&path).map_err(|source| VmmError::Io {
                what: "read",
                path: path.clone(),
                source,
            })?;
            Ok::<_, VmmError>((path, text))
        };
        let (path, stat) = read("stat")?;
        // proc_pid_stat(5): fields 10 and 12; the name, field 2, is in parentheses and may hold anything.
        let mut fields = stat
            .rsplit_once(')')
            .map_or("", |(_, rest)| rest)
            .split_whitespace();
        let minor = fields.nth(7).and_then(|field| field.parse::<u64>().ok());
        let major = fields.nth(1).and_then(|field| field.parse::<u64>().ok());
        let (Some(minor), Some(major)) = (minor, major) else {
            return Err(VmmError::NoFigure {
                path,
                field: "minflt",
            });
        };
        let (path, rollup) = read("smaps_rollup")?;
        let dirty = rollup
            .lines()
            .find_map(|line| line.strip_prefix("Private_Dirty:"));
        let kibibytes = dirty.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let Some(kibibytes) = kibibytes else {
            return Err(VmmError::NoFigure {
                path,
                field: "Private_Dirty",
            });
        };
        Ok(Footprint {
            faults: minor + major,
            private_bytes: kibibytes << 10,
        })
    }

    /// Ends it, and removes its directory.
    pub(crate) fn finish(mut self) -> Result<(), VmmError> {
        let failed = |what| {
            let path = self.directory.clone();
            move |source| VmmError::Io { what, path, source }
        };
        self.process.kill().map_err(failed("end the VMM in"))?;
        self.process.wait().map_err(failed("wait for the VMM in"))?;
        fs::remove_dir_all(&self.directory).map_err(failed("remove"))
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both do nothing where it has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
