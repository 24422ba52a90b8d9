//! What `vm.info` and `vm.counters` answer: published by the control thread at each change of state, so that they
//! answer at once whatever that thread is doing.

use std::sync::{Arc, Mutex};

use stencil_vmm_api::{VmCounters, VmInfo};

use crate::counters::Counters;
use crate::locked::locked;

#[derive(Default)]
pub(crate) struct Status(Mutex<Option<Published>>);

struct Published {
    info: VmInfo,
    counters: Arc<Counters>,
}

impl Status {
    /// `None`: there is no VM.
    pub(crate) fn info(&self) -> Option<VmInfo> {
        locked(&self.0).as_ref().map(|published| published.info.clone())
    }

    /// `None`: there is no VM.
    pub(crate) fn counters(&self) -> Option<VmCounters> {
        locked(&self.0)
            .as_ref()
            .map(|published| published.counters.read())
    }

    pub(crate) fn publish(&self, info: VmInfo, counters: Arc<Counters>) {
        *locked(&self.0) = Some(Published { info, counters });
    }

    pub(crate) fn clear(&self) {
        *locked(&self.0) = None;
    }
}
