//! The requests for pages, one after the other: answered from the snapshot, and recorded if that is asked for.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use stencil_core::generation::MemoryGeneration;
use stencil_core::{InstanceDir, error_chain};
use stencil_uffd::{Closed, Fatal, Gpa, Mark, PAGE_SIZE, Recorder, Window};
use zerocopy::{FromZeros, IntoBytes};

use super::files::Files;
use super::memory::Memory;
use super::tally::Tally;
use super::walk::{Asker, Walk};
use super::wire::{Command, PageFault, Response};

/// Pages that are put in together when one of them is touched. While recording only the page itself is, to see each touch.
const READ_AROUND: usize = 8;
/// How long each request of the walk waits while hot pages are recorded and the guest is idle, so that the walk does not come
/// to its end before the recording does. The guest's next request may have to wait as long, once.
const WAIT_IDLE: Duration = Duration::from_millis(1);
/// The same before the guest's first request: the VM may stay paused for long, and nothing is recorded yet.
const WAIT_PAUSED: Duration = Duration::from_millis(5);
/// A guest is idle that has asked for nothing for so long. While it is busy, the walk gets one request in between at most.
const IDLE_AFTER: Duration = Duration::from_millis(2);
/// How long a VMM that closed the connection has to be dead.
const END_LIMIT: Duration = Duration::from_secs(5);
/// So many requests of the walk are counted before the file has them.
const WALK_UNTOLD: u64 = 1024;

/// Pages can no longer be served. The guest cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// A page cannot be had.
    #[error(transparent)]
    Page(#[from] Fatal),
    /// The connection broke in the middle of a message.
    #[error("the connection on which Cloud Hypervisor asks for pages broke")]
    Connection(#[source] io::Error),
    /// What came is no request for a page.
    #[error(
        "Cloud Hypervisor sent command {command} with {length} bytes; the protocol of v53 has 9 with 16 here"
    )]
    Malformed {
        /// The command's number.
        command: u16,
        /// The length of its payload, as it says.
        length: u64,
    },
    /// What it asks for is no page of the guest.
    #[error(
        "Cloud Hypervisor asked for {length} bytes at {gpa}; it takes a page of {PAGE_SIZE} bytes of the guest's memory"
    )]
    NoPage {
        /// Where.
        gpa: Gpa,
        /// How much, in bytes.
        length: u64,
    },
    /// The connection was closed too early.
    #[error("Cloud Hypervisor stopped asking for pages before all were there, and goes on")]
    Unfinished,
}

/// Who serves.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) memory: Memory,
    pub(super) generation: MemoryGeneration,
    pub(super) tally: Arc<Tally>,
    /// Set when the VM has been handed over: what is asked for before that is no touch of its guest.
    pub(super) is_handed_over: Arc<AtomicBool>,
    walk: Walk,
    recording: Option<Recorder>,
    /// When the guest last asked for a page, since the VM was handed over.
    asked_last: Option<Instant>,
    saving: Option<JoinHandle<()>>,
}

impl Server {
    /// That records if it is to.
    pub(super) fn new(
        memory: Memory,
        generation: MemoryGeneration,
        tally: Arc<Tally>,
        is_handed_over: Arc<AtomicBool>,
        record: bool,
    ) -> Self {
        let walk = Walk::new(memory.pages());
        Self {
            walk,
            memory,
            generation,
            tally,
            is_handed_over,
            recording: record.then(|| Recorder::new(Window::OF_A_FORK)),
            asked_last: None,
            saving: None,
        }
    }

    /// Answers requests until Cloud Hypervisor closes the connection: all memory is there then, or the VMM has ended.
    pub(super) fn serve(mut self, mut connection: UnixStream, vmm: &File) -> Result<(), FaultError> {
        let served = self.answer_all(&mut connection);
        if served.is_ok() {
            self.close_recording(Closed::Taken);
        }
        if let Some(saving) = self.saving.take() {
            // What it could not do, it has said.
            let _ = saving.join();
        }
        if served.is_err() {
            self.tally.recording.set(0);
        }
        let _ = self.tally.write();
        served?;
        // A VM that was never there misses nothing. Of another only the VMM's end can have closed the connection too early.
        let was_there = self.is_handed_over.load(Ordering::Acquire);
        if was_there && !self.memory.is_complete() && !has_ended_within(vmm, END_LIMIT) {
            return Err(FaultError::Unfinished);
        }
        Ok(())
    }

    fn answer_all(&mut self, connection: &mut UnixStream) -> Result<(), FaultError> {
        let mut untold = 0;
        loop {
            self.wait(connection)?;
            let Some(asker) = self.answer(connection)? else {
                return Ok(());
            };
            untold += 1;
            if asker == Asker::Guest || untold >= WALK_UNTOLD {
                // That nobody can read the numbers is no reason to end the guest.
                let _ = self.tally.write();
                untold = 0;
            }
            self.close_recording_if_over();
        }
    }

    /// Waits for a request while a recording's time runs, and closes it in time.
    fn wait(&mut self, connection: &UnixStream) -> Result<(), FaultError> {
        while let Some(deadline) = self.recording.as_ref().and_then(Recorder::deadline) {
            let left = deadline.saturating_duration_since(Instant::now());
            if is_readable(connection, left).map_err(FaultError::Connection)? {
                break;
            }
            self.close_recording_if_over();
        }
        Ok(())
    }

