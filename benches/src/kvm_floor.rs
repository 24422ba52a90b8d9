//! What the kernel alone takes for a fork: a VM made from a mapped memory file and a saved vCPU, until its guest has
//! executed. No process is started, no file is read, nobody is asked: below this no fork by this way can be.
//!
//! The guest is one instruction in a page of the memory file, and its exit is the end of the measurement: the page has
//! been faulted in and the guest has run. Taking the VM apart takes longer than making it, and is not counted; it
//! happens when the [`Run`] is dropped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_config, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error as KvmError, Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Memory goes around the hole below 4 GiB, as in the microVM.
const HOLE: std::ops::Range<u64> = 0xC000_0000..0x1_0000_0000;
/// As in the microVM: unused pages in the hole (KVM_SET_TSS_ADDR).
const TSS_ADDRESS: usize = 0xfffb_d000;
/// Where the guest begins, in real mode with segments at 0.
const ENTRY: u64 = 0x1000;
/// `out 0x80, al`.
const PROGRAM: [u8; 2] = [0xe6, 0x80];
/// The port that it writes to.
const PORT: u16 = 0x80;

/// KVM cannot do what a fork needs.
#[derive(Debug, thiserror::Error)]
pub enum FloorError {
    /// `/dev/kvm` is missing or closed to this user.
    #[error("/dev/kvm cannot be opened; the user needs read and write access to it")]
    Open(#[source] KvmError),
    /// A call of KVM's failed.
    #[error("{0} failed")]
    Ioctl(&'static str, #[source] KvmError),
    /// The memory file could not be made.
    #[error("a memory file of {bytes} bytes cannot be made")]
    File {
        /// Its size.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The memory file could not be mapped.
    #[error("{bytes} bytes of guest memory cannot be mapped")]
    Map {
        /// The size of the mapping.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// KVM lists more than it takes.
    #[error("KVM has more MSRs than it takes in one call")]
    TooManyMsrs,
    /// The guest ended in another way than by its one instruction.
    #[error("the guest did not write to port {PORT:#x}; it left by {0}")]
    Exit(String),
}

fn ioctl(name: &'static str) -> impl FnOnce(KvmError) -> FloorError {
    move |error| FloorError::Ioctl(name, error)
}

/// The parts of a run, in their order.
pub const PHASES: [&str; 7] = [
    "create VM",
    "map memory",
    "memory slots",
    "interrupt controllers, PIT",
    "create vCPU",
    "vCPU state",
    "run to the first exit",
];

/// What every run begins with: a memory file and the state of a vCPU.
#[derive(Debug)]
pub struct Floor {
    memory: File,
    bytes: u64,
    state: VcpuState,
}

/// The state of a vCPU, in the order in which it is set.
struct VcpuState {
    cpuid: CpuId,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: kvm_xsave,
    regs: kvm_regs,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    mp_state: kvm_mp_state,
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuState").finish_non_exhaustive()
    }
}

/// A VM whose guest has executed. Fields are dropped from the top: KVM lets go of the memory before it is unmapped.
#[derive(Debug)]
pub struct Run {
    /// From the opening of `/dev/kvm` until the guest's first exit.
    pub total: Duration,
    /// The same in parts: see [`PHASES`].
    pub phases: [Duration; PHASES.len()],
    _vm: Vm,
    _memory: Vec<Mapped>,
}

/// What KVM knows of a VM. The vCPU goes first.
#[derive(Debug)]
struct Vm {
    vcpu: VcpuFd,
    _vm: VmFd,
    _kvm: Kvm,
}

impl Floor {
    /// Makes a sparse memory file of `bytes` in the directory for temporary files, and a vCPU's state to begin with.
    ///
    /// # Errors
    /// [`FloorError`]; with [`FloorError::Open`], no VM can be made here at all.
    pub fn new(bytes: u64) -> Result<Self, FloorError> {
        let file = || {
            let file = tempfile::tempfile()?;
            file.set_len(bytes)?;
            file.write_all_at(&PROGRAM, ENTRY)?;
            Ok(file)
        };
        let memory = file().map_err(|source| FloorError::File { bytes, source })?;
        let state = VcpuState::of_a_new_vcpu()?;
        Ok(Self { memory, bytes, state })
    }

    /// Makes a VM of it, and runs its guest until it has executed.
    ///
    /// # Errors
    /// [`FloorError`].
    pub fn run(&self) -> Result<Run, FloorError> {
        let mut stopwatch = Stopwatch::start();
        let kvm = Kvm::new().map_err(FloorError::Open)?;
        let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        stopwatch.lap();
        let memory = self.map()?;
        stopwatch.lap();
        // Before the interrupt controllers, as the microVM does it: later, each waits for the kernel's grace period.
        for (slot, mapped) in (0..).zip(&memory) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: mapped.gpa,
                memory_size: mapped.bytes as u64,
                userspace_addr: mapped.start.addr() as u64,
            };
            // SAFETY: the mapping is kept beside the VM, and is unmapped after it.
            unsafe { vm.set_user_memory_region(region) }.map_err(ioctl("KVM_SET_USER_MEMORY_REGION"))?;
        }
        stopwatch.lap();
        make_devices(&vm)?;
        stopwatch.lap();
        let vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
        stopwatch.lap();
        self.state.restore(&vcpu)?;
        stopwatch.lap();
        let mut vm = Vm {
            vcpu,
            _vm: vm,
            _kvm: kvm,
        };
        match vm.vcpu.run().map_err(ioctl("KVM_RUN"))? {
            VcpuExit::IoOut(PORT, _) => {}
            other => return Err(FloorError::Exit(format!("{other:?}"))),
        }
        let (total, phases) = stopwatch.end();
        Ok(Run {
            total,
            phases,
            _vm: vm,
            _memory: memory,
        })
    }

    /// Maps the file as a fork does, privately, in ranges around the hole.
    fn map(&self) -> Result<Vec<Mapped>, FloorError> {
        let low = self.bytes.min(HOLE.start);
        let mut ranges = vec![(0, low)];
        if self.bytes > low {
            ranges.push((HOLE.end, self.bytes - low));
        }
        let mut offset = 0;
        let mut mapped = Vec::with_capacity(ranges.len());
        for (gpa, bytes) in ranges {
            mapped.push(Mapped::of(&self.memory, offset, gpa, bytes)?);
            offset += bytes;
        }
        Ok(mapped)
    }
}

/// As the microVM has them.
fn make_devices(vm: &VmFd) -> Result<(), FloorError> {
    vm.set_tss_address(TSS_ADDRESS)
        .map_err(ioctl("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
    let pit = kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    };
    vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))
}

