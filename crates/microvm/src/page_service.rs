//! Guest memory that comes page by page, as it is touched or just before: the page server of one VM.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stencil_core::error_chain;
use stencil_uffd::{
    Fatal, Gpa, GuestMapping, HotPages, Notice, PREFETCH_BUDGET, PageServer, PageSource, Plan, Settings,
    StartError, Window,
};

use crate::events::{Event, Events};
use crate::memory::PAGE_BYTES;
use crate::page_figures::PageFigures;
use crate::transfer;

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
    source: Arc<dyn PageSource>,
    mappings: Vec<GuestMapping>,
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
        source: Arc<dyn PageSource>,
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
                (Plan::Record(Window::OF_A_FORK), Some(Recording { path, has_run }))
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
        let server = Arc::new(PageServer::start(
            mappings,
            Arc::clone(&source),
            settings,
            notify,
        )?);
        figures.begin(&server);
        if recording.is_some() {
            figures.recording();
        }
        Ok(Self {
            server,
            source,
            mappings: mappings.to_vec(),
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
        let recording = self.server.take_recording();
        let saved = recording.and_then(|recording| self.save(recording, &path));
        self.figures.recorded(saved);
    }

    /// Writes the list; says how many pages are in it.
    fn save(&self, mut recording: stencil_uffd::Recording, path: &Path) -> Option<u64> {
        // A page that cannot be compared counts as it was recorded.
        recording.keep_written(|gpa| self.differs(gpa).unwrap_or(true));
        let hot = recording.hot_pages();
        match hot.save(path) {
            Ok(()) => {
                let (pages, closed) = (hot.pages(), recording.closed);
                tracing::info!(path = %path.display(), pages, ?closed, "hot pages recorded");
                Some(pages)
            }
            Err(error) => {
                tracing::error!("hot pages are not recorded: {}", error_chain(&error));
                None
            }
        }
    }
}

impl PageService {
    /// Whether a page of the guest, which is there, has other bytes than the snapshot.
    fn differs(&self, gpa: Gpa) -> io::Result<bool> {
        let is_in = |mapping: &&GuestMapping| {
            gpa.get()
                .checked_sub(mapping.gpa().get())
                .is_some_and(|place| place < mapping.size() as u64)
        };
        let mapping = self.mappings.iter().find(is_in).ok_or(io::ErrorKind::NotFound)?;
        let offset = self
            .source
            .table()
            .offset_of(gpa)
            .ok_or(io::ErrorKind::NotFound)?;
        let place = usize::try_from(gpa.get() - mapping.gpa().get()).map_err(io::Error::other)?;
        let (mut now, mut then) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        transfer::read(mapping.host().as_ptr().wrapping_add(place), &mut now)?;
        self.source.read(offset, &mut then)?;
        Ok(now != then)
    }
}

impl Drop for PageService {
    fn drop(&mut self) {
        // With this, `server` is the last that holds it, and stops it where it is dropped.
        self.figures.end();
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc::{Receiver, channel};

    use stencil_core::generation::MemoryGeneration;
    use stencil_uffd::{Extent, Gpa, Mark, RangeTable};

    use super::*;
    use crate::memory::{GuestRam, MemoryRange};

    /// Memory whose bytes are all 7, up to a place from which on its disk fails.
    #[derive(Debug)]
    struct Failing {
        table: RangeTable,
        generation: MemoryGeneration,
        from: u64,
    }

    impl PageSource for Failing {
        fn table(&self) -> &RangeTable {
            &self.table
        }

        fn generation(&self) -> MemoryGeneration {
            self.generation
        }

        fn extent(&self, _: u64, limit: u64) -> io::Result<Extent> {
            Ok(Extent::Data(limit))
        }

        fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            if offset + buffer.len() as u64 > self.from {
                return Err(io::Error::other("the disk is broken"));
            }
            buffer.fill(7);
            Ok(())
        }
    }

    /// 128 MiB in two ranges, of which all is hot, and nothing can be read from byte `from` on.
    fn served(from: u64) -> (GuestRam, Receiver<Event>) {
        let half = 64 << 20;
        let ranges = [0, 1 << 32].map(|gpa| MemoryRange { gpa, length: half });
        let generation = MemoryGeneration::random();
        let table = RangeTable::packed(ranges.map(|range| (Gpa::new(range.gpa), range.length))).unwrap();
        let touches = ranges.iter().flat_map(|range| {
            (0..half)
                .step_by(4096)
                .map(|at| (Gpa::new(range.gpa + at), Mark::Read))
        });
        let hot = HotPages::from_touches(generation, touches);
        let source = Failing {
            table,
            generation,
            from,
        };
        let (tell, told) = channel();
        let events = Events::new(move |event| tell.send(event).unwrap());
        let mut ram = GuestRam::anonymous(&ranges).unwrap();
        let mappings = ram.mappings().unwrap();
        let figures = Arc::new(PageFigures::default());
        let pages = PageService::start(&mappings, Arc::new(source), Ahead::Fetch(hot), figures, events);
        ram.pages = Some(pages.unwrap());
        (ram, told)
    }

    /// Whether the VMM can write the memory, or learns that it cannot.
    fn is_writable(ram: &GuestRam, gpa: u64) -> bool {
        match ram.write(gpa, b"new") {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
                false
            }
        }
    }

    #[test]
    fn a_page_that_cannot_be_read_is_told_before_the_guest_runs() {
        let (ram, told) = served(0x9000);
        let why = error_chain(&ram.make_ready().unwrap_err());
        assert_eq!(
            why,
            "the page at gpa 0x9000 cannot be read, at byte 36864 of the image: the disk is broken"
        );
        assert!(matches!(told.recv(), Ok(Event::MemoryLost)));
        // The notice comes first, and then the memory goes.
        while is_writable(&ram, 0x5000) {}
    }

    #[test]
    fn a_page_that_cannot_be_read_behind_the_guest_is_told_though_nobody_touches_it() {
        let (mut ram, told) = served((64 << 20) + 0x3000);
        // What the guest waits for is there; it may run, or the page behind that was quicker.
        let _ = ram.make_ready().and_then(|()| ram.resume());
        assert!(matches!(told.recv(), Ok(Event::MemoryLost)));
        let why = error_chain(&ram.lost().unwrap());
        assert!(
            why.starts_with("the page at gpa 0x100003000 cannot be read, at byte 67121152 of the image"),
            "{why}"
        );
        while is_writable(&ram, 0x1_0000_1000) {}
    }
}
