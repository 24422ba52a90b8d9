//! The receiving side of a local migration, as Cloud Hypervisor v53 plays it (`vmm/src/lib.rs`, `vmm/src/uffd.rs`): real sockets,
//! real memfds, a fault for each page that is not in them, and a walk through all of memory behind the guest's back.
//!
//! Each message is noted in the log by its bytes. Faults are those of [`Faults`]: at `Start`, `MemoryFd`, `Config`, `State` and
//! `CompletePaused`, which is what is answered; at `PageFault`, which is what is asked; `walk off`.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use rustix::fs::{SeekFrom, seek};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Signal, getpid, kill_process};
use serde_json::Value;

use super::{Faults, memory_manager};

const PAGE: u64 = 4096;
const OK: u16 = 1;
const COMMANDS: [(u16, &str); 5] = [
    (1, "Start"),
    (7, "MemoryFd"),
    (2, "Config"),
    (3, "State"),
    (8, "CompletePaused"),
];

/// What was received.
pub(super) struct Received {
    pub(super) config: Value,
    pub(super) memory: Arc<Shared>,
}

/// Receives a VM; nothing if the migration was aborted.
pub(super) fn receive(url: &str, faults: &Faults) -> Option<Received> {
    let listener = UnixListener::bind(url.strip_prefix("unix:").unwrap()).unwrap();
    let (mut sender, _) = listener.accept().unwrap();
    let (mut files, mut config, mut memory) = (Vec::new(), Value::Null, None);
    loop {
        let mut head = [0; 16];
        sender.read_exact(&mut head).ok()?;
        let command = u16::from_le_bytes(head[..2].try_into().unwrap());
        let length = u64::from_le_bytes(head[8..].try_into().unwrap());
        let (_, name) = COMMANDS.iter().find(|(known, _)| *known == command)?;
        let length_bytes = match *name {
            // It is parsed below, from as many bytes.
            "Config" | "State" => "and the length of the JSON".to_owned(),
            _ => hex(&head[8..]),
        };
        eprintln!("{name} {} {length_bytes}", hex(&head[..8]));
        if let Some(fault) = faults.at(name) {
            if !["die", "close"].contains(&fault) {
                // It answers a message, and not a half one.
                (&mut sender).take(length).read_to_end(&mut Vec::new()).unwrap();
            }
            match fault {
                "die" => kill_process(getpid(), Signal::KILL).unwrap(),
                "refuse" => respond(&mut sender, 2, 0),
                "wrong" => respond(&mut sender, 7, 0),
                "long" => respond(&mut sender, OK, u64::MAX),
                // What came of a response is there, and no more.
                "close" => sender.write_all(&[1, 0, 0]).unwrap(),
                other => panic!("there is no fault {other}"),
            }
            return None;
        }
        match *name {
            "Start" => assert_eq!(length, 0),
            "MemoryFd" => {
                assert_eq!(length, 4);
                files.push(receive_file(&sender));
            }
            "Config" => {
                let said = read_json(&mut sender, length);
                eprintln!("  {:?}", said.as_object().unwrap().keys().collect::<Vec<_>>());
                memory = Some(Shared::new(
                    &said["memory_manager_data"],
                    std::mem::take(&mut files),
                    faults,
                ));
                config = said["vm_config"].clone();
            }
            "State" => {
                let (mut connection, _) = listener.accept().unwrap();
                let mut role = [0; 2];
                connection.read_exact(&mut role).unwrap();
                eprintln!("  role {}", hex(&role));
                let memory = memory.as_ref().unwrap();
                memory.serve(connection);
                let state = read_json(&mut sender, length);
                assert_eq!(
                    memory_manager(&state)["memory_ranges"]["data"]
                        .as_array()
                        .unwrap()
                        .len(),
                    1
                );
            }
            _ => {
                respond(&mut sender, OK, 0);
                return memory.map(|memory| Received { config, memory });
            }
        }
        respond(&mut sender, OK, 0);
    }
}

fn respond(sender: &mut UnixStream, status: u16, length: u64) {
    let mut response = [0; 16];
    response[..2].copy_from_slice(&status.to_le_bytes());
    response[8..].copy_from_slice(&length.to_le_bytes());
    // It may be gone.
    let _ = sender.write_all(&response);
}

