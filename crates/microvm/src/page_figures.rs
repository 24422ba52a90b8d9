//! What `vm.counters` says of the pages of a restored VM. It answers while they are served, and after they were.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use stencil_uffd::{Counters, Fatal, PageServer, Populated};

use crate::locked::locked;

/// The figures of one VM. They may be read on any thread; all else is for the thread that owns the VM.
#[derive(Default)]
pub(crate) struct PageFigures {
    state: Mutex<State>,
    lost: OnceLock<Arc<Fatal>>,
}

#[derive(Default)]
struct State {
    came: Came,
    prefetch_ignored: bool,
    recording: bool,
    recorded: u64,
}

/// How pages come to the guest.
#[derive(Default)]
enum Came {
    /// As the kernel maps them.
    #[default]
    Mapped,
    /// The same, and the hot ones ahead.
    Populated(Populated),
    /// From this server. It is only used under the lock: when it is let go of here, nobody but the VM has it.
    Served(Arc<PageServer>),
    /// From a server that is gone.
    WereServed(Box<Counters>),
}

impl PageFigures {
    pub(crate) fn ignore_prefetch(&self) {
        locked(&self.state).prefetch_ignored = true;
    }

    pub(crate) fn populated(&self, pages: Populated) {
        locked(&self.state).came = Came::Populated(pages);
    }

    pub(crate) fn recording(&self) {
        locked(&self.state).recording = true;
    }

    /// The recording is over: so many pages are in the list, or there is none.
    pub(crate) fn recorded(&self, pages: Option<u64>) {
        let mut state = locked(&self.state);
        state.recording = false;
        state.recorded = pages.unwrap_or(0);
    }

    /// Notes that a page cannot be had; the first is the reason for all else.
    pub(crate) fn lose(&self, fatal: Arc<Fatal>) {
        let _ = self.lost.set(fatal);
    }

    pub(crate) fn lost(&self) -> Option<Arc<Fatal>> {
        self.lost.get().cloned()
    }

    pub(crate) fn begin(&self, server: &Arc<PageServer>) {
        locked(&self.state).came = Came::Served(Arc::clone(server));
    }

    /// Keeps the figures, and lets go of the server.
    pub(crate) fn end(&self) {
        let mut state = locked(&self.state);
        if let Came::Served(server) = &state.came {
            state.came = Came::WereServed(Box::new(server.counters()));
            state.recording = false;
        }
    }

    pub(crate) fn read(&self) -> BTreeMap<String, u64> {
        let state = locked(&self.state);
        let mut all = BTreeMap::new();
        let mut put = |name: &str, value| {
            all.insert(name.to_owned(), value);
        };
        put("prefetch_ignored", u64::from(state.prefetch_ignored));
        let served = match &state.came {
            Came::Mapped => {
                put("prefetched", 0);
                return all;
            }
            Came::Populated(pages) => {
                put("prefetched", pages.read + pages.written);
                put("prefetched_written", pages.written);
                return all;
            }
            Came::Served(server) => &server.counters(),
            Came::WereServed(counters) => counters,
        };
        put("recording", u64::from(state.recording));
        put("recorded", state.recorded);
        put("demand_faults", served.demand_faults);
        put("write_protect_faults", served.write_protect_faults);
        put("demand_pages", served.demand_pages);
        put("zero_pages", served.zero_pages);
        put("bytes_read", served.bytes_read);
        // Whether the guest touches a page that is there, nobody is told: what came ahead in time counts as a hit.
        put("prefetched", served.prefetch_hits);
        put("prefetch_hits", served.prefetch_hits);
        put("prefetch_late", served.prefetch_late);
        put("prefetch_waste", served.prefetch_waste);
        for (name, share) in [("fault_p50_ns", 0.5), ("fault_p99_ns", 0.99)] {
            if let Some(time) = served.latency.quantile(share) {
                put(name, nanoseconds(time));
            }
        }
        all
    }
}

pub(crate) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
