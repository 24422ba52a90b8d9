//! A snapshot's memory as something that is served page by page.
//!
//! ```text
//!      memory file                     the guest's memory: private, anonymous, empty
//!   +---------------+                 +----------------------------------------------+
//!   | MemoryImage   |                 | GuestMapping   GuestMapping                  |
//!   | (PageSource)  |                 +----------------------------------------------+
//!   +---------------+                    |  touched: by a vCPU,       ^  filled:
//!        | read        hot pages         v  by KVM, by the VMM        |  copied, or zeros
//!        v          (Prefetcher)      userfaultfd ------------> PageServer ----> Counters
//!        +-------------->-------------------------------------------> |
//!                                                                     +--> Recorder -> HotPages -> file
//! ```
//!
//! - [`MemoryImage`] is a memory file with its [`RangeTable`] and generation. Its holes are zeros, and are never read,
//!   stored or fetched. Other places for memory are other [`PageSource`]s.
//! - [`HotPages`] is the list of the pages that a guest touches first, in order, as it was recorded once. It has a file
//!   format of its own, and belongs to one generation of memory.
//! - [`PageServer`] fills the pages of a guest as they are touched; it fetches hot pages ahead, or records a new list.
//! - [`populate()`] uses the same list where memory is mapped from its file instead.
//!
//! # Promises
//!
//! - A page has the contents of the image, or zeros where the image has a hole or the memory was discarded since
//!   (`MADV_DONTNEED`: a balloon). Never zeros for another reason.
//! - If a page cannot be read, the guest is over: [`Notice::Fatal`] names the page, its place in the image and the
//!   cause; then all access to the memory is taken away. Who waits for a page gets SIGSEGV, a vCPU EFAULT from
//!   KVM_RUN, a system call EFAULT. Nobody waits for ever.
//! - The same when the server stops before all pages are there. The VM ends first, then its server is dropped, then its
//!   memory is unmapped.
//! - Faults go before prefetch: a fault waits for at most 2 MiB of it before the guest resumes, and 256 KiB afterwards.
//!
//! # Who may
//!
//! KVM touches memory in the kernel's name, and so do system calls. To handle such faults, a process needs one of
//!
//! - read and write access to `/dev/userfaultfd` (Linux 6.1; by default it is root's), by
//!   `setfacl -m u:USER:rw /dev/userfaultfd` or by a udev rule: `KERNEL=="userfaultfd", GROUP="kvm", MODE="0660"`;
//! - `sysctl vm.unprivileged_userfaultfd=1`, for everybody on the host;
//! - the capability `CAP_SYS_PTRACE`.
//!
//! What is allowed to all (`UFFD_USER_MODE_ONLY`) serves no vCPU, and is not used. Linux 4.14 is enough; from 5.7 on a
//! recording also knows which pages are read first and written later.
//!
//! # Example
//!
//! ```
//! # use std::{ptr::NonNull, sync::Arc, time::Duration};
//! # use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
//! # use stencil_core::generation::MemoryGeneration;
//! use stencil_uffd::{Gpa, GuestMapping, HotPages, MemoryImage, Notice, RangeTable};
//! use stencil_uffd::{PageServer, Plan, Settings, Window};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let (path, list) = (directory.path().join("memory-ranges"), directory.path().join("hot-pages"));
//! # std::fs::write(&path, vec![7; 1 << 20])?;
//! # let generation = MemoryGeneration::random();
//! # let size = 1 << 20;
//! # let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
//! # let memory = || {
//! #     // SAFETY: the kernel chooses a free place.
//! #     let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, access, flags) };
//! #     start.map(|start| NonNull::new(start.cast::<u8>()).expect("not mapped at zero"))
//! # };
//! let end_the_vm = |notice| {
//!     if let Notice::Fatal(fatal) = notice {
//!         eprintln!("{fatal}");
//!         std::process::abort();
//!     }
//! };
//! let table = RangeTable::packed([(Gpa::new(0), 1 << 20)])?;
//! let image = Arc::new(MemoryImage::open(&path, table, generation)?);
//!
//! // The first guest: its touches are recorded.
//! let start = memory()?;
//! // SAFETY: the mapping is the guest's alone, and outlives the server.
//! let mapping = unsafe { GuestMapping::new(Gpa::new(0), start, size) }?;
//! let window = Window { duration: Duration::from_secs(10), pages: 65536 };
//! let settings = Settings { plan: Plan::Record(window), ..Settings::default() };
//! let server = PageServer::start(&[mapping], image.clone(), settings, end_the_vm)?;
//! server.before_resume().map_err(|fatal| fatal.to_string())?;
//! // SAFETY: the address is mapped.
//! assert_eq!(unsafe { start.as_ptr().add(0x5000).read_volatile() }, 7);
//! let recording = server.take_recording().ok_or("not recorded")?;
//! recording.hot_pages().save(&list)?;
//! server.stop();
//! # // SAFETY: nobody uses it any more.
//! # unsafe { munmap(start.as_ptr().cast(), size) }?;
//!
//! // Each later one: what was recorded is there before it resumes.
//! let hot = HotPages::load(&list, generation)?;
//! let start = memory()?;
//! // SAFETY: as above.
//! let mapping = unsafe { GuestMapping::new(Gpa::new(0), start, size) }?;
//! let settings = Settings { plan: Plan::Prefetch { hot, budget: 64 << 20 }, ..Settings::default() };
//! let server = PageServer::start(&[mapping], image, settings, end_the_vm)?;
//! server.before_resume().map_err(|fatal| fatal.to_string())?;
//! // SAFETY: as above.
//! assert_eq!(unsafe { start.as_ptr().add(0x5000).read_volatile() }, 7);
//! assert_eq!((server.counters().prefetch_hits, server.counters().demand_faults), (1, 0));
//! # server.stop();
//! # // SAFETY: nobody uses it any more.
//! # unsafe { munmap(start.as_ptr().cast(), size) }?;
//! # Ok(())
//! # }
//! ```

mod address;
mod counters;
mod hot_pages;
mod image;
mod mapping;
mod memory;
mod page_set;
mod populate;
mod prefetch;
mod ranges;
mod record;
mod server;
mod source;
mod userfault;

pub use address::{Gpa, PAGE_SIZE};
pub use counters::{Counters, Histogram};
pub use hot_pages::{DifferentMemory, HotPages, HotRun, LoadError, Mark, SaveError};
pub use image::{ImageError, MemoryImage};
pub use mapping::{GuestMapping, MappingError};
pub use populate::{PopulateError, Populated, populate};
pub use prefetch::PREFETCH_BUDGET;
pub use ranges::{MemoryRange, RangeError, RangeTable};
pub use record::{Closed, Recorder, Recording, Touch, Window};
pub use server::{Fatal, Notice, PageServer, Plan, Settings, StartError};
pub use source::{Extent, PageSource};
pub use userfault::{UserfaultError, check_permission};
