//! The page server: threads that fill the pages of a guest as it touches them.
//!
//! ```text
//!                    +----------------------------- a thread of the server ----------------------------+
//!                    |                                                                                  |
//!   a touch  --------+-> drain all events -> discarded, unmapped: remembered                            |
//!   (vCPU, VMM)      |        |                                                                         |
//!      waits         |        v                                                                         |
//!        ^           |   faults, one after the other: zeros? -> UFFDIO_ZEROPAGE --+                     |
//!        |           |        |                       data?  -> read, UFFDIO_COPY +-> counted, recorded |
//!        +-----------+--------+-----------------------------------<---------------+                     |
//!                    |        v                                                                         |
//!                    |   none left: a batch of hot pages, and back to the events                        |
//!                    |        |                                                                         |
//!                    |        v                                                                         |
//!                    |   nothing left: wait for events, or for the end                                  |
//!                    +----------------------------------------------------------------------------------+
//! ```

mod shared;
mod worker;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use stencil_core::generation::MemoryGeneration;

use crate::address::{Gpa, PAGE, PAGE_SIZE};
use crate::counters::Counters;
use crate::hot_pages::HotPages;
use crate::mapping::GuestMapping;
use crate::memory::{Area, Memory};
use crate::record::{Closed, Recording, Window};
use crate::source::PageSource;
use crate::userfault::{Userfault, UserfaultError};
use shared::Shared;

/// How memory is served.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Pages that are filled together when one of them is touched, if they are of one kind: an aligned group of so
    /// many. 1 fills only the page itself, and more than 512 (2 MiB) count as 512. While recording, only the page
    /// itself is filled, to see each touch.
    pub read_around: usize,
    /// Threads that serve. More than one is for sources that are slow to answer.
    pub threads: usize,
    /// What is done beside serving.
    pub plan: Plan,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            read_around: 8,
            threads: 1,
            plan: Plan::Demand,
        }
    }
}

/// What a server does beside serving faults.
#[derive(Clone, Debug)]
pub enum Plan {
    /// Nothing.
    Demand,
    /// It records first touches. (Not beside a prefetch: nobody faults on a page that is there.)
    Record(Window),
    /// It fetches hot pages before they are touched. One that cannot be read ends the guest like one that is touched.
    Prefetch {
        /// The pages.
        hot: HotPages,
        /// How many bytes of them, in the order of first touch, before [`PageServer::before_resume`] returns. The rest
        /// follows behind the running guest.
        budget: u64,
    },
}

/// Something that the server says on its own, from one of its threads.
#[derive(Clone, Debug)]
pub enum Notice {
    /// The guest cannot go on and must be ended, now. Until this call returns, who waits for the page waits on; then
    /// all access to memory is taken away: vCPUs get EFAULT from KVM_RUN, and other threads SIGSEGV at their next
    /// touch.
    Fatal(Arc<Fatal>),
    /// The recording closed by itself, and can be taken.
    RecordingClosed(Closed),
}

