//! The hot pages of a template: which pages its guest touches first, in order, and whether it writes them.

mod file;
mod runs;

use stencil_core::generation::MemoryGeneration;

use crate::address::{Gpa, PAGE_SIZE};
pub use file::{LoadError, SaveError};
use runs::{ByAddress, push};
pub(crate) use runs::{Stretch, by_address};

/// What a guest did to a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mark {
    /// It only read it.
    Read,
    /// It wrote it, or executed an instruction that may write it.
    Written,
}

/// Pages that follow each other in the guest, were touched in that order, and have one mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HotRun {
    /// Where the first page begins.
    pub gpa: Gpa,
    /// How many pages, at least one.
    pub pages: u32,
    /// What was done to each.
    pub mark: Mark,
}

impl HotRun {
    /// Where it ends.
    pub(crate) const fn end(&self) -> Gpa {
        self.gpa.plus_pages(self.pages as u64)
    }

    /// How many of its pages lie before `end`.
    fn pages_to(&self, end: Gpa) -> u32 {
        let pages = end.get().saturating_sub(self.gpa.get()) / PAGE_SIZE;
        u32::try_from(pages).unwrap_or(u32::MAX).min(self.pages)
    }
}

/// Two lists belong to different memories, and say nothing about each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the lists of hot pages are of different memories: {left} and {right}")]
pub struct DifferentMemory {
    /// The generation of the one.
    pub left: MemoryGeneration,
    /// The generation of the other.
    pub right: MemoryGeneration,
}

/// Pages of one memory in the order of their first touch, each at most once. Pages of zeros are not in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HotPages {
    generation: MemoryGeneration,
    runs: Vec<HotRun>,
    pages: u64,
}

impl HotPages {
    /// The list of `touches` in their order: the page at each address, and what was done to it. A page that comes again
    /// keeps its place, and is written if it was written once.
    pub fn from_touches(
        generation: MemoryGeneration,
        touches: impl IntoIterator<Item = (Gpa, Mark)>,
    ) -> Self {
        let mut order: Vec<(u64, Mark)> = Vec::new();
        let mut places = std::collections::HashMap::new();
        for (gpa, mark) in touches {
            let page = gpa.get() / PAGE_SIZE;
            let place = *places.entry(page).or_insert(order.len());
            match order.get_mut(place) {
                Some((_, known)) => *known = mark.max(*known),
                None => order.push((page, mark)),
            }
        }
        let mut list = Self::empty(generation);
        for (page, mark) in order {
            list.push(HotRun {
                gpa: Gpa::new(page * PAGE_SIZE),
                pages: 1,
                mark,
            });
        }
        list
    }

    const fn empty(generation: MemoryGeneration) -> Self {
        Self {
            generation,
            runs: Vec::new(),
            pages: 0,
        }
    }

    /// The caller knows that none of the pages is in the list.
    fn push(&mut self, run: HotRun) {
        self.pages += u64::from(run.pages);
        push(&mut self.runs, run);
    }

    /// Which memory the pages are of.
    #[must_use]
    pub const fn generation(&self) -> MemoryGeneration {
        self.generation
    }

    /// The runs, in the order of first touch.
    #[must_use]
    pub fn runs(&self) -> &[HotRun] {
        &self.runs
    }

    /// How many pages there are.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// All pages of both: those of `self` in their order, then the others in theirs. Written is what is written in
    /// either.
    ///
    /// # Errors
    ///
    /// They are of different memories.
    pub fn union(&self, other: &Self) -> Result<Self, DifferentMemory> {
        self.same_memory(other)?;
        let (ours, theirs) = (ByAddress::new(&self.runs), ByAddress::new(&other.runs));
        let mut union = Self::empty(self.generation);
        for run in &self.runs {
            for (piece, mark) in theirs.split(*run) {
                union.push(HotRun {
                    mark: mark.map_or(piece.mark, |mark| mark.max(piece.mark)),
                    ..piece
                });
            }
        }
        for run in &other.runs {
            for (piece, mark) in ours.split(*run) {
                if mark.is_none() {
                    union.push(piece);
                }
            }
        }
        Ok(union)
    }

    /// The pages that are in both, in the order of `self`. Written is what is written in both.
    ///
    /// # Errors
    ///
    /// They are of different memories.
    pub fn intersection(&self, other: &Self) -> Result<Self, DifferentMemory> {
        self.same_memory(other)?;
        let theirs = ByAddress::new(&other.runs);
        let mut intersection = Self::empty(self.generation);
        for run in &self.runs {
            for (piece, mark) in theirs.split(*run) {
                if let Some(mark) = mark {
                    intersection.push(HotRun {
                        mark: mark.min(piece.mark),
                        ..piece
                    });
                }
            }
        }
        Ok(intersection)
    }

    /// The first `pages` of it, and the rest.
    #[must_use]
    pub fn split_at(&self, pages: u64) -> (Self, Self) {
        let (mut first, mut rest) = (Self::empty(self.generation), Self::empty(self.generation));
        for &run in &self.runs {
            let left = pages.saturating_sub(first.pages);
            let taken = u32::try_from(left).unwrap_or(u32::MAX).min(run.pages);
            if taken > 0 {
                first.push(HotRun { pages: taken, ..run });
            }
            if taken < run.pages {
                let gpa = run.gpa.plus_pages(taken.into());
                rest.push(HotRun {
                    gpa,
                    pages: run.pages - taken,
                    ..run
                });
            }
        }
        (first, rest)
    }

    fn same_memory(&self, other: &Self) -> Result<(), DifferentMemory> {
        let (left, right) = (self.generation, other.generation);
        if left == right {
            Ok(())
        } else {
            Err(DifferentMemory { left, right })
        }
    }
}