fn receive_file(sender: &UnixStream) -> (u32, File) {
    let mut slot = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        sender,
        &mut [IoSliceMut::new(&mut slot)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    );
    assert_eq!(received.unwrap().bytes, 4);
    let files = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let (slot, file) = (u32::from_le_bytes(slot), File::from(files.unwrap()));
    eprintln!(
        "  slot {slot}, a file of {} bytes",
        file.metadata().unwrap().len()
    );
    (slot, file)
}

fn read_json(sender: &mut UnixStream, length: u64) -> Value {
    let mut bytes = Vec::new();
    sender.take(length).read_to_end(&mut bytes).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect::<Vec<_>>()
        .join(" ")
}

/// Guest memory of one region at 0, that both sides have.
pub(super) struct Shared {
    file: File,
    pages: u64,
    faults: String,
    asking: Mutex<Asking>,
}

/// The connection on which pages are asked for, while userfaultfd tells of them; and which were.
struct Asking {
    connection: Option<UnixStream>,
    served: Vec<bool>,
}

impl Shared {
    fn new(memory: &Value, mut files: Vec<(u32, File)>, faults: &Faults) -> Arc<Self> {
        let mapping = &memory["guest_ram_mappings"][0];
        let (slot, file) = files.pop().unwrap();
        assert_eq!(u64::from(slot), mapping["slot"]);
        let size = mapping["size"].as_u64().unwrap();
        assert_eq!(mapping["file_offset"], 0);
        assert_eq!(file.metadata().unwrap().len(), size);
        Arc::new(Self {
            file,
            pages: size / PAGE,
            faults: faults.0.clone(),
            asking: Mutex::new(Asking {
                connection: None,
                served: vec![false; usize::try_from(size / PAGE).unwrap()],
            }),
        })
    }

    /// Faults are told from now on, and the walk begins.
    fn serve(self: &Arc<Self>, connection: UnixStream) {
        self.asking.lock().unwrap().connection = Some(connection);
        if self.faults.contains("walk off") {
            return;
        }
        let memory = Arc::clone(self);
        std::thread::spawn(move || {
            for page in 0..memory.pages {
                let mut asking = memory.asking.lock().unwrap();
                // One that cannot be had is given up, and what is not walked yet is left to the guest.
                if !asking.served[usize::try_from(page).unwrap()] && !memory.ask(&mut asking, page) {
                    return;
                }
            }
            eprintln!("the walk is over");
            memory.asking.lock().unwrap().connection = None;
        });
    }

    /// Asks for a page; whether that was answered.
    fn ask(&self, asking: &mut Asking, page: u64) -> bool {
        asking.served[usize::try_from(page).unwrap()] = true;
        let (mut command, mut payload, mut gpa, mut length) = (9_u16, 16_u64, page * PAGE, PAGE);
        match Faults(self.faults.clone()).at("PageFault") {
            Some("command") => command = 4,
            Some("payload") => payload = u64::MAX,
            Some("foreign") => gpa = 1 << 60,
            Some("odd") => gpa += 1,
            Some("long") => length = u64::MAX,
            Some(other) => panic!("there is no fault {other}"),
            None => {}
        }
        let mut request = [0; 32];
        request[..2].copy_from_slice(&command.to_le_bytes());
        request[8..16].copy_from_slice(&payload.to_le_bytes());
        request[16..24].copy_from_slice(&gpa.to_le_bytes());
        request[24..].copy_from_slice(&length.to_le_bytes());
        let connection = asking.connection.as_mut().unwrap();
        let mut response = [0; 16];
        let answered = connection
            .write_all(&request)
            .and_then(|()| connection.read_exact(&mut response))
            .is_ok();
        answered && response == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    }

    /// The guest reads the first byte of a page. One that cannot be had ends the VMM, as an error of its handler of faults.
    pub(super) fn read(&self, page: u64) -> u8 {
        while !self.is_there(page) {
            let mut asking = self.asking.lock().unwrap();
            if asking.connection.is_none() {
                // Nobody tells of faults any more: the kernel gives zeros.
                break;
            }
            if !self.ask(&mut asking, page) {
                eprintln!("page {page} cannot be had");
                std::process::exit(1);
            }
        }
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, page * PAGE).unwrap();
        byte[0]
    }

    /// The guest writes it.
    pub(super) fn write(&self, page: u64, byte: u8) {
        self.read(page);
        self.file.write_all_at(&[byte], page * PAGE).unwrap();
    }

    fn is_there(&self, page: u64) -> bool {
        seek(&self.file, SeekFrom::Data(page * PAGE)).is_ok_and(|data| data == page * PAGE)
    }
}