impl VcpuState {
    /// That of a vCPU which has done nothing, set to begin with the program.
    fn of_a_new_vcpu() -> Result<Self, FloorError> {
        let kvm = Kvm::new().map_err(FloorError::Open)?;
        let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        make_devices(&vm)?;
        let vcpu = vm.create_vcpu(0).map_err(ioctl("KVM_CREATE_VCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        let regs = kvm_regs {
            rip: ENTRY,
            rflags: 2,
            ..Default::default()
        };
        Ok(Self {
            msrs: settable_msrs(&kvm, &vcpu)?,
            cpuid,
            sregs,
            xcrs: vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?,
            xsave: vcpu.get_xsave().map_err(ioctl("KVM_GET_XSAVE"))?,
            regs,
            lapic: vcpu.get_lapic().map_err(ioctl("KVM_GET_LAPIC"))?,
            mp_state: vcpu.get_mp_state().map_err(ioctl("KVM_GET_MP_STATE"))?,
        })
    }

    fn restore(&self, vcpu: &VcpuFd) -> Result<(), FloorError> {
        vcpu.set_cpuid2(&self.cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        vcpu.set_sregs(&self.sregs).map_err(ioctl("KVM_SET_SREGS"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(ioctl("KVM_SET_XCRS"))?;
        // SAFETY: KVM reads the 4096 bytes of the structure, as no feature with a larger state is enabled: that takes
        // a permission by arch_prctl, which this process never asks for.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(ioctl("KVM_SET_XSAVE"))?;
        vcpu.set_regs(&self.regs).map_err(ioctl("KVM_SET_REGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(ioctl("KVM_SET_LAPIC"))?;
        vcpu.set_msrs(&self.msrs).map_err(ioctl("KVM_SET_MSRS"))?;
        vcpu.set_mp_state(self.mp_state)
            .map_err(ioctl("KVM_SET_MP_STATE"))
    }
}

/// Those that can be read and set, with their values; KVM lists more.
fn settable_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Msrs, FloorError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
    let mut settable = Vec::new();
    for &index in list.as_slice() {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut one = Msrs::from_entries(&[entry]).map_err(|_| FloorError::TooManyMsrs)?;
        if vcpu.get_msrs(&mut one).is_ok_and(|read| read == 1)
            && vcpu.set_msrs(&one).is_ok_and(|set| set == 1)
        {
            settable.extend_from_slice(one.as_slice());
        }
    }
    Msrs::from_entries(&settable).map_err(|_| FloorError::TooManyMsrs)
}

/// A range of guest memory in this process.
#[derive(Debug)]
struct Mapped {
    gpa: u64,
    start: *mut std::ffi::c_void,
    bytes: usize,
}

impl Mapped {
    fn of(file: &File, offset: u64, gpa: u64, bytes: u64) -> Result<Self, FloorError> {
        let failed = |source| FloorError::Map { bytes, source };
        let length = usize::try_from(bytes).map_err(|error| failed(io::Error::other(error)))?;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
                file,
                offset,
            )
        };
        let start = start.map_err(|errno| failed(errno.into()))?;
        Ok(Self {
            gpa,
            start,
            bytes: length,
        })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: this mapping; the VM that was given it is gone, and nobody else refers to it. That it cannot be
        // unmapped would only cost address space.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// Takes the time of each phase.
struct Stopwatch {
    began: Instant,
    laps: Vec<Instant>,
}

impl Stopwatch {
    fn start() -> Self {
        let laps = Vec::with_capacity(PHASES.len());
        Self {
            began: Instant::now(),
            laps,
        }
    }

    fn lap(&mut self) {
        self.laps.push(Instant::now());
    }

    fn end(mut self) -> (Duration, [Duration; PHASES.len()]) {
        self.lap();
        let mut phases = [Duration::ZERO; PHASES.len()];
        let mut last = self.began;
        for (phase, lap) in phases.iter_mut().zip(&self.laps) {
            (*phase, last) = (*lap - last, *lap);
        }
        (last - self.began, phases)
    }
}
