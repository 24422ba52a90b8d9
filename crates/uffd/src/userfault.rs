//! The kernel's interface: opening a userfaultfd, the handshake, and the calls by which pages are filled.
//!
//! The `userfaultfd` crate does the rest. Its `copy` and `zeropage` are not used: they cannot write-protect, and of an
//! interrupted call they do not tell how far it came (`copy` makes of the kernel's -EAGAIN a very large number).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, IntoRawFd as _, OwnedFd};

use rustix::io::Errno;
use userfaultfd::{EventBuffer, IoctlFlags, RegisterMode, Uffd};
use userfaultfd_sys as sys;

use crate::mapping::GuestMapping;

/// `USERFAULTFD_IOC_NEW` of linux/userfaultfd.h: `_IO(0xAA, 0x00)`.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;

/// Memory cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum UserfaultError {
    /// This user may not handle the faults that the kernel itself meets, and KVM's are such faults.
    #[error(
        "userfaultfd is not permitted to this user: give it read and write access to /dev/userfaultfd \
         (`setfacl -m u:USER:rw /dev/userfaultfd`, or a udev rule), or set `sysctl vm.unprivileged_userfaultfd=1`, \
         or run with CAP_SYS_PTRACE"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel has no userfaultfd, or a filter hides it.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD), or a filter of system calls hides it")]
    Missing(#[source] io::Error),
    /// The kernel's userfaultfd is too old.
    #[error(
        "this kernel's userfaultfd does not tell of memory that is discarded or unmapped: Linux 4.14 does"
    )]
    TooOld(#[source] io::Error),
    /// The memory is of a kind that cannot be served.
    #[error("{mapping:?} cannot be served: it must be a private anonymous mapping that nothing else serves")]
    Register {
        /// The memory.
        mapping: GuestMapping,
        /// Why.
        source: userfaultfd::Error,
    },
    /// The memory is of a kind whose pages cannot be filled.
    #[error("{mapping:?} cannot be served: the kernel does not fill pages there")]
    NoFill {
        /// The memory.
        mapping: GuestMapping,
    },
}

/// How far a fill came, in bytes, and what stopped it there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Filled {
    pub(crate) bytes: usize,
    pub(crate) stopped: Option<Errno>,
}

/// An open userfaultfd. When it is closed, all memory that it served is ordinary memory, and reads as zeros where no
/// page was filled: see `Memory::revoke`.
#[derive(Debug)]
pub(crate) struct Userfault {
    uffd: Uffd,
    write_protect: bool,
}

impl Userfault {
    /// Opens one that tells of discarded and unmapped memory, and of writes where they are asked for and the kernel
    /// can.
    pub(crate) fn open(writes: bool) -> Result<Self, UserfaultError> {
        let fd = new_descriptor()?.into_raw_fd();
        // SAFETY: it is a userfaultfd, and nobody else has it.
        let uffd = unsafe { Uffd::from_raw_fd(fd) };
        let base = sys::UFFD_FEATURE_EVENT_REMOVE | sys::UFFD_FEATURE_EVENT_UNMAP;
        // A handshake that asks for too much fails and leaves the descriptor as it was.
        let write_protect = writes && handshake(&uffd, base | sys::UFFD_FEATURE_PAGEFAULT_FLAG_WP).is_ok();
        if !write_protect {
            handshake(&uffd, base).map_err(UserfaultError::TooOld)?;
        }
        Ok(Self { uffd, write_protect })
    }

    /// Whether it tells of writes to pages that were filled protected.
    pub(crate) const fn tells_writes(&self) -> bool {
        self.write_protect
    }

    /// From now on, who touches a page of the mapping that is not there waits until it is filled.
    pub(crate) fn register(&mut self, mapping: &GuestMapping) -> Result<(), UserfaultError> {
        let register = |uffd: &Uffd, mode| uffd.register_with_mode(mapping.host_of(0), mapping.size(), mode);
        let mut granted = Err(userfaultfd::Error::ReadEof);
        if self.write_protect {
            granted = register(&self.uffd, RegisterMode::MISSING | RegisterMode::WRITE_PROTECT);
            self.write_protect = granted.is_ok();
        }
        if granted.is_err() {
            granted = register(&self.uffd, RegisterMode::MISSING);
        }
        let granted = granted.map_err(|source| UserfaultError::Register {
            mapping: *mapping,
            source,
        })?;
        let needed = IoctlFlags::COPY | IoctlFlags::ZEROPAGE | IoctlFlags::WAKE;
        if !granted.contains(needed) {
            return Err(UserfaultError::NoFill { mapping: *mapping });
        }
        Ok(())
    }

    /// Leaves the mapping to the kernel, and wakes all who wait in it.
    pub(crate) fn unregister(&self, start: *mut libc::c_void, size: usize) -> io::Result<()> {
        self.uffd.unregister(start, size).map_err(io::Error::other)
    }