/// Why a guest cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// A page cannot be read.
    #[error("the page at gpa {gpa} cannot be read, at byte {file_offset} of the image")]
    Unreadable {
        /// Where the page begins in the guest.
        gpa: Gpa,
        /// Where it begins in the image, in bytes.
        file_offset: u64,
        /// Why.
        source: io::Error,
    },
    /// A page was read, and the kernel does not take it.
    #[error("the page at gpa {gpa}, at byte {file_offset} of the image, cannot be put into memory")]
    NotFilled {
        /// Where the page begins in the guest.
        gpa: Gpa,
        /// Where it begins in the image, in bytes.
        file_offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The kernel no longer tells of faults.
    #[error("page faults can no longer be received")]
    Events(#[source] io::Error),
    /// The source, or this crate, has a bug.
    #[error("the page server panicked: {0}")]
    Panicked(String),
}

/// A server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The host's pages are of another size.
    #[error("this host has pages of {found} bytes, and memory is served in pages of {PAGE_SIZE}")]
    PageSize {
        /// The host's.
        found: usize,
    },
    /// The source does not have the memory that is to be served.
    #[error("{mapping:?} does not lie in one range of the image")]
    NotInImage {
        /// The memory.
        mapping: GuestMapping,
    },
    /// The hot pages are of another memory.
    #[error("the hot pages are of memory {found}, and the image is {expected}")]
    OtherMemory {
        /// The list's.
        found: MemoryGeneration,
        /// The image's.
        expected: MemoryGeneration,
    },
    /// The kernel does not let it.
    #[error(transparent)]
    Userfault(#[from] UserfaultError),
    /// There is no thread, or no descriptor, to be had.
    #[error("the page server's threads cannot be started")]
    Threads(#[source] io::Error),
}

/// Threads that serve the memory of one guest. Dropped, it stops.
pub struct PageServer {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl PageServer {
    /// Serves `mappings` from `source` from now on, and begins to prefetch.
    ///
    /// `notify` is called on the server's threads. It may end the process; it must be quick, must not touch the memory,
    /// and must not wait for the server.
    ///
    /// # Errors
    ///
    /// See [`StartError`]. The guest must not run then: its memory is empty.
    pub fn start(
        mappings: &[GuestMapping],
        source: Arc<dyn PageSource>,
        settings: Settings,
        notify: impl Fn(Notice) + Send + Sync + 'static,
    ) -> Result<Self, StartError> {
        let found = rustix::param::page_size();
        if found != PAGE {
            return Err(StartError::PageSize { found });
        }
        if let Plan::Prefetch { hot, .. } = &settings.plan
            && hot.generation() != source.generation()
        {
            return Err(StartError::OtherMemory {
                found: hot.generation(),
                expected: source.generation(),
            });
        }
        let mut areas = Vec::with_capacity(mappings.len());
        for mapping in mappings {
            let area = Area::new(*mapping, source.table());
            areas.push(area.ok_or(StartError::NotInImage { mapping: *mapping })?);
        }
        let userfault = Userfault::open(matches!(settings.plan, Plan::Record(_)))?;
        let memory = Memory::new(userfault, areas)?;
        let count = settings.threads.max(1);
        let shared = Shared::new(memory, source, settings, Box::new(notify)).map_err(StartError::Threads)?;
        // From here on, dropping it ends what was started.
        let mut server = Self {
            shared: Arc::new(shared),
            threads: Vec::with_capacity(count),
        };
        for number in 0..count {
            let shared = Arc::clone(&server.shared);
            let thread = std::thread::Builder::new()
                .name(format!("pages-{number}"))
                .spawn(move || worker::work(&shared, number == 0));
            server.threads.push(thread.map_err(StartError::Threads)?);
        }
        Ok(server)
    }

    /// To be called just before the guest resumes: waits until the budget of the prefetch is there, and starts the
    /// clock of the recording.
    ///
    /// # Errors
    ///
    /// The guest must not resume: a page of it cannot be read.
    pub fn before_resume(&self) -> Result<(), Arc<Fatal>> {
        self.shared.before_resume()
    }

    /// What was done so far. A fault that is being served may be counted only in part: [`stop`](Self::stop) says the
    /// end.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.tally.read()
    }

    /// Why the guest cannot go on, if it cannot.
    #[must_use]
    pub fn fatal(&self) -> Option<Arc<Fatal>> {
        self.shared.fatal()
    }

    /// Closes the recording if it is open, and gives it away. `None` if there was none, or it was taken.
    #[must_use]
    pub fn take_recording(&self) -> Option<Recording> {
        self.shared.take_recording()
    }

    /// Stops serving. If every page is there, memory goes on as ordinary memory. If not, all access to it is taken
    /// away: whoever waits for a page, or touches the memory later, gets SIGSEGV (a vCPU: EFAULT from KVM_RUN). The
    /// VM must have ended, or ends by that.
    ///
    /// Returns what was done in all. Dropping the server does the same, and does not say.
    pub fn stop(mut self) -> Counters {
        self.end();
        self.counters()
    }

    fn end(&mut self) {
        self.shared.ask_to_stop();
        let this = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // A callback that drops the server is on one of its threads, which ends by itself.
            if thread.thread().id() != this {
                // It ended in any case; a panic was told as Fatal.
                let _ = thread.join();
            }
        }
        if !self.shared.memory.revoke() {
            // Waiting for ever is bad; zeros are worse.
            std::mem::forget(Arc::clone(&self.shared));
        }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for PageServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageServer")
            .field(
                "mappings",
                &self
                    .shared
                    .memory
                    .areas
                    .iter()
                    .map(|area| area.mapping)
                    .collect::<Vec<_>>(),
            )
            .field("threads", &self.threads.len())
            .finish_non_exhaustive()
    }
}
