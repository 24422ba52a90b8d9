//! The pager: a small process beside each Cloud Hypervisor whose memory comes in [`MemoryMode::Uffd`](stencil_core::MemoryMode).
//!
//! Cloud Hypervisor (v53) is told to receive a local migration; the pager is its sender, and the VM that it sends is the
//! snapshot's. Guest memory is in memfds that both have.
//!
//! ```text
//!   server ── starts ──> pager                                      Cloud Hypervisor
//!     │                    │ hot pages ──> memfds                     │ vm.receive-migration
//!     │                    ├── Start, MemoryFd (each region), Config ─>│ migration.sock
//!     │                    ├── (a second connection for faults) ─────>│
//!     │                    ├── State, CompletePaused ────────────────>│ the VM is there, paused
//!     │                    │<── PageFault: the page is not in its memfd │<── a vCPU or a device touches it
//!     │                    │ page ──> memfd, answer                    │ wakes who waits
//!     └── pidfd: failed? ──┘                                           v
//! ```
//!
//! Its input is in its working directory, the instance's: the files that the VM is restored from, rewritten by the same code as
//! for the other memory modes. It leaves there its numbers, the list of hot pages if it records, and why it failed if it does.
//!
//! # What it promises
//!
//! - A page has the contents of the snapshot, or zeros where the snapshot has a hole. One that cannot be read ends the VMM, and
//!   the pager says why in the instance's `vmm.log` and to the server.
//! - It ends with its VMM; or before, when all memory is there: Cloud Hypervisor brings in what nobody touched behind the
//!   guest's back, and the pager, which moves many pages at a time, is ahead of that.
//! - If it is killed, the server that started it ends the VMM at once, while it lives; else Cloud Hypervisor ends at its next fault.
//!   Each server tells why (`last_words.rs`).
//!
//! # Recording
//!
//! How a guest's request is told from Cloud Hypervisor's own walk through memory is in `walk.rs`: none of the walk's is
//! recorded, and none of the guest's is missed, because pages that only the walk asks for stay away until the recording
//! closes. It opens with the guest's first request, and closes as [`Window::OF_A_FORK`](stencil_uffd::Window) says, or when the
//! walk has come to its end: a small guest's after some seconds.

mod faults;
mod files;
pub(super) mod last_words;
mod memory;
mod sender;
pub(super) mod tally;
mod walk;
mod wire;

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Signal, pidfd_send_signal};
use stencil_core::generation::MemoryGeneration;
use stencil_core::{SnapshotDir, error_chain};
use stencil_uffd::{Gpa, HotPages, ImageError, MemoryImage, PREFETCH_BUDGET, RangeError, RangeTable};

use super::restore_dir;
use super::snapshot::{SnapshotError, State};
pub use faults::FaultError;
use faults::{Server, has_ended_within};
pub use files::MemoryError;
use last_words::LastWords;
use memory::Memory;
use sender::{Sender, StepError};
use tally::Tally;

/// The socket on which Cloud Hypervisor receives, in the instance's directory.
pub(super) const SOCKET: &str = "migration.sock";
/// The pager's numbers, in the instance's directory.
pub(super) const TALLY: &str = "pages";

/// How long Cloud Hypervisor has to listen: it is asked to when the pager is started.
const LISTEN_LIMIT: Duration = Duration::from_secs(30);

/// What a pager is asked. Its standard input is a pidfd of its VMM, its working directory the instance's.
#[derive(Clone, Debug)]
pub struct Request {
    /// Which memory the snapshot holds.
    pub memory_generation: MemoryGeneration,
    /// What is done about the pages that the guest touches first.
    pub hot_pages: Ahead,
}

/// What a pager does about the pages that the guest touches first.
#[derive(Clone, Debug)]
pub enum Ahead {
    /// Nothing.
    Nothing,
    /// Those in this list are there before the VM is. A list that cannot be used is ignored, and that is said.
    Fetch(PathBuf),
    /// They are recorded.
    Record,
}

