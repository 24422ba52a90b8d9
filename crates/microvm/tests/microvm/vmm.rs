//! The VMM under test: the real binary, over its real socket, in a directory of its own.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Vmm {
    process: Child,
    directory: TempDir,
}

/// A reply: its status, and its body where that is JSON.
#[derive(Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) body: Value,
}

impl Vmm {
    /// Starts it as Stencil does: the socket is its standard input.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vmm.sock")).unwrap();
        let log = File::create(directory.path().join("vmm.log")).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_stencil-microvm"))
            .args(["--api-socket", "fd=0"])
            .current_dir(directory.path())
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { process, directory }
    }

    /// Starts it so that it binds the socket itself.
    pub(crate) fn start_at_path() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&watch, directory.path(), inotify::WatchFlags::CREATE).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_stencil-microvm"))
            .args(["--api-socket", "path=vmm.sock"])
            .current_dir(directory.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_readable(&watch);
        // It is there from `bind` on, and takes connections from the `listen` that follows.
        while UnixStream::connect(directory.path().join("vmm.sock")).is_err() {}
        Self { process, directory }
    }

    /// With a VM of the test guest that runs and is ready.
    pub(crate) fn booted(memory_bytes: u64) -> Self {
        Self::booted_with(memory_bytes, 1)
    }

    pub(crate) fn booted_with(memory_bytes: u64, vcpus: u32) -> Self {
        let vmm = Self::start();
        let kernel = crate::guest::write_elf(vmm.path());
        vmm.done("vm.create", &definition(&kernel, memory_bytes, vcpus));
        vmm.done("vm.boot", &Value::Null);
        vmm.wait_for("ready\n");
        vmm
    }

    /// With the VM of a snapshot, paused.
    pub(crate) fn restored(snapshot: &Path, mode: &str, generation: Option<&str>) -> Self {
        let vmm = Self::start();
        vmm.done("vm.restore", &restore_request(snapshot, mode, generation));
        vmm
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path().join("vmm.log")).unwrap()
    }

    /// An empty directory for a snapshot.
    pub(crate) fn new_directory(&self, name: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    pub(crate) fn get(&self, call: &str) -> Reply {
        self.request("GET", call, &Value::Null)
    }

    pub(crate) fn put(&self, call: &str, body: &Value) -> Reply {
        self.request("PUT", call, body)
    }

    /// A call that has to work.
    pub(crate) fn done(&self, call: &str, body: &Value) {
        let reply = self.put(call, body);
        assert_eq!(reply.status, 204, "{call}: {}", reply.body);
    }

    pub(crate) fn request(&self, method: &str, call: &str, body: &Value) -> Reply {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        self.request_text(method, call, &body)
    }

    pub(crate) fn request_text(&self, method: &str, call: &str, body: &str) -> Reply {
        let mut stream = UnixStream::connect(self.path().join("vmm.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(
            stream,
            "{method} /api/v1/{call} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text
            .split_once("\r\n\r\n")
            .unwrap_or_else(|| panic!("no reply to {call}: {text:?}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Reply {
            status,
            body: serde_json::from_str(body).unwrap_or_default(),
        }
    }

    /// `vm.info`'s state.
    pub(crate) fn state(&self) -> String {
        self.get("vm.info").body["state"]
            .as_str()
            .unwrap_or("none")
            .to_owned()
    }

    pub(crate) fn console_log(&self) -> String {
        fs::read_to_string(self.path().join("console.log")).unwrap()
    }

    /// Waits until the guest has printed `text`; says all that it has printed.
    pub(crate) fn wait_for(&self, text: &str) -> String {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let log = self.path().join("console.log");
        inotify::add_watch(&watch, &log, inotify::WatchFlags::MODIFY).unwrap();
        loop {
            let printed = self.console_log();
            if printed.contains(text) {
                return printed;
            }
            assert!(
                wait_readable(&watch),
                "no {text:?} in {printed:?}; {}",
                self.log()
            );
            rustix::io::read(&watch, &mut [0_u8; 4096]).unwrap();
        }
    }

    /// Waits until the VMM has put a file at `path`, in its own directory.
    pub(crate) fn wait_for_file(&self, path: &Path) {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let events = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, self.path(), events).unwrap();
        while !path.exists() {
            assert!(wait_readable(&watch), "no {path:?}; {}", self.log());
            rustix::io::read(&watch, &mut [0_u8; 4096]).unwrap();
        }
    }

    /// Hands `input` to the guest, and waits for `answer`.
    pub(crate) fn ask(&self, input: &str, answer: &str) -> String {
        let _attached = self.send(input);
        self.wait_for(answer)
    }

    /// Hands `input` to the guest.
    pub(crate) fn send(&self, input: &str) -> UnixStream {
        let mut console = self.attach();
        console.write_all(input.as_bytes()).unwrap();
        console
    }

    /// Connects to the console.
    pub(crate) fn attach(&self) -> UnixStream {
        let console = UnixStream::connect(self.path().join("console.sock")).unwrap();
        console.set_read_timeout(Some(PATIENCE)).unwrap();
        console
    }

    /// Hands `input` to the guest, which ends of it; says what `vm.info` then says.
    pub(crate) fn ends_of(&self, input: &str) -> Value {
        let mut console = self.send(input);
        // The console's end is the guest's end.
        let mut rest = Vec::new();
        console.read_to_end(&mut rest).unwrap();
        self.get("vm.info").body
    }

    /// Pauses the VM and writes a snapshot.
    pub(crate) fn snapshot(&self, name: &str) -> PathBuf {
        let directory = self.new_directory(name);
        self.done("vm.pause", &Value::Null);
        self.done("vm.snapshot", &json!({"destination_url": url(&directory)}));
        directory
    }

    /// Waits for its end, which it has been told to come to.
    pub(crate) fn wait(mut self) -> (std::process::ExitStatus, TempDir) {
        let status = self.process.wait().unwrap();
        let directory = std::mem::replace(&mut self.directory, tempfile::tempdir().unwrap());
        (status, directory)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Both do nothing where it has ended and was waited for.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits for an event; says whether one came in time.
fn wait_readable(watch: &OwnedFd) -> bool {
    let timeout = Timespec {
        tv_sec: PATIENCE.as_secs().try_into().unwrap(),
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

pub(crate) fn definition(kernel: &Path, memory_bytes: u64, vcpus: u32) -> Value {
    json!({
        "cpus": {"boot_vcpus": vcpus, "max_vcpus": vcpus},
        "memory": {"size": memory_bytes},
        "payload": {"kernel": kernel, "cmdline": "console=ttyS0"},
        "serial": {"mode": "Socket", "file": "console.log", "socket": "console.sock"},
        "console": {"mode": "Off"},
        "generation": "000102030405060708090a0b0c0d0e0f",
    })
}

pub(crate) fn restore_request(snapshot: &Path, mode: &str, generation: Option<&str>) -> Value {
    json!({"source_url": url(snapshot), "memory_restore_mode": mode, "generation": generation})
}

pub(crate) fn url(directory: &Path) -> String {
    format!("file://{}", directory.display())
}

/// The binary with other arguments: its output, and its exit code.
pub(crate) fn run(arguments: &[&str]) -> (String, String, i32) {
    let arguments: Vec<OsString> = arguments.iter().map(Into::into).collect();
    let output = Command::new(env!("CARGO_BIN_EXE_stencil-microvm"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        text(output.stdout),
        text(output.stderr),
        output.status.code().unwrap(),
    )
}
