//! The memfds of guest memory, one for each region, and where the snapshot has what belongs into them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, ftruncate, memfd_create, seek};
use stencil_uffd::{Gpa, PAGE_SIZE, PageSource};

use crate::cloud_hypervisor::snapshot::Mapping;

/// A page's bytes.
pub(super) const PAGE: usize = 4096;
const _: () = assert!(PAGE as u64 == PAGE_SIZE, "pages are those of the image");

/// There is no memory to give.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The kernel gives no memfd.
    #[error("memory for the guest cannot be had")]
    Memfd(#[source] io::Error),
    /// Pages could appear that nobody filled.
    #[error(
        "this host puts shared memory in huge pages, which cannot be served page by page; \
         set /sys/kernel/mm/transparent_hugepage/shmem_enabled to never or advise"
    )]
    HugePages,
    /// The VM's memory is not in the snapshot.
    #[error("the guest's memory of {size} bytes at {gpa:#x} is not in the snapshot in one piece")]
    NotInImage {
        /// Where it begins in the guest.
        gpa: u64,
        /// Its length in bytes.
        size: u64,
    },
}

/// A region of guest memory.
#[derive(Debug)]
pub(super) struct Region {
    pub(super) slot: u32,
    pub(super) file: File,
    gpa: u64,
    pub(super) pages: usize,
    /// Where it begins in the image, in bytes.
    offset: u64,
}

/// All of them. They are shared with who compares pages.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) regions: Vec<Region>,
    pub(super) source: Arc<dyn PageSource>,
}

impl Files {
    /// Empty ones of these mappings, which `source` has.
    pub(super) fn new(mappings: &[Mapping], source: Arc<dyn PageSource>) -> Result<Self, MemoryError> {
        check_page_size()?;
        let regions = mappings
            .iter()
            .map(|mapping| region(mapping, source.as_ref()))
            .collect::<Result<_, _>>()?;
        Ok(Self { regions, source })
    }

    /// Puts pages in.
    pub(super) fn write(&self, region: usize, page: usize, bytes: &[u8]) -> io::Result<()> {
        let region = &self.regions[region];
        region.file.write_all_at(bytes, region.place(page))
    }

    /// Puts a page of zeros in. Nothing changes if it is there.
    pub(super) fn write_zeros(&self, region: usize, page: usize) -> io::Result<()> {
        let region = &self.regions[region];
        Ok(fallocate(
            &region.file,
            FallocateFlags::empty(),
            region.place(page),
            PAGE_SIZE,
        )?)
    }

    /// Whether a page, which is there, has other bytes than the snapshot.
    pub(super) fn differs(&self, gpa: Gpa) -> io::Result<bool> {
        let (region, page) = self.locate(gpa).ok_or(io::ErrorKind::NotFound)?;
        let (mut now, mut then) = ([0; PAGE], [0; PAGE]);
        let place = &self.regions[region];
        place.file.read_exact_at(&mut now, place.place(page))?;
        self.source.read(self.offset(region, page), &mut then)?;
        Ok(now != then)
    }

    /// Region and page of a gpa, if there is memory.
    pub(super) fn locate(&self, gpa: Gpa) -> Option<(usize, usize)> {
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let page = usize::try_from(gpa.get().checked_sub(region.gpa)? / PAGE_SIZE).ok()?;
            (page < region.pages).then_some((index, page))
        })
    }

    /// Where in the guest a page begins.
    pub(super) fn gpa(&self, region: usize, page: usize) -> Gpa {
        Gpa::new(self.regions[region].gpa + self.regions[region].place(page))
    }

    /// Where in the image a page begins, in bytes.
    pub(super) fn offset(&self, region: usize, page: usize) -> u64 {
        self.regions[region].offset + self.regions[region].place(page)
    }
}

impl Region {
    /// Where in its file a page begins, in bytes.
    const fn place(&self, page: usize) -> u64 {
        page as u64 * PAGE_SIZE
    }
}

fn region(mapping: &Mapping, source: &dyn PageSource) -> Result<Region, MemoryError> {
    let Mapping { gpa, size, slot, .. } = *mapping;
    let not_in_image = MemoryError::NotInImage { gpa, size };
    let last = size.checked_sub(PAGE_SIZE).and_then(|last| gpa.checked_add(last));
    let (Some(last), true) = (
        last,
        gpa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE),
    ) else {
        return Err(not_in_image);
    };
    let table = source.table();
    let offset = table.offset_of(Gpa::new(gpa)).ok_or(not_in_image)?;
    // In one piece: what lies between them lies between them in the image.
    if table.offset_of(Gpa::new(last)) != offset.checked_add(size - PAGE_SIZE) {
        return Err(MemoryError::NotInImage { gpa, size });
    }
    let file = memfd("guest-memory", size).map_err(MemoryError::Memfd)?;
    let pages = pages_of(size);
    Ok(Region {
        slot,
        file,
        gpa,
        pages,
        offset,
    })
}

fn memfd(name: &str, size: u64) -> io::Result<File> {
    let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC)?);
    ftruncate(&file, size)?;
    Ok(file)
}

/// That a page which is written brings no other with it: in a huge page the others would be zeros, there, and never asked for.
fn check_page_size() -> Result<(), MemoryError> {
    let probe = || -> io::Result<bool> {
        let file = memfd("probe", 4 << 20)?;
        file.write_all_at(&[1], 0)?;
        Ok(seek(&file, SeekFrom::Hole(0))? == PAGE_SIZE)
    };
    match probe().map_err(MemoryError::Memfd)? {
        true => Ok(()),
        false => Err(MemoryError::HugePages),
    }
}

/// Whole pages.
pub(super) const fn pages_of(bytes: u64) -> usize {
    (bytes / PAGE_SIZE) as usize
}
