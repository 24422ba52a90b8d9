//! The memory that a server serves: its mappings, where their pages come from, and what became of each page.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use crate::address::{Gpa, PAGE};
use crate::mapping::GuestMapping;
use crate::page_set::PageSet;
use crate::ranges::RangeTable;
use crate::userfault::{Userfault, UserfaultError};

/// A mapping, and its pages.
#[derive(Debug)]
pub(crate) struct Area {
    pub(crate) mapping: GuestMapping,
    /// Where in the source it begins, in bytes.
    source_offset: u64,
    /// Pages that were filled, or were found to be there. A hint: the kernel knows.
    present: PageSet,
    /// Pages that were discarded since: they are zeros, and never again what the source has.
    discarded: PageSet,
    /// Pages that were unmapped since.
    unmapped: PageSet,
}

impl Area {
    /// `None` if the table does not hold all of the mapping in one range, or there is no memory to keep count of it.
    pub(crate) fn new(mapping: GuestMapping, table: &RangeTable) -> Option<Self> {
        let range = table.range_at(mapping.gpa())?;
        let inside = mapping.gpa().get() - range.gpa.get();
        if range.size - inside < mapping.size() as u64 {
            return None;
        }
        let set = || PageSet::empty(mapping.pages());
        Some(Self {
            mapping,
            source_offset: range.file_offset + inside,
            present: set()?,
            discarded: set()?,
            unmapped: set()?,
        })
    }

    /// Where in the source its page `page` lies, in bytes.
    pub(crate) const fn offset_of(&self, page: usize) -> u64 {
        self.source_offset + (page * PAGE) as u64
    }

    pub(crate) const fn gpa_of(&self, page: usize) -> Gpa {
        self.mapping.gpa_of(page)
    }

    pub(crate) fn is_present(&self, page: usize) -> bool {
        self.present.has(page)
    }

    pub(crate) fn is_discarded(&self, page: usize) -> bool {
        self.discarded.has(page)
    }

    pub(crate) fn is_unmapped(&self, page: usize) -> bool {
        self.unmapped.has(page)
    }

    /// Whether the page is what the source has, or would be.
    pub(crate) fn is_of_source(&self, page: usize) -> bool {
        !self.is_discarded(page) && !self.is_unmapped(page)
    }

    /// Whether the page waits to be filled from the source.
    pub(crate) fn is_open(&self, page: usize) -> bool {
        !self.is_present(page) && self.is_of_source(page)
    }

    /// Whether no page waits to be filled from the source: what is not there is zeros by right.
    pub(crate) fn is_complete(&self) -> bool {
        !(0..self.mapping.pages()).any(|page| self.is_open(page))
    }

    pub(crate) fn filled(&self, pages: Range<usize>) {
        self.present.add(pages);
    }

    /// The pages around `page`, within `window`, that wait to be filled; `page` itself whatever is thought of it.
    pub(crate) fn open_around(&self, page: usize, window: Range<usize>) -> Range<usize> {
        let open = |page: &usize| self.is_open(*page);
        let before = (window.start..page).rev().take_while(open).count();
        let after = (page + 1..window.end).take_while(open).count();
        page - before..page + 1 + after
    }
}

/// All of it, and the userfaultfd that serves it.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) userfault: Userfault,
    pub(crate) areas: Vec<Area>,
    /// Whether it worked, once it was done.
    revoked: OnceLock<bool>,
}

impl Memory {
    pub(crate) fn new(mut userfault: Userfault, areas: Vec<Area>) -> Result<Self, UserfaultError> {
        for area in &areas {
            userfault.register(&area.mapping)?;
        }
        Ok(Self {
            userfault,
            areas,
            revoked: OnceLock::new(),
        })
    }

    /// The page at an address of this process.
    pub(crate) fn locate(&self, address: usize) -> Option<(&Area, usize)> {
        self.areas.iter().find_map(|area| {
            let page = area.mapping.clip_host(address, address + 1).next()?;
            Some((area, page))
        })
    }

    /// Memory was discarded: from now on it is zeros.
    pub(crate) fn discard(&self, start: usize, end: usize) -> u64 {
        let mut pages = 0;
        for area in &self.areas {
            let discarded = area.mapping.clip_host(start, end);
            pages += discarded.len() as u64;
            area.discarded.add(discarded.clone());
            area.present.remove(discarded);
        }
        pages
    }

    /// Memory was unmapped: nobody can wait for it any more.
    pub(crate) fn unmap(&self, start: usize, end: usize) {
        for area in &self.areas {
            area.unmapped.add(area.mapping.clip_host(start, end));
        }
    }

    /// The service ends. Closing the userfaultfd would make every page that was not filled read as zeros; so memory
    /// that is not complete is made inaccessible first: who waits for a page of it, or touches it later, gets SIGSEGV
    /// (a vCPU: EFAULT from KVM_RUN), and never a zero. False: that failed, and the userfaultfd must stay open.
    pub(crate) fn revoke(&self) -> bool {
        *self.revoked.get_or_init(|| self.revoke_incomplete())
    }

    fn revoke_incomplete(&self) -> bool {
        let mut safe = true;
        for area in self.areas.iter().filter(|area| !area.is_complete()) {
            let mut page = 0;
            while page < area.mapping.pages() {
                let end = (page..area.mapping.pages()).find(|page| area.is_unmapped(*page));
                let mapped = page..end.unwrap_or(area.mapping.pages());
                if !mapped.is_empty() {
                    safe &= self.revoke_pages(area, &mapped).is_ok();
                }
                page = mapped.end + 1;
            }
        }
        safe
    }

    fn revoke_pages(&self, area: &Area, pages: &Range<usize>) -> io::Result<()> {
        area.mapping.revoke(pages.clone())?;
        self.userfault
            .unregister(area.mapping.host_of(pages.start), pages.len() * PAGE)
    }
}
