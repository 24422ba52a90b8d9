//! Hot pages of memory that is mapped from its file (`cow`): made resident ahead.

use std::io;
use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use crate::address::{Gpa, PAGE};
use crate::hot_pages::{HotPages, Mark, Stretch, by_address};
use crate::mapping::GuestMapping;

/// Pages that are asked of the disk before their turn: it is busy with many reads at once, not with one.
const AHEAD_PAGES: usize = 2048;

/// What was made resident, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Populated {
    /// Pages that are only read: they are shared in the page cache.
    pub read: u64,
    /// Pages that are written: each is a private copy.
    pub written: u64,
}

/// Memory cannot be made resident.
#[derive(Debug, thiserror::Error)]
pub enum PopulateError {
    /// The kernel does not know the call.
    #[error("this kernel cannot populate a mapping (MADV_POPULATE_READ and _WRITE): Linux 5.14 can")]
    Unsupported,
    /// A page cannot be read: the file was cut, or its disk fails. Who touches the page would get SIGBUS.
    #[error(
        "the {pages} pages at gpa {gpa} cannot be made resident: what they are mapped from cannot be read"
    )]
    Unreadable {
        /// Where they begin.
        gpa: Gpa,
        /// How many.
        pages: usize,
    },
    /// The kernel refuses.
    #[error("the {pages} pages at gpa {gpa} cannot be made resident")]
    Refused {
        /// Where they begin.
        gpa: Gpa,
        /// How many.
        pages: usize,
        /// Why.
        source: io::Error,
    },
}

/// Makes the hot pages of a private mapping of their file resident: those that are only read stay shared, those that
/// are written are copied now. Hot pages outside of the mapping are left alone.
///
/// # Errors
///
/// The kernel cannot, or a page cannot be read; pages before it are resident then.
pub fn populate(hot: &HotPages, mapping: &GuestMapping) -> Result<Populated, PopulateError> {
    let mut populated = Populated::default();
    for mark in [Mark::Read, Mark::Written] {
        let (advice, count) = match mark {
            Mark::Read => (Advice::LinuxPopulateRead, &mut populated.read),
            Mark::Written => (Advice::LinuxPopulateWrite, &mut populated.written),
        };
        let stretches = by_address(hot.runs().iter().filter(|run| run.mark == mark));
        let within = |stretch: &Stretch| mapping.clip(stretch.gpa, stretch.pages);
        let stretches: Vec<Range<usize>> = stretches
            .iter()
            .map(within)
            .filter(|pages| !pages.is_empty())
            .collect();
        let (mut told, mut ahead) = (stretches.iter(), 0);
        for pages in &stretches {
            while ahead < AHEAD_PAGES
                && let Some(next) = told.next()
            {
                ahead += next.len();
                // Only advice: without it, the page is read when its turn comes.
                let _ = advise(mapping, next, Advice::WillNeed);
            }
            populate_pages(mapping, pages, advice)?;
            *count += pages.len() as u64;
            ahead -= pages.len();
        }
    }
    Ok(populated)
}

fn populate_pages(mapping: &GuestMapping, range: &Range<usize>, advice: Advice) -> Result<(), PopulateError> {
    let (gpa, pages) = (mapping.gpa_of(range.start), range.len());
    loop {
        match advise(mapping, range, advice) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::INVAL) => return Err(PopulateError::Unsupported),
            Err(Errno::FAULT) => return Err(PopulateError::Unreadable { gpa, pages }),
            Err(error) => {
                return Err(PopulateError::Refused {
                    gpa,
                    pages,
                    source: error.into(),
                });
            }
        }
    }
}

fn advise(mapping: &GuestMapping, pages: &Range<usize>, advice: Advice) -> Result<(), Errno> {
    // SAFETY: the pages are of this mapping, and none of the advices used here changes their contents.
    unsafe { madvise(mapping.host_of(pages.start), pages.len() * PAGE, advice) }
}
