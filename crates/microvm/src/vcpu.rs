//! vCPUs: at rest, and running, each in a thread of its own.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use kvm_bindings::CpuId;
use kvm_ioctls::{VcpuExit, VcpuFd};
use stencil_vmm_api::{VmEnd, VmEndKind};

use crate::counters::Counters;
use crate::events::{Event, Events};
use crate::kick::{KickTarget, kick};
use crate::memory::{MemoryRange, PAGE};
use crate::ports::Ports;
use crate::registers::Dump;

/// A vCPU that does not run.
pub(crate) struct Vcpu {
    pub(crate) index: u8,
    pub(crate) fd: VcpuFd,
    /// What was set, to be saved.
    pub(crate) cpuid: CpuId,
}

/// One stretch of running, from a resume to the next pause or the end; shared by the threads of all vCPUs.
pub(crate) struct Run {
    stop: AtomicBool,
    ended: AtomicBool,
    ports: Arc<Ports>,
    counters: Arc<Counters>,
    memory: Vec<MemoryRange>,
    events: Events,
}

impl Run {
    /// Of a VM with so much `memory`.
    pub(crate) fn new(
        ports: Arc<Ports>,
        counters: Arc<Counters>,
        memory: Vec<MemoryRange>,
        events: Events,
    ) -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            ports,
            counters,
            memory,
            events,
        })
    }

    /// Whether a vCPU has ended its VM.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Tells the threads to stop, once they are kicked.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    fn should_stop(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.events.tell(Event::VcpuEnded);
    }

    fn is_memory(&self, gpa: u64) -> bool {
        self.memory
            .iter()
            .any(|range| (range.gpa..range.gpa + range.length).contains(&gpa))
    }
}

/// A vCPU's thread; it gives the vCPU back that it was given, and says why the guest ended if this vCPU saw it end.
pub(crate) type VcpuThread = JoinHandle<Option<(Vcpu, Option<VmEnd>)>>;

/// A thread that waits for its vCPU: to wake one takes less time than to start one. Dropped, it ends.
pub(crate) struct WaitingThread {
    vcpu: Sender<(Vcpu, Arc<Run>)>,
    thread: VcpuThread,
}

impl WaitingThread {
    /// For the vCPU with this index.
    pub(crate) fn start(index: usize) -> io::Result<Self> {
        let (vcpu, given) = channel::<(Vcpu, Arc<Run>)>();
        let thread = thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || {
                let (mut vcpu, run) = given.recv().ok()?;
                let end = vcpu.run(&run);
                if end.is_some() {
                    run.end();
                }
                Some((vcpu, end))
            })?;
        Ok(Self { vcpu, thread })
    }

    /// Runs it.
    pub(crate) fn run(self, vcpu: Vcpu, run: Arc<Run>) -> VcpuThread {
        // The thread waits for it, and a thread that panics ends the process.
        let _ = self.vcpu.send((vcpu, run));
        self.thread
    }
}

impl Vcpu {
    fn run(&mut self, run: &Run) -> Option<VmEnd> {
        let exits = &run.counters.exits[usize::from(self.index)];
        let target = KickTarget::new(&mut self.fd);
        if run.should_stop() {
            return None;
        }
        run.counters.run.resumed();
        loop {
            let step = enter(target.0, run);
            exits.fetch_add(1, Ordering::Relaxed);
            match step {
                Step::GoOn => {}
                Step::Interrupted => {
                    // An exit to a device is completed by the next KVM_RUN. Only one that was interrupted has left
                    // nothing to complete, so only here the vCPU may stop. Cleared before the question: a kick that
                    // comes after the question sets it again.
                    target.0.set_kvm_immediate_exit(0);
                    if run.should_stop() {
                        return None;
                    }
                }
                Step::End(kind, what) => return Some(self::end(self.index, target.0, kind, &what)),
            }
        }
    }
}

/// What one `KVM_RUN` led to.
enum Step {
    GoOn,
    Interrupted,
    End(VmEndKind, String),
}

