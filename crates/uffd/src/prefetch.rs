//! The prefetcher: in which order hot pages are fetched. It decides, and touches nothing.

use std::collections::VecDeque;

use crate::address::{PAGE_SIZE, host_size};
use crate::hot_pages::{HotPages, HotRun, Stretch, by_address};

/// How much of the hot pages a guest waits for before it runs, in bytes.
///
/// In large runs these take some 20 ms where the file is in the page cache; a guest that needs more in its first moments has
/// it come behind its back, in the order in which it is needed, which costs it less than the wait.
pub const PREFETCH_BUDGET: u64 = 64 << 20;

/// Pages that are fetched by one call at most: 2 MiB. The rest of the list is taken in parts of so many.
const BATCH_PAGES: u64 = 512;

/// The same behind a running guest, where a fault may come meanwhile, and waits for the call: 256 KiB.
const BEHIND_PAGES: u64 = 64;

/// Pages that the source is told of before they are fetched: a disk is busy with many reads at once, not with one.
const AHEAD_PAGES: u64 = 4 * BATCH_PAGES;

/// What is left to fetch: first what must be there before the guest resumes, then the rest.
///
/// One call for many pages costs a tenth of one call for each. The guest waits for the first part as a whole, so that
/// is fetched by address, where most pages are neighbours. The rest is fetched in the order of first touch, and only
/// by address within a batch: the guest is on its way through it.
#[derive(Debug)]
pub(crate) struct Prefetcher {
    /// In the order in which they are fetched.
    ready: VecDeque<Stretch>,
    /// How many of `ready`, and of its pages, the source was told of.
    told: usize,
    told_pages: u64,
    behind: VecDeque<HotRun>,
    before_resume: bool,
}

impl Prefetcher {
    /// At most `budget` bytes of `hot` before the guest resumes.
    pub(crate) fn new(hot: &HotPages, budget: u64) -> Self {
        let (first, behind) = hot.split_at(budget / PAGE_SIZE);
        Self {
            ready: cut(by_address(first.runs()), BATCH_PAGES).collect(),
            told: 0,
            told_pages: 0,
            behind: behind.runs().iter().copied().collect(),
            before_resume: true,
        }
    }

    /// Whether the guest waits for what comes next.
    pub(crate) const fn is_before_resume(&self) -> bool {
        self.before_resume
    }

    /// The next pages that the source should be told of, until enough are on their way.
    pub(crate) fn tell(&mut self) -> Option<Stretch> {
        if self.told_pages >= AHEAD_PAGES {
            return None;
        }
        if self.told == self.ready.len() && !self.before_resume {
            self.plan();
        }
        let stretch = *self.ready.get(self.told)?;
        self.told += 1;
        self.told_pages += stretch.pages;
        Some(stretch)
    }

    /// What to fetch next, at most 2 MiB. `None` comes once at the end of the first part, and then at the end
    /// of all.
    pub(crate) fn next(&mut self) -> Option<Stretch> {
        if self.ready.is_empty() {
            if self.before_resume {
                self.before_resume = false;
                return None;
            }
            self.plan();
        }
        let next = self.ready.pop_front()?;
        if self.told > 0 {
            self.told -= 1;
            self.told_pages -= next.pages;
        }
        Some(next)
    }

    /// Takes the next batch of what follows behind the guest.
    fn plan(&mut self) {
        let mut batch = Vec::new();
        let mut pages = 0;
        while pages < BATCH_PAGES
            && let Some(run) = self.behind.pop_front()
        {
            pages += u64::from(run.pages);
            batch.push(run);
        }
        self.ready.extend(cut(by_address(&batch), BEHIND_PAGES));
    }
}

/// None longer than `most` pages.
fn cut(stretches: Vec<Stretch>, most: u64) -> impl Iterator<Item = Stretch> {
    stretches.into_iter().flat_map(move |stretch| {
        (0..stretch.pages)
            .step_by(host_size(most))
            .map(move |done| Stretch {
                gpa: stretch.gpa.plus_pages(done),
                pages: (stretch.pages - done).min(most),
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Gpa;
    use crate::hot_pages::Mark;
    use stencil_core::generation::MemoryGeneration;

    fn hot(pages: impl IntoIterator<Item = u64>) -> HotPages {
        let touches = pages
            .into_iter()
            .map(|page| (Gpa::new(page * PAGE_SIZE), Mark::Read));
        HotPages::from_touches(MemoryGeneration::random(), touches)
    }

    fn drain(prefetcher: &mut Prefetcher) -> Vec<(u64, u64)> {
        std::iter::from_fn(|| prefetcher.next())
            .map(|stretch| (stretch.gpa.get() / PAGE_SIZE, stretch.pages))
            .collect()
    }

    #[test]
    fn the_budget_comes_first_and_by_address_and_the_rest_follows() {
        let mut prefetcher = Prefetcher::new(&hot([9, 2, 8, 1, 50, 30]), 4 * PAGE_SIZE);
        assert!(prefetcher.is_before_resume());
        assert_eq!(drain(&mut prefetcher), [(1, 2), (8, 2)]);
        assert!(!prefetcher.is_before_resume());
        assert_eq!(drain(&mut prefetcher), [(30, 1), (50, 1)]);
        assert_eq!(drain(&mut prefetcher), []);
    }

    #[test]
    fn no_stretch_is_longer_than_a_batch() {
        let mut prefetcher = Prefetcher::new(&hot((600..1800).chain(0..600)), u64::MAX);
        assert_eq!(
            drain(&mut prefetcher),
            [(0, 512), (512, 512), (1024, 512), (1536, 264)]
        );
    }

    #[test]
    fn the_source_is_told_of_enough_and_of_each_page_once_before_it_is_fetched() {
        let mut prefetcher = Prefetcher::new(&hot((0..20_000).step_by(2)), 3000 * PAGE_SIZE);
        let (mut told, mut fetched) = (Vec::new(), Vec::new());
        for _ in 0..20_000 {
            told.extend(std::iter::from_fn(|| prefetcher.tell()));
            assert!(told.len() as u64 <= fetched.len() as u64 + AHEAD_PAGES);
            fetched.extend(prefetcher.next());
            assert!(told.len() >= fetched.len());
        }
        assert_eq!((told.len(), &told), (10_000, &fetched));
    }

    #[test]
    fn the_rest_keeps_the_order_of_first_touch_from_batch_to_batch() {
        let mut prefetcher = Prefetcher::new(&hot((2000..2512).chain(0..512)), 0);
        assert_eq!(drain(&mut prefetcher), []);
        let first = drain(&mut prefetcher).into_iter().map(|(page, _)| page);
        assert!(first.eq((2000..2512).step_by(64).chain((0..512).step_by(64))));
    }
}
