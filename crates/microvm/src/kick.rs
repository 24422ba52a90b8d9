//! Getting a vCPU out of `KVM_RUN`.
//!
//! A signal alone would be lost if it came just before `KVM_RUN`. So its handler sets `immediate_exit` in the vCPU's
//! `kvm_run`, which makes that `KVM_RUN`, or the next, return `EINTR` (Linux, Documentation/virt/kvm/api.rst).

use std::cell::Cell;
use std::io;
use std::os::unix::thread::JoinHandleExt as _;
use std::ptr;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

thread_local! {
    // Constant and without a destructor, so that the handler may use it: access is a plain load.
    static RUNNING: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let run = RUNNING.get();
    if !run.is_null() {
        // SAFETY: a `KickTarget` on this very thread keeps the vCPU, and so the mapping, alive. The write is volatile
        // because the thread that it interrupts may be about to enter the kernel, which reads the field.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler for the process.
pub(crate) fn install_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)
}

/// Makes the vCPU that runs on `thread` return from `KVM_RUN` now or when it next enters.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    // SAFETY: the thread is not joined yet, as its handle is borrowed, so its id is valid even if it has ended.
    let result = unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
    if result != 0 && result != libc::ESRCH {
        tracing::error!(error = %io::Error::from_raw_os_error(result), "cannot signal a vCPU thread");
    }
}

/// While it lives, kicks of the current thread reach this vCPU.
pub(crate) struct KickTarget<'a>(pub(crate) &'a mut VcpuFd);

impl<'a> KickTarget<'a> {
    pub(crate) fn new(vcpu: &'a mut VcpuFd) -> Self {
        RUNNING.set(ptr::from_mut(vcpu.get_kvm_run()));
        Self(vcpu)
    }
}

impl Drop for KickTarget<'_> {
    fn drop(&mut self) {
        RUNNING.set(ptr::null_mut());
        self.0.set_kvm_immediate_exit(0);
    }
}
