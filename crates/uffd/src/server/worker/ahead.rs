//! Hot pages: fetched when nobody waits.

use std::io;
use std::ops::Range;

use super::fill::{Fill, unreadable};
use super::{End, Worker};
use crate::address::PAGE;
use crate::hot_pages::Stretch;
use crate::memory::Area;

/// Pages that are fetched ahead before the server looks for faults again.
const SLICE_PAGES: u64 = 64;

impl Worker<'_> {
    /// Fetches some hot pages. Whether there may be more.
    pub(super) fn fetch_ahead(&mut self) -> Result<bool, End> {
        let Some(mut prefetcher) = self.prefetcher.take() else {
            return Ok(false);
        };
        let mut fetched = 0;
        while let Some(stretch) = prefetcher.tell() {
            self.tell(stretch);
        }
        while fetched < SLICE_PAGES {
            let before = prefetcher.is_before_resume();
            match prefetcher.next() {
                Some(stretch) => {
                    fetched += stretch.pages;
                    self.fetch(stretch)?;
                }
                None if before => self.shared.ready(),
                None => return Ok(false),
            }
        }
        self.prefetcher = Some(prefetcher);
        Ok(true)
    }

    /// Tells the source of pages that will be read soon.
    fn tell(&self, stretch: Stretch) {
        for area in &self.shared.memory.areas {
            let pages = area.mapping.clip(stretch.gpa, stretch.pages);
            if !pages.is_empty() {
                self.shared
                    .source
                    .will_need(area.offset_of(pages.start), (pages.len() * PAGE) as u64);
            }
        }
    }

    /// Fills those of the pages that wait for it. The list has no zero pages, since none was recorded.
    fn fetch(&mut self, stretch: Stretch) -> Result<(), End> {
        let shared = self.shared;
        let tally = &shared.tally;
        for area in &shared.memory.areas {
            let hot = area.mapping.clip(stretch.gpa, stretch.pages);
            let mut page = hot.start;
            while page < hot.end {
                if !area.is_open(page) {
                    tally.prefetch_late.add(u64::from(area.is_present(page)));
                    page += 1;
                    continue;
                }
                let open = (page..hot.end).take_while(|page| area.is_open(*page)).count();
                if let Err(error) = self.read(area, page, open) {
                    return Err(self.first_unreadable(area, page..page + open, error));
                }
                let outcome = self.fill(area, page..page + open, Fill::Copy { protect: false })?;
                tally.prefetch_hits.add(outcome.filled);
                tally
                    .prefetch_waste
                    .add(outcome.already_there + outcome.displaced);
                page += open;
            }
        }
        Ok(())
    }

    /// Which of the pages it is that cannot be read.
    fn first_unreadable(&mut self, area: &Area, pages: Range<usize>, error: io::Error) -> End {
        for page in pages.clone() {
            if let Err(error) = self.read(area, page, 1) {
                return unreadable(area, page, error);
            }
        }
        unreadable(area, pages.start, error)
    }
}