    /// Reads a request and answers it. `None` at the end of the connection.
    fn answer(&mut self, connection: &mut UnixStream) -> Result<Option<Asker>, FaultError> {
        let Some(gpa) = next_request(connection)? else {
            return Ok(None);
        };
        let (region, page) = self.memory.locate(gpa).ok_or(FaultError::NoPage {
            gpa,
            length: PAGE_SIZE,
        })?;
        let asker = self.walk.ask(region, page);
        if self.walk.is_over() {
            // After this answer the kernel gives zeros for what is missing.
            self.close_recording(Closed::Taken);
            self.memory.complete()?;
        }
        match asker {
            Asker::Guest => self.serve_guest(gpa, region, page)?,
            Asker::PerhapsWalk => self.serve_walk(region, page)?,
        }
        match connection.write_all(Response::ok().as_bytes()) {
            Ok(()) => Ok(Some(asker)),
            Err(error) if is_end(&error) => Ok(None),
            Err(error) => Err(FaultError::Connection(error)),
        }
    }

    fn serve_guest(&mut self, gpa: Gpa, region: usize, page: usize) -> Result<(), FaultError> {
        self.tally.demand_faults.add(1);
        let around = if self.recording.is_some() { 1 } else { READ_AROUND };
        let is_read = self.memory.serve(region, page, around)?;
        if let Some(recorder) = &mut self.recording {
            let now = Instant::now();
            if self.is_handed_over.load(Ordering::Acquire) {
                recorder.begin(now);
                self.asked_last = Some(now);
            }
            // Zeros that are known without reading are in no list.
            if is_read {
                // What it was touched for is not told; its bytes will tell.
                recorder.touch(gpa, Mark::Written, now);
            }
        }
        Ok(())
    }

    fn serve_walk(&mut self, region: usize, page: usize) -> Result<(), FaultError> {
        self.tally.walk_requests.add(1);
        if self.recording.is_some() {
            // The page stays away, so that the guest's touch of it will be seen.
            self.slow_down();
            return Ok(());
        }
        // It may be the guest after all.
        self.memory.bring(region, page)?;
        self.memory.go_on()?;
        Ok(())
    }

    /// Holds back the walk, which nobody waits for, while the guest does nothing.
    fn slow_down(&self) {
        match self.asked_last {
            Some(at) if at.elapsed() < IDLE_AFTER => {}
            Some(_) => thread::sleep(WAIT_IDLE),
            None if self.is_handed_over.load(Ordering::Acquire) => thread::sleep(WAIT_PAUSED),
            // The VM is being made, and touches memory too.
            None => {}
        }
    }

    fn close_recording_if_over(&mut self) {
        let over = self
            .recording
            .as_ref()
            .and_then(|recorder| recorder.is_over(Instant::now()));
        if let Some(why) = over {
            self.close_recording(why);
        }
    }

    /// Closes the recording, if it is open, and writes its list on a thread of its own. One without a guest makes none.
    fn close_recording(&mut self, why: Closed) {
        let Some(recorder) = self.recording.take() else {
            return;
        };
        if recorder.deadline().is_none() {
            self.tally.recording.set(0);
            return;
        }
        let recording = recorder.close(self.generation, why, false);
        let (files, tally) = (Arc::clone(&self.memory.files), Arc::clone(&self.tally));
        self.saving = Some(thread::spawn(move || save(recording, &files, &tally)));
    }
}

/// Writes the list of a recording. That it cannot be written costs its guest nothing.
fn save(mut recording: stencil_uffd::Recording, files: &Files, tally: &Tally) {
    // A page that cannot be compared counts as it was recorded.
    recording.keep_written(|gpa| files.differs(gpa).unwrap_or(true));
    let hot = recording.hot_pages();
    match hot.save(Path::new(InstanceDir::RECORDED_HOT_PAGES)) {
        Ok(()) => {
            tally.recorded.set(hot.pages());
            eprintln!("pager: hot pages recorded: {}", hot.pages());
        }
        Err(error) => eprintln!("pager: hot pages are not recorded: {}", error_chain(&error)),
    }
    tally.recording.set(0);
    let _ = tally.write();
}

/// The next page that is asked for. `None` at the end of the connection.
fn next_request(connection: &mut UnixStream) -> Result<Option<Gpa>, FaultError> {
    let mut request = PageFault::new_zeroed();
    match connection.read_exact(request.as_mut_bytes()) {
        Ok(()) => {}
        // A VMM that is killed closes it with what was not read: that is a reset.
        Err(error) if is_end(&error) => return Ok(None),
        Err(error) => return Err(FaultError::Connection(error)),
    }
    let (command, length) = (request.head.command.get(), request.head.length.get());
    if (command, length) != (Command::PageFault as u16, PageFault::PAYLOAD) {
        return Err(FaultError::Malformed { command, length });
    }
    let (gpa, length) = (Gpa::new(request.gpa.get()), request.length.get());
    if length != PAGE_SIZE || !gpa.get().is_multiple_of(PAGE_SIZE) {
        return Err(FaultError::NoPage { gpa, length });
    }
    Ok(Some(gpa))
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

fn is_readable(connection: &UnixStream, within: Duration) -> io::Result<bool> {
    let mut ready = [PollFd::new(connection, PollFlags::IN)];
    let within = Timespec::try_from(within).map_err(io::Error::other)?;
    match poll(&mut ready, Some(&within)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the process of a pidfd has ended, or does so in time.
pub(super) fn has_ended_within(pidfd: &File, limit: Duration) -> bool {
    let mut ready = [PollFd::new(pidfd, PollFlags::IN)];
    Timespec::try_from(limit).is_ok_and(|limit| poll(&mut ready, Some(&limit)).is_ok_and(|ready| ready > 0))
}
