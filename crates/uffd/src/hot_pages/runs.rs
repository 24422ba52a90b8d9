//! Runs of pages: joined, ordered by address, and split where another list begins or ends. Never page by page: a run
//! may be long, and what is spent on it must not depend on that.

use super::{HotRun, Mark};
use crate::address::Gpa;

/// Pages of the guest that follow each other, whatever their marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) gpa: Gpa,
    pub(crate) pages: u64,
}

/// The runs by rising address, joined where they meet: one call then does for many.
pub(crate) fn by_address<'a>(runs: impl IntoIterator<Item = &'a HotRun>) -> Vec<Stretch> {
    let mut sorted: Vec<&HotRun> = runs.into_iter().collect();
    sorted.sort_unstable_by_key(|run| run.gpa);
    let mut joined: Vec<Stretch> = Vec::with_capacity(sorted.len());
    for run in sorted {
        match joined.last_mut() {
            Some(last) if last.gpa.plus_pages(last.pages) == run.gpa => last.pages += u64::from(run.pages),
            _ => joined.push(Stretch {
                gpa: run.gpa,
                pages: run.pages.into(),
            }),
        }
    }
    joined
}

/// Adds a run, to the last one where it goes on there.
pub(super) fn push(runs: &mut Vec<HotRun>, run: HotRun) {
    if let Some(last) = runs.last_mut()
        && last.end() == run.gpa
        && last.mark == run.mark
        && let Some(pages) = last.pages.checked_add(run.pages)
    {
        last.pages = pages;
    } else {
        runs.push(run);
    }
}

/// Runs by rising address.
pub(super) struct ByAddress(Vec<HotRun>);

impl ByAddress {
    pub(super) fn new(runs: &[HotRun]) -> Self {
        let mut sorted = runs.to_vec();
        sorted.sort_unstable_by_key(|run| run.gpa);
        Self(sorted)
    }

    /// The first two runs that have a page in common.
    pub(super) fn overlap(&self) -> Option<(HotRun, HotRun)> {
        self.0
            .windows(2)
            .find(|pair| pair[0].end() > pair[1].gpa)
            .map(|pair| (pair[0], pair[1]))
    }

    /// The pieces of `run`, in order, each with the mark that it has here, if it is here.
    pub(super) fn split(&self, run: HotRun) -> impl Iterator<Item = (HotRun, Option<Mark>)> + '_ {
        let mut next = self.0.partition_point(|here| here.end() <= run.gpa);
        let mut rest = run;
        std::iter::from_fn(move || {
            if rest.pages == 0 {
                return None;
            }
            let here = self.0.get(next).filter(|here| here.gpa < rest.end());
            let (end, mark) = match here {
                None => (rest.end(), None),
                Some(here) if here.gpa > rest.gpa => (here.gpa, None),
                Some(here) => {
                    next += 1;
                    (here.end().min(rest.end()), Some(here.mark))
                }
            };
            // The piece is a part of the run, so that its pages fit.
            let pages = rest.pages_to(end);
            let piece = HotRun { pages, ..rest };
            rest = HotRun {
                gpa: end,
                pages: rest.pages - pages,
                ..rest
            };
            Some((piece, mark))
        })
    }
}
