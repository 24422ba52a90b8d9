//! A set of the pages of a mapping, which threads share.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::FromZeros as _;

/// One bit a page. It orders nothing between threads: what must be ordered is done under a lock.
#[derive(Debug)]
pub(crate) struct PageSet {
    words: Box<[AtomicU64]>,
}

impl PageSet {
    /// No page of so many. The memory comes zeroed from the kernel, and is not touched before it is used.
    pub(crate) fn empty(pages: usize) -> Option<Self> {
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(pages.div_ceil(64)).ok()?;
        Some(Self { words })
    }

    pub(crate) fn has(&self, page: usize) -> bool {
        self.words[page / 64].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }

    pub(crate) fn add(&self, pages: Range<usize>) {
        for (word, bits) in words(pages) {
            self.words[word].fetch_or(bits, Ordering::Relaxed);
        }
    }

    pub(crate) fn remove(&self, pages: Range<usize>) {
        for (word, bits) in words(pages) {
            self.words[word].fetch_and(!bits, Ordering::Relaxed);
        }
    }
}

/// The words that hold `pages`, each with their bits in it.
fn words(pages: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    (pages.start / 64..pages.end.div_ceil(64)).map(move |word| {
        let from = pages.start.max(word * 64) - word * 64;
        let to = pages.end.min(word * 64 + 64) - word * 64;
        // At least one bit where the range is not empty, and at most 64.
        let bits = if to > from {
            u64::MAX >> (64 - (to - from)) << from
        } else {
            0
        };
        (word, bits)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_a_set(steps in proptest::collection::vec((any::<bool>(), 0..200_usize, 0..200_usize), 0..20)) {
            let set = PageSet::empty(200).unwrap();
            let mut model = [false; 200];
            for (add, a, b) in steps {
                let pages = a.min(b)..a.max(b);
                model[pages.clone()].fill(add);
                if add { set.add(pages) } else { set.remove(pages) }
            }
            prop_assert!((0..200).all(|page| set.has(page) == model[page]));
        }
    }
}
