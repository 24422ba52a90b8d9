//! Hot pages of a file that is mapped privately.

use std::fs::File;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use stencil_uffd::{Gpa, GuestMapping, HotPages, Mark, PopulateError, Populated, populate};

use crate::support::{BASE, Image, PAGE, gpa};

/// A private mapping of the image's file.
struct Cow(NonNull<u8>, usize);

impl Cow {
    fn of(image: &Image) -> Self {
        let (access, size) = (ProtFlags::READ | ProtFlags::WRITE, image.pages * PAGE);
        let file = File::open(&image.path).unwrap();
        // SAFETY: the kernel chooses a free place.
        let start = unsafe { mmap(std::ptr::null_mut(), size, access, MapFlags::PRIVATE, &file, 0) }.unwrap();
        Self(NonNull::new(start.cast()).unwrap(), size)
    }

    fn mapping(&self) -> GuestMapping {
        // SAFETY: the memory is ours, and nobody refers to it.
        unsafe { GuestMapping::new(Gpa::new(BASE), self.0, self.1) }.unwrap()
    }

    /// (present, a private copy) of each page, from /proc/self/pagemap: bits 63 and 61 (Documentation/admin-guide/mm).
    fn pages(&self) -> Vec<(bool, bool)> {
        use std::os::unix::fs::FileExt as _;
        let mut entries = vec![0; self.1 / PAGE * 8];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        pagemap
            .read_exact_at(&mut entries, (self.0.addr().get() / PAGE * 8) as u64)
            .unwrap();
        let entry = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
        let bits = |entry: u64| (entry >> 63 == 1, entry >> 63 == 1 && entry >> 61 & 1 == 0);
        entries.chunks(8).map(|bytes| bits(entry(bytes))).collect()
    }
}

impl Drop for Cow {
    fn drop(&mut self) {
        // SAFETY: nobody touches it any more.
        unsafe { munmap(self.0.as_ptr().cast(), self.1) }.unwrap();
    }
}

#[test]
fn read_pages_stay_shared_and_written_pages_are_copied() {
    let image = Image::new(256);
    let touches = [
        (9, Mark::Written),
        (200, Mark::Read),
        (10, Mark::Written),
        (201, Mark::Read),
        (900, Mark::Read),
    ];
    let hot = HotPages::from_touches(image.generation, touches.map(|(page, mark)| (gpa(page), mark)));
    let cow = Cow::of(&image);
    assert!(cow.pages().iter().all(|page| *page == (false, false)));
    // The page that is not in this mapping is left alone.
    assert_eq!(
        populate(&hot, &cow.mapping()).unwrap(),
        Populated { read: 2, written: 2 }
    );
    let pages = cow.pages();
    assert_eq!(pages[9..11], [(true, true); 2]);
    assert_eq!(pages[200..202], [(true, false); 2]);
    assert_eq!(pages.iter().filter(|(_, copied)| *copied).count(), 2);
}

#[test]
fn a_file_that_was_cut_is_named_instead_of_a_signal() {
    let image = Image::new(64);
    let hot = HotPages::from_touches(image.generation, [(gpa(1), Mark::Read), (gpa(40), Mark::Written)]);
    let cow = Cow::of(&image);
    image.cut(8 * PAGE);
    let refused = populate(&hot, &cow.mapping()).unwrap_err();
    assert!(
        matches!(refused, PopulateError::Unreadable { gpa: at, pages: 1 } if at == gpa(40)),
        "{refused}"
    );
}