    /// The events that wait, at most as many as the buffer holds.
    pub(crate) fn events<'a>(
        &self,
        buffer: &'a mut EventBuffer,
    ) -> userfaultfd::Result<impl Iterator<Item = userfaultfd::Result<userfaultfd::Event>> + 'a> {
        self.uffd.read_events(buffer)
    }

    /// Fills memory at `to` with a copy of `bytes`, write-protected if asked, and wakes who waits for it.
    ///
    /// # Safety
    ///
    /// `to` and as many bytes on are registered memory.
    pub(crate) unsafe fn copy(&self, to: *mut libc::c_void, bytes: &[u8], protect: bool) -> Filled {
        let mut call = sys::uffdio_copy {
            dst: to.addr() as u64,
            src: bytes.as_ptr().addr() as u64,
            len: bytes.len() as u64,
            mode: if protect { sys::UFFDIO_COPY_MODE_WP } else { 0 },
            copy: 0,
        };
        // SAFETY: the call is well formed; the kernel reads `bytes` and fills pages that were not there.
        let result = unsafe { self.ioctl(sys::UFFDIO_COPY, (&raw mut call).cast()) };
        filled(result, call.copy, bytes.len())
    }

    /// Fills `size` bytes at `start` with zeros, and wakes who waits for them.
    ///
    /// # Safety
    ///
    /// They are registered memory.
    pub(crate) unsafe fn zero(&self, start: *mut libc::c_void, size: usize) -> Filled {
        let range = sys::uffdio_range {
            start: start.addr() as u64,
            len: size as u64,
        };
        let mut call = sys::uffdio_zeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: the call is well formed; the kernel fills pages that were not there.
        let result = unsafe { self.ioctl(sys::UFFDIO_ZEROPAGE, (&raw mut call).cast()) };
        filled(result, call.zeropage, size)
    }

    /// Wakes who waits for the memory.
    pub(crate) fn wake(&self, start: *mut libc::c_void, size: usize) -> io::Result<()> {
        self.uffd.wake(start, size).map_err(io::Error::other)
    }

    /// Lets the memory be written without a fault, and wakes who waits for that.
    pub(crate) fn unprotect(&self, start: *mut libc::c_void, size: usize) -> Result<(), Errno> {
        let range = sys::uffdio_range {
            start: start.addr() as u64,
            len: size as u64,
        };
        let mut call = sys::uffdio_writeprotect { range, mode: 0 };
        // SAFETY: the call is well formed, and changes no contents.
        unsafe { self.ioctl(sys::UFFDIO_WRITEPROTECT, (&raw mut call).cast()) }
    }

    /// # Safety
    ///
    /// `argument` is what the request takes.
    unsafe fn ioctl(&self, request: u32, argument: *mut libc::c_void) -> Result<(), Errno> {
        // SAFETY: the caller promises it.
        let result = unsafe { libc::ioctl(self.uffd.as_raw_fd(), libc::Ioctl::from(request), argument) };
        if result == -1 { Err(last_errno()) } else { Ok(()) }
    }
}

impl std::os::fd::AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.uffd)
    }
}

/// `progress` is written by the kernel: bytes done, or a negative error where none was.
fn filled(result: Result<(), Errno>, progress: i64, asked: usize) -> Filled {
    match result {
        Ok(()) => Filled {
            bytes: asked,
            stopped: None,
        },
        Err(error) => Filled {
            bytes: usize::try_from(progress).unwrap_or(0),
            stopped: Some(error),
        },
    }
}

/// Tells the kernel which events are wanted (UFFDIO_API). It answers EINVAL where it does not know one.
fn handshake(uffd: &Uffd, features: u64) -> io::Result<()> {
    let mut call = sys::uffdio_api {
        api: sys::UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: the call is well formed.
    let result = unsafe {
        libc::ioctl(
            uffd.as_raw_fd(),
            libc::Ioctl::from(sys::UFFDIO_API),
            &raw mut call,
        )
    };
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// That this process may serve memory, without serving any.
///
/// # Errors
/// [`UserfaultError::NotPermitted`], [`UserfaultError::Missing`].
pub fn check_permission() -> Result<(), UserfaultError> {
    new_descriptor().map(drop)
}

/// A descriptor that also handles faults met by the kernel, as KVM's are. The system call gives one to who has
/// CAP_SYS_PTRACE, or to all if vm.unprivileged_userfaultfd is 1; /dev/userfaultfd to all who can open it (Linux 6.1).
fn new_descriptor() -> Result<OwnedFd, UserfaultError> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes flags and makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd != -1 {
        return owned(fd);
    }
    let refused = last_errno();
    let device = match File::options().read(true).write(true).open("/dev/userfaultfd") {
        Ok(device) => device,
        Err(_) if refused == Errno::NOSYS => return Err(UserfaultError::Missing(refused.into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(UserfaultError::NotPermitted(refused.into()));
        }
        Err(error) => return Err(UserfaultError::NotPermitted(error)),
    };
    // SAFETY: the request takes the flags by value and makes a descriptor.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd == -1 {
        return Err(UserfaultError::NotPermitted(last_errno().into()));
    }
    owned(fd.into())
}

fn owned(fd: libc::c_long) -> Result<OwnedFd, UserfaultError> {
    let fd = i32::try_from(fd).map_err(|_| UserfaultError::Missing(Errno::BADF.into()))?;
    // SAFETY: the kernel just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