fn enter(vcpu: &mut VcpuFd, run: &Run) -> Step {
    let exit = match vcpu.run() {
        Ok(exit) => {
            // Neither of the two proves that the guest has executed anything.
            if !matches!(exit, VcpuExit::Intr | VcpuExit::FailEntry(..)) {
                run.counters.run.exited();
            }
            exit
        }
        Err(error) => match error.errno() {
            libc::EINTR => return Step::Interrupted,
            // A vCPU that waited for INIT or SIPI was woken.
            libc::EAGAIN => return Step::GoOn,
            libc::EFAULT => {
                let what = "a page of guest memory cannot be had (KVM_RUN: EFAULT)".to_owned();
                return Step::End(VmEndKind::MemoryLost, what);
            }
            _ => return Step::End(VmEndKind::VcpuFailed, format!("KVM_RUN failed: {error}")),
        },
    };
    match exit {
        VcpuExit::IoIn(port, data) => run.ports.read(port, data),
        VcpuExit::IoOut(port, data) => {
            if let Some(kind) = run.ports.write(port, data) {
                return Step::End(kind, format!("{:#x} was written to port {port:#x}", data[0]));
            }
        }
        // Where KVM emulates an instruction and memory cannot be had, it takes the address for a device's.
        VcpuExit::MmioRead(gpa, _) | VcpuExit::MmioWrite(gpa, _) if run.is_memory(gpa) => {
            let what = format!(
                "the page of guest memory at gpa {:#x} cannot be had",
                gpa / PAGE * PAGE
            );
            return Step::End(VmEndKind::MemoryLost, what);
        }
        VcpuExit::MmioRead(_, data) => data.fill(0xff),
        VcpuExit::MmioWrite(..) => {}
        VcpuExit::Intr => return Step::Interrupted,
        VcpuExit::Shutdown => return Step::End(VmEndKind::TripleFault, "triple fault".to_owned()),
        VcpuExit::InternalError => {
            // SAFETY: the exit reason says that this is the field of the union that KVM filled.
            let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
            let count = usize::try_from(internal.ndata)
                .unwrap_or(0)
                .min(internal.data.len());
            let what = format!(
                "KVM internal error {}, data {:x?}",
                internal.suberror,
                &internal.data[..count]
            );
            return Step::End(VmEndKind::InternalError, what);
        }
        VcpuExit::FailEntry(reason, cpu) => {
            let what =
                format!("KVM could not enter the guest: hardware reason {reason:#x} on host CPU {cpu}");
            return Step::End(VmEndKind::VcpuFailed, what);
        }
        other => {
            return Step::End(
                VmEndKind::VcpuFailed,
                format!("KVM exit {other:?} is not known here"),
            );
        }
    }
    Step::GoOn
}

fn end(index: u8, vcpu: &VcpuFd, kind: VmEndKind, what: &str) -> VmEnd {
    let reason = match kind {
        VmEndKind::PowerOff => format!("the guest powered off: {what}"),
        VmEndKind::Reset => format!("the guest asked for a reset: {what}"),
        VmEndKind::TripleFault | VmEndKind::InternalError | VmEndKind::VcpuFailed | VmEndKind::MemoryLost => {
            format!("{what} on vCPU {index}: {}", Dump(vcpu))
        }
    };
    VmEnd { kind, reason }
}

/// Stops the threads of a run and takes the vCPUs back, by rising index, with the reasons of those that ended the
/// guest.
pub(crate) fn stop_all(run: &Run, threads: Vec<VcpuThread>) -> (Vec<Vcpu>, Option<VmEnd>) {
    run.stop();
    threads.iter().for_each(kick);
    let mut vcpus = Vec::with_capacity(threads.len());
    let mut end = None;
    for thread in threads {
        match thread.join() {
            Ok(Some((vcpu, ended))) => {
                vcpus.push(vcpu);
                end = end.or(ended);
            }
            Ok(None) | Err(_) => {
                let reason = "a vCPU thread of the VMM panicked".to_owned();
                end = end.or(Some(VmEnd {
                    kind: VmEndKind::VcpuFailed,
                    reason,
                }));
            }
        }
    }
    (vcpus, end)
}
