//! What the threads of a server share, among themselves and with who started it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::{Fatal, Notice, Plan, Settings};
use crate::counters::Tally;
use crate::hot_pages::Mark;
use crate::memory::Memory;
use crate::prefetch::Prefetcher;
use crate::record::{Closed, Recorder, Recording};
use crate::source::PageSource;

/// Pages that are filled together at most: 2 MiB.
const MAX_READ_AROUND: usize = 512;

/// A fault that waits to be served.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) address: usize,
    pub(super) kind: userfaultfd::FaultKind,
    pub(super) mark: Mark,
    /// When it was read from the kernel.
    pub(super) seen: Instant,
}

/// How far the server is, for who waits for it.
#[derive(Debug, Default)]
struct Progress {
    /// What the guest must have before it resumes is there.
    ready: bool,
    fatal: Option<Arc<Fatal>>,
}

#[derive(Debug)]
enum RecordingState {
    None,
    Open(Recorder),
    Closed(Recording),
}

pub(super) struct Shared {
    pub(super) memory: Memory,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) read_around: usize,
    pub(super) threads: usize,
    pub(super) tally: Tally,
    /// Held shared while pages are filled, exclusively while events are read: what is told of discarded memory is known
    /// before the next fill, so that no page gets its old contents again.
    pub(super) gate: RwLock<()>,
    pub(super) faults: Mutex<VecDeque<Fault>>,
    /// Readable when there are faults for another thread: a semaphore.
    pub(super) more: OwnedFd,
    /// Readable when all is over.
    pub(super) stop: OwnedFd,
    stopping: AtomicBool,
    /// Taken by the first thread.
    pub(super) prefetcher: Mutex<Option<Prefetcher>>,
    progress: Mutex<Progress>,
    progressed: Condvar,
    recording: Mutex<RecordingState>,
    is_recording: AtomicBool,
    /// Pages are still write-protected by a recording that closed.
    pub(super) protected: AtomicBool,
    notify: Box<dyn Fn(Notice) + Send + Sync>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(
        memory: Memory,
        source: Arc<dyn PageSource>,
        settings: Settings,
        notify: Box<dyn Fn(Notice) + Send + Sync>,
    ) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let (recording, prefetcher) = match settings.plan {
            Plan::Demand => (RecordingState::None, None),
            Plan::Record(window) => (RecordingState::Open(Recorder::new(window)), None),
            Plan::Prefetch { hot, budget } => (RecordingState::None, Some(Prefetcher::new(&hot, budget))),
        };
        Ok(Self {
            memory,
            source,
            read_around: settings.read_around.clamp(1, MAX_READ_AROUND),
            threads: settings.threads.max(1),
            tally: Tally::new(),
            gate: RwLock::new(()),
            faults: Mutex::default(),
            more: eventfd(0, flags | EventfdFlags::SEMAPHORE)?,
            stop: eventfd(0, flags)?,
            stopping: AtomicBool::new(false),
            progress: Mutex::new(Progress {
                ready: prefetcher.is_none(),
                fatal: None,
            }),
            progressed: Condvar::new(),
            prefetcher: Mutex::new(prefetcher),
            is_recording: AtomicBool::new(matches!(recording, RecordingState::Open(_))),
            recording: Mutex::new(recording),
            protected: AtomicBool::new(false),
            notify,
        })
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    pub(super) fn ask_to_stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // An eventfd takes any number below 2^64 - 1, and only a thread could miss it that does not wait.
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
    }

    /// Wakes so many threads.
    pub(super) fn call_for_help(&self, threads: u64) {
        // As above.
        let _ = rustix::io::write(&self.more, &threads.to_ne_bytes());
    }

    /// What the guest must have is there.
    pub(super) fn ready(&self) {
        lock(&self.progress).ready = true;
        self.progressed.notify_all();
    }

    pub(super) fn before_resume(&self) -> Result<(), Arc<Fatal>> {
        let mut progress = lock(&self.progress);
        while !progress.ready && progress.fatal.is_none() {
            progress = self
                .progressed
                .wait(progress)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(fatal) = &progress.fatal {
            return Err(Arc::clone(fatal));
        }
        drop(progress);
        if let RecordingState::Open(recorder) = &mut *lock(&self.recording) {
            recorder.begin(Instant::now());
        }
        // The thread that waits does not yet know the deadline.
        self.call_for_help(1);
        Ok(())
    }

    pub(super) fn fatal(&self) -> Option<Arc<Fatal>> {
        lock(&self.progress).fatal.clone()
    }

    /// The guest cannot go on: says so, once, and takes its memory away whatever becomes of that.
    pub(super) fn fail(&self, fatal: Fatal) {
        struct Revoke<'a>(&'a Memory);
        impl Drop for Revoke<'_> {
            fn drop(&mut self) {
                self.0.revoke();
            }
        }
        let fatal = Arc::new(fatal);
        {
            let mut progress = lock(&self.progress);
            if progress.fatal.is_some() {
                return;
            }
            progress.fatal = Some(Arc::clone(&fatal));
            self.progressed.notify_all();
        }
        let _revoke = Revoke(&self.memory);
        self.ask_to_stop();
        (self.notify)(Notice::Fatal(fatal));
    }

    pub(super) fn is_recording(&self) -> bool {
        self.is_recording.load(Ordering::Relaxed)
    }

    pub(super) fn record(&self, gpa: crate::address::Gpa, mark: Mark, now: Instant) {
        if let RecordingState::Open(recorder) = &mut *lock(&self.recording) {
            recorder.touch(gpa, mark, now);
        }
    }

    /// When the recording is over by time.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match &*lock(&self.recording) {
            RecordingState::Open(recorder) => recorder.deadline(),
            _ => None,
        }
    }

    /// Closes the recording if it is over, and says so.
    pub(super) fn close_if_over(&self) {
        let over = match &*lock(&self.recording) {
            RecordingState::Open(recorder) => recorder.is_over(Instant::now()),
            _ => None,
        };
        if let Some(closed) = over
            && self.close(closed)
        {
            (self.notify)(Notice::RecordingClosed(closed));
        }
    }

    pub(super) fn take_recording(&self) -> Option<Recording> {
        self.close(Closed::Taken);
        let mut recording = lock(&self.recording);
        match std::mem::replace(&mut *recording, RecordingState::None) {
            RecordingState::Closed(taken) => Some(taken),
            _ => None,
        }
    }

    /// Whether it was open.
    fn close(&self, closed: Closed) -> bool {
        let mut recording = lock(&self.recording);
        match std::mem::replace(&mut *recording, RecordingState::None) {
            RecordingState::Open(recorder) => {
                let tells_writes = self.memory.userfault.tells_writes();
                *recording =
                    RecordingState::Closed(recorder.close(self.source.generation(), closed, tells_writes));
                self.is_recording.store(false, Ordering::Relaxed);
                self.protected.store(tells_writes, Ordering::Relaxed);
                // Somebody must lift the protection.
                self.call_for_help(1);
                true
            }
            other => {
                *recording = other;
                false
            }
        }
    }
}