/// Why a pager failed.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// A file of the instance cannot be used.
    #[error("cannot use {name} in the instance's directory")]
    File {
        /// Its name.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// The snapshot is not one that can be served.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The snapshot's memory is not as its state says.
    #[error("the snapshot's memory cannot be served")]
    Ranges(#[from] RangeError),
    /// The snapshot's memory cannot be opened.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// There is no memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Cloud Hypervisor does not listen.
    #[error("Cloud Hypervisor does not receive the VM")]
    Connect(#[source] io::Error),
    /// Cloud Hypervisor did not take the VM.
    #[error("Cloud Hypervisor did not take the VM over")]
    HandOver(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The guest's pages can no longer be served.
    #[error("the guest's memory is lost")]
    Lost(#[from] FaultError),
}

/// Hands the VM over and serves its memory until all of it is there or the VMM has ended.
///
/// # Errors
/// See [`PagerError`]. The reason is in the instance's directory then, and the VMM is ended if its guest had begun to count on
/// the pager.
pub fn run(request: &Request) -> Result<(), PagerError> {
    // It is in one already where it is started by hand.
    let _ = rustix::process::setsid();
    let vmm = io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map(File::from)
        .map_err(file("standard input"))?;
    let last_words = LastWords::begin().map_err(file(last_words::NAME))?;
    let served = serve(request, &vmm);
    match &served {
        Ok(()) => last_words.none(),
        Err(failed) => {
            // First why, then the end, so that whoever sees the one finds the other.
            last_words.say(&error_chain(failed));
            if let PagerError::Lost(_) = failed {
                // It may have ended by itself.
                let _ = pidfd_send_signal(&vmm, Signal::KILL);
            }
        }
    }
    served
}

fn serve(request: &Request, vmm: &File) -> Result<(), PagerError> {
    let tally = Arc::new(Tally::create(Path::new(TALLY)).map_err(file(TALLY))?);
    let files = SnapshotDir::new(restore_dir::NAME);
    let config = read(&files.config())?;
    let state_json = read(&files.state())?;
    let state = State::read(&state_json)?;
    let config = state.migration_config(&config)?;

    let ranges = &state.memory.memory_ranges.data;
    let table = RangeTable::packed(ranges.iter().map(|range| (Gpa::new(range.gpa), range.length)))?;
    let image = MemoryImage::open(&files.memory_ranges(), table, request.memory_generation)?;
    let mut memory = Memory::new(
        &state.memory.guest_ram_mappings,
        Arc::new(image),
        Arc::clone(&tally),
    )?;
    if let Ahead::Fetch(list) = &request.hot_pages {
        match load(list, request.memory_generation) {
            Ok(hot) => memory.prefetch(&hot, PREFETCH_BUDGET).map_err(FaultError::Page)?,
            Err(why) => {
                eprintln!("pager: no hot pages: {why}");
                tally.prefetch_ignored.set(1);
            }
        }
    }
    let record = matches!(request.hot_pages, Ahead::Record);
    tally.recording.set(record.into());
    let _ = tally.write();

    let mut sender = Sender::new(connect(vmm)?);
    let hand_over = |error: StepError| PagerError::HandOver(Box::new(error));
    sender.start().map_err(hand_over)?;
    for region in &memory.files.regions {
        sender
            .memory(region.slot, region.file.as_fd())
            .map_err(hand_over)?;
    }
    sender.config(&config).map_err(hand_over)?;
    let is_handed_over = Arc::new(AtomicBool::new(false));
    let server = Server::new(
        memory,
        request.memory_generation,
        tally,
        Arc::clone(&is_handed_over),
        record,
    );
    thread::scope(|scope| {
        let connection = fault_connection().map_err(PagerError::Connect)?;
        let ours = connection.try_clone().map_err(PagerError::Connect)?;
        let faults = scope.spawn(move || server.serve(connection, vmm));
        let handed_over = sender.state(&state_json).and_then(|()| sender.complete_paused());
        is_handed_over.store(handed_over.is_ok(), Ordering::Release);
        drop(sender);
        if handed_over.is_err() {
            // There is no guest to serve. That it is closed already is as good.
            let _ = ours.shutdown(Shutdown::Both);
        }
        let served = match faults.join() {
            Ok(served) => served,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        match (served, handed_over) {
            // A page that cannot be had is why the rest failed.
            (Err(lost @ FaultError::Page(_)), _) => Err(lost.into()),
            (_, Err(refused)) => Err(hand_over(refused)),
            (served, Ok(())) => Ok(served?),
        }
    })
}

/// The connection on which pages are asked for.
fn fault_connection() -> io::Result<UnixStream> {
    let mut connection = UnixStream::connect(SOCKET)?;
    connection.write_all(&wire::FAULT_ROLE)?;
    Ok(connection)
}

/// Connects as soon as Cloud Hypervisor listens. It makes the socket itself, so that there is nothing to wait for before.
fn connect(vmm: &File) -> Result<UnixStream, PagerError> {
    let limit = Instant::now() + LISTEN_LIMIT;
    loop {
        match UnixStream::connect(SOCKET) {
            Ok(connection) => return Ok(connection),
            Err(error) if Instant::now() >= limit => return Err(PagerError::Connect(error)),
            // The VMM's end is waited for meanwhile.
            Err(_) if !has_ended_within(vmm, Duration::from_millis(1)) => {}
            Err(error) => return Err(PagerError::Connect(error)),
        }
    }
}

fn load(list: &Path, generation: MemoryGeneration) -> Result<HotPages, String> {
    // A pipe would not be opened until somebody writes to it.
    if !fs::metadata(list).is_ok_and(|found| found.is_file()) {
        return Err("the list is no regular file".to_owned());
    }
    HotPages::load(list, generation).map_err(|error| error_chain(&error))
}

fn read(path: &Path) -> Result<Vec<u8>, PagerError> {
    fs::read(path).map_err(file(&path.to_string_lossy()))
}

fn file(name: &str) -> impl FnOnce(io::Error) -> PagerError {
    let name = name.to_owned();
    move |source| PagerError::File { name, source }
}
