//! Images, memory to serve, and touches.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{
    Extent, Gpa, GuestMapping, MemoryImage, Notice, PAGE_SIZE, PageServer, PageSource, Plan, RangeTable,
    Settings,
};

pub(crate) const PAGE: usize = 4096;
/// Where the memory of these tests begins in its guest.
pub(crate) const BASE: u64 = 0x10_0000;

pub(crate) fn gpa(page: usize) -> Gpa {
    Gpa::new(BASE + page as u64 * PAGE_SIZE)
}

/// The bytes that page `page` has: different in each page, and nowhere zero.
pub(crate) fn contents(page: usize) -> [u8; PAGE] {
    std::array::from_fn(|byte| u8::try_from((page * 31 + byte / 8 * 7) % 251).unwrap() + 1)
}

/// A memory file, gone with its directory at the end.
pub(crate) struct Image {
    _directory: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) pages: usize,
    pub(crate) generation: MemoryGeneration,
}

impl Image {
    /// So many pages of contents.
    pub(crate) fn new(pages: usize) -> Self {
        Self::sparse(pages, |_| false)
    }

    /// The same, with holes.
    pub(crate) fn sparse(pages: usize, is_hole: impl Fn(usize) -> bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory-ranges");
        let file = File::create(&path).unwrap();
        file.set_len((pages * PAGE) as u64).unwrap();
        for page in (0..pages).filter(|page| !is_hole(*page)) {
            file.write_all_at(&contents(page), (page * PAGE) as u64).unwrap();
        }
        Self {
            _directory: directory,
            path,
            pages,
            generation: MemoryGeneration::random(),
        }
    }

    pub(crate) fn table(&self) -> RangeTable {
        RangeTable::packed([(Gpa::new(BASE), (self.pages * PAGE) as u64)]).unwrap()
    }

    pub(crate) fn open(&self) -> MemoryImage {
        MemoryImage::open(&self.path, self.table(), self.generation).unwrap()
    }

    pub(crate) fn cut(&self, bytes: usize) {
        File::options()
            .write(true)
            .open(&self.path)
            .unwrap()
            .set_len(bytes as u64)
            .unwrap();
    }
}

/// Memory of this process that no test holds references into. Unmapped at the end: after its server, if the server is
/// declared after it.
pub(crate) struct Ram {
    start: NonNull<u8>,
    pages: usize,
}

// SAFETY: it is an address; what is there is only touched by volatile accesses and by the kernel.
unsafe impl Sync for Ram {}

impl Ram {
    pub(crate) fn new(pages: usize) -> Self {
        let (access, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        );
        // SAFETY: the kernel chooses a free place.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), pages * PAGE, access, flags) }.unwrap();
        Self {
            start: NonNull::new(start.cast()).unwrap(),
            pages,
        }
    }

    pub(crate) fn mapping(&self) -> GuestMapping {
        // SAFETY: the memory is ours, is touched as promised, and tests drop the server first.
        unsafe { GuestMapping::new(Gpa::new(BASE), self.start, self.pages * PAGE) }.unwrap()
    }

    fn page(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages);
        self.start.as_ptr().wrapping_add(page * PAGE)
    }

    /// Reads one byte of a page.
    pub(crate) fn touch(&self, page: usize) -> u8 {
        // SAFETY: the page is mapped.
        unsafe { self.page(page).read_volatile() }
    }

    /// Writes one byte of a page.
    pub(crate) fn write(&self, page: usize, byte: u8) {
        // SAFETY: the page is mapped.
        unsafe { self.page(page).write_volatile(byte) }
    }

    pub(crate) fn read(&self, page: usize) -> [u8; PAGE] {
        // SAFETY: the page is mapped, and no test writes one while it is read so.
        unsafe { self.page(page).cast::<[u8; PAGE]>().read_volatile() }
    }

    /// Reads a page as the kernel does it for KVM, or for a system call: where that is not possible, it says so, and no
    /// signal comes.
    pub(crate) fn read_by_kernel(&self, page: usize) -> io::Result<Vec<u8>> {
        let (reader, writer) = rustix::pipe::pipe()?;
        // SAFETY: the page is mapped, and the kernel copies from it.
        let written = unsafe {
            libc::write(
                std::os::fd::AsRawFd::as_raw_fd(&writer),
                self.page(page).cast(),
                PAGE,
            )
        };
        if written == -1 {
            return Err(io::Error::last_os_error());
        }
        let mut bytes = vec![0; PAGE];
        let read = rustix::io::read(&reader, &mut bytes)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    pub(crate) fn discard(&self, pages: std::ops::Range<usize>) {
        // SAFETY: the pages are mapped, and nobody counts on their contents.
        unsafe {
            madvise(
                self.page(pages.start).cast(),
                pages.len() * PAGE,
                Advice::LinuxDontNeed,
            )
        }
        .unwrap();
    }

    pub(crate) fn unmap(&self, pages: std::ops::Range<usize>) {
        // SAFETY: the test does not touch them again.
        unsafe { munmap(self.page(pages.start).cast(), pages.len() * PAGE) }.unwrap();
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: nobody touches it any more. Parts of it may be unmapped already.
        unsafe { munmap(self.start.as_ptr().cast(), self.pages * PAGE) }.unwrap();
    }
}

/// A server whose notices can be waited for.
pub(crate) fn serve(
    ram: &Ram,
    source: Arc<dyn PageSource>,
    settings: Settings,
) -> (PageServer, Receiver<Notice>) {
    let (sender, notices) = channel();
    let server = PageServer::start(&[ram.mapping()], source, settings, move |notice| {
        // The test may be over.
        let _ = sender.send(notice);
    });
    (server.unwrap(), notices)
}

pub(crate) fn alone() -> Settings {
    Settings {
        read_around: 1,
        ..Settings::default()
    }
}

pub(crate) fn planned(plan: Plan) -> Settings {
    Settings { plan, ..alone() }
}

/// An image of which one page cannot be read.
#[derive(Debug)]
pub(crate) struct Damaged {
    pub(crate) image: MemoryImage,
    pub(crate) page: usize,
    /// It panics instead.
    pub(crate) panics: bool,
}

impl PageSource for Damaged {
    fn table(&self) -> &RangeTable {
        self.image.table()
    }

    fn generation(&self) -> MemoryGeneration {
        self.image.generation()
    }

    fn extent(&self, offset: u64, limit: u64) -> io::Result<Extent> {
        self.image.extent(offset, limit)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bad = (self.page * PAGE) as u64;
        if (offset..offset + buffer.len() as u64).contains(&bad) {
            assert!(!self.panics, "this source panics");
            return Err(io::Error::other("this page is damaged"));
        }
        self.image.read(offset, buffer)
    }
}

/// Runs one test of this program again, alone, as another process that may die of it.
pub(crate) fn again(test: &str, prepare: impl FnOnce(&mut std::process::Command)) -> std::process::Output {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]);
    prepare(&mut command);
    command.output().unwrap()
}
