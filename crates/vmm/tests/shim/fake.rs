//! A Cloud Hypervisor for tests: a real process on a real socket, with the replies that were recorded from v53.0 and the same
//! state machine. It is this test program in another role; `fixtures/vmms/cloud-hypervisor` starts it.
//!
//! Its guest is a counter at the beginning of its memory. It counts each time that it is resumed, and prints that to the
//! serial port. Where its memory is served, it then touches the pages that are listed in the file `touches` beside the program,
//! such as `5 9w 3`. Each request is noted in the log, `vmm.log`.

mod http;
mod receiver;
mod snapshots;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Signal, getpid, kill_process};
use serde_json::{Value, json};

use crate::directory::fixture;
use crate::replayer::recorded;
use http::{Reply, error, read_request, reply};
use receiver::Shared;

/// What a test asks to know that the fake has started; it is answered as every unknown path.
const READY: &str = "fake.ready";
/// What a test asks to let the guest read its console and print what it has read; answered in the same way.
const READ: &str = "fake.read";
const MEMORY_MANAGER: &str = "/snapshots/memory-manager/snapshot_data/state";

#[test]
#[ignore = "it is no test, but what the fake Cloud Hypervisor runs"]
fn plays_cloud_hypervisor() {
    let Some(home) = std::env::var_os("FAKE_HOME") else {
        return;
    };
    let socket = std::env::args().next_back().unwrap();
    let socket = socket.strip_prefix("fd=").unwrap().parse().unwrap();
    let console = std::env::var("FAKE_CONSOLE").unwrap().parse().unwrap();
    let mut fake = Fake {
        faults: Faults::read(Path::new(&home)),
        touches: fs::read_to_string(Path::new(&home).join("touches")).unwrap_or_default(),
        // SAFETY: the script has opened it for this, and nobody else in this program knows of it.
        console: unsafe { File::from_raw_fd(console) },
        vm: None,
    };
    // SAFETY: it was inherited for this, and nobody else in this program knows of it.
    for connection in unsafe { UnixListener::from_raw_fd(socket) }.incoming() {
        fake.serve(connection.unwrap());
    }
}

/// Waits until the fake has started, so that its start does not count against the first call's deadline.
pub(crate) fn wait_until_ready(socket: &Path) {
    ask(socket, READY);
}

/// Lets the guest read what is in its console, at most 64 bytes of it, and print it.
pub(crate) fn let_guest_read(socket: &Path) {
    ask(socket, READ);
}

fn ask(socket: &Path, what: &str) {
    let mut connection = UnixStream::connect(socket).unwrap();
    write!(connection, "GET /api/v1/{what} HTTP/1.1\r\n\r\n").unwrap();
    connection.read_exact(&mut [0]).unwrap();
}

struct Fake {
    faults: Faults,
    touches: String,
    console: File,
    vm: Option<Vm>,
}

struct Vm {
    config: Value,
    state: &'static str,
    counter: u64,
    /// How its memory came to be, in a word.
    memory: &'static str,
    /// How many snapshots are refused because its memory is still coming.
    coming: u32,
    /// Its memory, if that is served.
    served: Option<Arc<Shared>>,
}

impl Vm {
    /// Touches pages, writing some; tells what was in each.
    fn touch(&self, touches: &str) -> String {
        let mut told = String::new();
        for touch in touches.split_ascii_whitespace() {
            let Some(served) = &self.served else { break };
            let page = touch.trim_end_matches('w').parse().unwrap();
            write!(told, " {page}={}", served.read(page)).unwrap();
            if touch.ends_with('w') {
                served.write(page, 255);
            }
        }
        told
    }
}

/// What goes wrong at which call, such as `vm.boot die`, by lines.
struct Faults(String);

impl Faults {
    fn read(home: &Path) -> Self {
        Self(fs::read_to_string(home.join("faults")).unwrap())
    }

    fn at(&self, call: &str) -> Option<&str> {
        self.0
            .lines()
            .find_map(|line| line.strip_prefix(call)?.strip_prefix(' '))
    }
}

impl Fake {
    /// As in Cloud Hypervisor one thread serves all connections, one after the other.
    fn serve(&mut self, mut connection: UnixStream) {
        while let Some((call, body)) = read_request(&mut connection) {
            if ![READY, READ].contains(&call.as_str()) {
                eprintln!("{call} {body}");
            }
            let reply = match self.faults.at(&call) {
                Some("die") => {
                    kill_process(getpid(), Signal::KILL).unwrap();
                    unreachable!("it is dead");
                }
                Some("drop") => return,
                Some("hang") => loop {
                    std::thread::park();
                },
                Some("error") => error("it was asked to fail"),
                Some("nested-state") => error("Could not get vCPU state GetNestedState(Invalid argument)"),
                Some("slow") => loop {
                    // A byte of a reply that never ends, as long as somebody reads it.
                    if connection.write_all(b"H").is_err() {
                        return;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(20));
                },
                Some(other) => panic!("there is no fault {other}"),
                None => self.answer(&call, &serde_json::from_str(&body).unwrap_or_default()),
            };
            let sent = connection.write_all(&reply);
            if call == "vmm.shutdown" {
                std::process::exit(0);
            }
            if sent.is_err() {
                return;
            }
        }
    }

