//! Tells what the guest asks for from what Cloud Hypervisor asks for behind its back.
//!
//! While memory comes lazily, Cloud Hypervisor walks through all of it, one page after the other, and asks for each page that
//! nobody has asked for yet (v53, `vmm/src/memory_manager.rs`, `uffd_handler_loop`). On the wire a request of the walk is like
//! any other. But it is always the first for its page, and its page is the lowest of a region that was never asked for. So:
//!
//! - a request for another page, or a second request for a page, is the guest's (or a device's, for the guest);
//! - a first request for the lowest page of a region that nobody asked for *may* be the walk's. If the answer leaves the page
//!   where it is, not there, nothing is lost: where it was the guest that waited, it touches the page again as soon as it is
//!   woken, and asks a second time.

/// Which pages were asked for, in each region of guest memory.
#[derive(Debug)]
pub(super) struct Walk {
    regions: Vec<Region>,
    /// Pages that nobody has asked for.
    left: usize,
}

#[derive(Debug)]
struct Region {
    asked: Vec<bool>,
    /// The lowest page that nobody has asked for.
    next: usize,
}

/// Who asks for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    /// Somebody who waits for it.
    Guest,
    /// Cloud Hypervisor's walk, or somebody who waits and will ask again.
    PerhapsWalk,
}

impl Walk {
    /// Of regions of so many pages.
    pub(super) fn new(pages: impl IntoIterator<Item = usize>) -> Self {
        let regions: Vec<Region> = pages
            .into_iter()
            .map(|pages| Region {
                asked: vec![false; pages],
                next: 0,
            })
            .collect();
        let left = regions.iter().map(|region| region.asked.len()).sum();
        Self { regions, left }
    }

    /// A page, which is there, is asked for: by whom?
    pub(super) fn ask(&mut self, region: usize, page: usize) -> Asker {
        let region = &mut self.regions[region];
        if region.asked[page] {
            return Asker::Guest;
        }
        region.asked[page] = true;
        self.left -= 1;
        if page != region.next {
            return Asker::Guest;
        }
        region.next += region.asked[page..].iter().take_while(|asked| **asked).count();
        Asker::PerhapsWalk
    }

    /// Whether every page was asked for. When such a request is answered the walk is over, and from then on the kernel gives
    /// zeros for what is not there.
    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::Asker::{Guest, PerhapsWalk};
    use super::*;

    /// Cloud Hypervisor's side: it asks for the pages that a guest touches, and goes on with its walk in between.
    fn walk_of(pages: usize, touches: &[(usize, usize)]) -> Vec<(usize, Asker)> {
        let mut walk = Walk::new([pages]);
        let mut served = vec![false; pages];
        let mut asked = Vec::new();
        let mut cursor = 0;
        for step in 0.. {
            for (_, page) in touches.iter().filter(|(at, _)| *at == step) {
                if !served[*page] {
                    asked.push((*page, walk.ask(0, *page)));
                    served[*page] = true;
                }
            }
            while cursor < pages && served[cursor] {
                cursor += 1;
            }
            if cursor == pages {
                break;
            }
            asked.push((cursor, walk.ask(0, cursor)));
            served[cursor] = true;
        }
        assert!(walk.is_over());
        asked
    }

    #[test]
    fn a_walk_alone_is_never_taken_for_the_guest() {
        let asked = walk_of(5, &[]);
        assert_eq!(asked, (0..5).map(|page| (page, PerhapsWalk)).collect::<Vec<_>>());
    }

    #[test]
    fn what_the_guest_touches_ahead_of_the_walk_is_the_guest_s_and_is_left_out_by_the_walk() {
        let asked = walk_of(6, &[(1, 4), (1, 2), (3, 5)]);
        let expected = [
            (0, PerhapsWalk),
            (4, Guest),
            (2, Guest),
            (1, PerhapsWalk),
            (3, PerhapsWalk),
            (5, PerhapsWalk),
        ];
        assert_eq!(asked, expected, "the last may be either, and is asked for again");
    }

    #[test]
    fn who_asks_a_second_time_is_the_guest() {
        let mut walk = Walk::new([2, 3]);
        assert_eq!(walk.ask(0, 0), PerhapsWalk);
        assert_eq!(walk.ask(0, 0), Guest);
        assert_eq!(walk.ask(1, 0), PerhapsWalk, "each region has a lowest page");
        assert_eq!(walk.ask(1, 2), Guest);
        assert!(!walk.is_over());
        assert_eq!(walk.ask(0, 1), PerhapsWalk);
        assert_eq!(walk.ask(1, 1), PerhapsWalk);
        assert!(walk.is_over());
        assert_eq!(walk.ask(1, 1), Guest);
    }
}
