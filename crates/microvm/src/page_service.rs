//! Guest memory that comes page by page, as it is touched or just before: the page server of one VM.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stencil_core::error_chain;
use stencil_uffd::{Fatal, GuestMapping, HotPages, MemoryImage, Notice, PageServer, Plan};
use stencil_uffd::{Settings, StartError, Window};

use crate::events::{Event, Events};
use crate::page_figures::PageFigures;

/// How much of the hot pages a guest waits for before it runs, in bytes. In large runs these take some 20 ms where the
/// file is in the page cache; a guest that needs more in its first moments has it come behind its back, in the order in
/// which it is needed, which costs it less than the wait.
const PREFETCH_BUDGET: u64 = 64 << 20;

/// What is recorded. A fork is ready, and has answered its first request, well within 2 s even where each page is a
/// fault; what comes later is the work of that one guest, and of no use to the next. 65536 pages are 256 MiB: a guest
/// that touches more in that time sweeps its memory, and prefetching that would be restoring it by copying.
const RECORDING: Window = Window {
    duration: Duration::from_secs(2),
    pages: 65536,
};

/// What is done about the pages that the guest touches first.
pub(crate) enum Ahead {
    Nothing,
    Fetch(HotPages),
    /// They are recorded, and the list is written to this path.
    Record(PathBuf),
}

/// The page server of a VM. It is dropped when KVM has let go of the memory, and while that is still mapped.
pub(crate) struct PageService {
    server: Arc<PageServer>,
    figures: Arc<PageFigures>,
    recording: Option<Recording>,
}

struct Recording {
    path: PathBuf,
    /// Whether the guest has run: what KVM and the VMM touch on their own makes no list.
    has_run: bool,
}

impl PageService {
    /// Serves `mappings`, which nobody has touched.
    pub(crate) fn start(
        mappings: &[GuestMapping],
        image: Arc<MemoryImage>,
        ahead: Ahead,
        figures: Arc<PageFigures>,
        events: Events,
    ) -> Result<Self, StartError> {
        let (plan, recording) = match ahead {
            Ahead::Nothing => (Plan::Demand, None),
            Ahead::Fetch(hot) => {
                let budget = PREFETCH_BUDGET;
                (Plan::Prefetch { hot, budget }, None)
            }
            Ahead::Record(path) => {
                let has_run = false;
                (Plan::Record(RECORDING), Some(Recording { path, has_run }))
            }
        };
        let settings = Settings {
            plan,
            ..Settings::default()
        };
        let told = Arc::clone(&figures);
        let notify = move |notice| {
            events.tell(match notice {
                Notice::Fatal(fatal) => {
                    told.lose(fatal);
                    Event::MemoryLost
                }
                Notice::RecordingClosed(_) => Event::RecordingClosed,
            });
        };
        let server = Arc::new(PageServer::start(mappings, image, settings, notify)?);
        figures.begin(&server);
        Ok(Self {
            server,
            figures,
            recording,
        })
    }

    /// Waits until what the guest needs first is there. While it is recorded, nothing is, and its time has not begun.
    pub(crate) fn make_ready(&self) -> Result<(), Arc<Fatal>> {
        match (&self.recording, self.server.fatal()) {
            (_, Some(fatal)) => Err(fatal),
            (Some(_), None) => Ok(()),
            (None, None) => self.server.before_resume(),
        }
    }

    /// To be called before the guest runs: the time of a recording begins with the first call.
    pub(crate) fn resume(&mut self) -> Result<(), Arc<Fatal>> {
        self.server.before_resume()?;
        if let Some(recording) = &mut self.recording {
            recording.has_run = true;
        }
        Ok(())
    }

    /// Why the guest cannot go on, if a page of it cannot be had.
    pub(crate) fn fatal(&self) -> Option<Arc<Fatal>> {
        self.server.fatal()
    }

    /// Ends the recording, if there is one and the guest has run, and writes its list.
    pub(crate) fn save_recording(&mut self) {
        let Some(Recording { path, .. }) = self.recording.take_if(|recording| recording.has_run) else {
            return;
        };
        let Some(recording) = self.server.take_recording() else {
            return;
        };
        let hot = recording.hot_pages();
        match hot.save(&path) {
            Ok(()) => {
                self.figures.recorded(hot.pages());
                tracing::info!(path = %path.display(), pages = hot.pages(), closed = ?recording.closed, "hot pages recorded");
            }
            Err(error) => tracing::error!("hot pages are not recorded: {}", error_chain(&error)),
        }
    }
}

impl Drop for PageService {
    fn drop(&mut self) {
        // With this, `server` is the last that holds it, and stops it where it is dropped.
        self.figures.end();
    }
}