    fn answer(&mut self, call: &str, body: &Value) -> Reply {
        match call {
            // As it was recorded, but for the pid.
            "vmm.ping" => reply(
                200,
                &json!({"build_version": "v53.0", "version": "53.0.0", "pid": std::process::id(), "features": ["kvm"]}),
            ),
            "vmm.shutdown" => recorded("vmm-shutdown"),
            "vm.info" => self.info(),
            "vm.create" => self.create(body),
            "vm.boot" => self.boot(),
            "vm.pause" => self.pause(),
            "vm.resume" => self.resume(),
            "vm.snapshot" => self.snapshot(&path_in(body, "destination_url")),
            "vm.restore" => self.restore(
                &path_in(body, "source_url"),
                body["memory_restore_mode"] == "OnDemand",
            ),
            "vm.receive-migration" => {
                assert_eq!(body["memory_mode"], "Postcopy");
                self.receive_migration(body["receiver_url"].as_str().unwrap())
            }
            READ => {
                self.read_console();
                recorded("unknown-path")
            }
            _ => recorded("unknown-path"),
        }
    }

    fn info(&self) -> Reply {
        let Some(vm) = &self.vm else {
            return recorded("info-no-vm");
        };
        let info =
            json!({"config": vm.config, "state": vm.state, "memory_actual_size": memory_size(&vm.config)});
        reply(200, &info)
    }

    fn create(&mut self, config: &Value) -> Reply {
        if self.vm.is_some() {
            return recorded("create-twice");
        }
        // What is not asked for is as in the recorded VM, and what is not known is ignored.
        let mut whole = recorded_config();
        for (field, asked) in whole.as_object_mut().unwrap() {
            if let Some(given) = config.get(field) {
                *asked = given.clone();
            }
        }
        whole["vsock"] = config["vsock"].clone();
        self.vm = Some(Vm {
            config: whole,
            state: "Created",
            counter: 0,
            memory: "new",
            coming: 0,
            served: None,
        });
        recorded("create")
    }

    fn boot(&mut self) -> Reply {
        match &mut self.vm {
            None => return recorded("boot-no-vm"),
            Some(vm) if vm.state != "Created" => return error("VM is already running"),
            Some(vm) => match listen_for_the_guest(&vm.config) {
                Ok(()) => vm.state = "Running",
                Err(refused) => return refused,
            },
        }
        self.print("booted");
        recorded("boot")
    }

    fn pause(&mut self) -> Reply {
        match &mut self.vm {
            Some(vm) if vm.state == "Running" => vm.state = "Paused",
            Some(vm) if vm.state == "Paused" => return recorded("pause-twice"),
            _ => return recorded("pause-before-boot"),
        }
        recorded("pause")
    }

    fn resume(&mut self) -> Reply {
        let line = match &mut self.vm {
            Some(vm) if vm.state == "Paused" => {
                vm.state = "Running";
                if let Some(served) = &vm.served
                    && vm.counter == 0
                {
                    vm.counter = served.read(0).into();
                }
                vm.counter += 1;
                format!(
                    "resumed {} in {} memory{}",
                    vm.counter,
                    vm.memory,
                    vm.touch(&self.touches)
                )
            }
            _ => return recorded("resume-twice"),
        };
        self.print(&line);
        recorded("resume")
    }

    /// In mode `Tty`, that is to where the standard output went; the others are not played.
    fn print(&mut self, line: &str) {
        let mode = self.vm.as_ref().map(|vm| &vm.config["serial"]["mode"]);
        if mode.is_some_and(|mode| mode == "Tty") {
            writeln!(self.console, "{line}").unwrap();
        }
    }

    /// In mode `Tty`, input comes from the standard input, and only if that is a terminal.
    fn read_console(&mut self) {
        assert!(std::io::stdin().is_terminal());
        let mut input = [0; 64];
        let length = rustix::io::read(std::io::stdin(), &mut input).unwrap();
        self.print(&format!("read {}", input[..length].escape_ascii()));
    }
}

/// The vsock device. In the guest somebody listens on port 1024, who says each byte back.
fn listen_for_the_guest(config: &Value) -> Result<(), Reply> {
    let Some(socket) = config["vsock"]["socket"].as_str() else {
        return Ok(());
    };
    let listener = UnixListener::bind(socket).map_err(|_| error("the vsock's socket is there already"))?;
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            std::thread::spawn(|| serve_vsock(connection.unwrap()));
        }
    });
    Ok(())
}

/// To nobody on any other port the connection is closed.
fn serve_vsock(mut connection: UnixStream) {
    let mut line = [0; 13];
    connection.read_exact(&mut line).unwrap();
    if line != *b"CONNECT 1024\n" {
        return;
    }
    connection.write_all(b"OK 1073741824\nhello").unwrap();
    let mut byte = [0];
    while connection.read_exact(&mut byte).is_ok() {
        connection.write_all(&byte).unwrap();
    }
}

fn recorded_config() -> Value {
    json_of(&fixture("cloud-hypervisor/config.json"))
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn memory_manager(state: &Value) -> Value {
    serde_json::from_str(state.pointer(MEMORY_MANAGER).unwrap().as_str().unwrap()).unwrap()
}

fn memory_size(config: &Value) -> u64 {
    config["memory"]["zones"][0]["size"].as_u64().unwrap()
}

fn path_in(body: &Value, field: &str) -> PathBuf {
    body[field]
        .as_str()
        .unwrap()
        .strip_prefix("file://")
        .unwrap()
        .into()
}
