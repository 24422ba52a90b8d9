//! What a VM says on its own, from its own threads.

use std::sync::Arc;

/// Something that the owner of the VM must look into.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Event {
    /// A vCPU has seen the guest end.
    VcpuEnded,
    /// A page of the guest's memory cannot be had.
    MemoryLost,
    /// The recording of hot pages is complete.
    RecordingClosed,
}

/// Where a VM says it. What is said waits until the owner comes to it.
#[derive(Clone)]
pub(crate) struct Events(Arc<dyn Fn(Event) + Send + Sync>);

impl Events {
    /// Calls `tell` on any thread; it must not block.
    pub(crate) fn new(tell: impl Fn(Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    pub(crate) fn tell(&self, event: Event) {
        (self.0)(event);
    }
}
