//! A template's hot pages in the page cache, for a guest whose memory is mapped from its file: done for the VMM by the
//! server, because the VMM cannot be told.

use std::fs::{self, File};
use std::num::NonZeroU64;
use std::path::Path;

use rustix::fs::{Advice, fadvise};
use stencil_core::{MemoryGeneration, SnapshotDir, error_chain};
use stencil_uffd::{Gpa, HotPages, HotRun, LoadError, PAGE_SIZE, RangeError, RangeTable};

use super::snapshot::{SnapshotError, State};

/// The most that is asked for at once: of more, the kernel reads no more than its read-ahead, which has this size unless
/// somebody changed it (`read_ahead_kb`).
const AT_ONCE: u64 = 128 << 10;

/// Why nothing, or not all, was asked for. The guest runs all the same.
#[derive(Debug, thiserror::Error)]
enum NotPrefetched {
    #[error(transparent)]
    List(#[from] LoadError),
    #[error("the list of hot pages is no file")]
    NoFile,
    #[error(transparent)]
    State(#[from] SnapshotError),
    #[error(transparent)]
    Ranges(#[from] RangeError),
    #[error("the snapshot's files cannot be read")]
    Io(#[from] std::io::Error),
}

/// Has the kernel read the hot pages of `list` that are not in the page cache, in the order in which they will be touched.
/// It does not wait for the disk. A list that cannot be used is ignored, and that is said.
pub(super) fn prefetch(snapshot: &SnapshotDir, memory: MemoryGeneration, list: &Path) {
    match try_prefetch(snapshot, memory, list) {
        Ok(pages) => tracing::debug!(list = %list.display(), pages, "hot pages asked for"),
        Err(error) => {
            tracing::warn!(list = %list.display(), error = error_chain(&error), "no hot pages");
        }
    }
}

/// Answers how many pages it asked for.
fn try_prefetch(snapshot: &SnapshotDir, memory: MemoryGeneration, list: &Path) -> Result<u64, NotPrefetched> {
    // A pipe would not be opened until somebody writes to it.
    if !fs::metadata(list)?.is_file() {
        return Err(NotPrefetched::NoFile);
    }
    let hot = HotPages::load(list, memory)?;
    let state = State::read(&fs::read(snapshot.state())?)?;
    let ranges = state.memory.memory_ranges.data.iter();
    let table = RangeTable::packed(ranges.map(|range| (Gpa::new(range.gpa), range.length)))?;
    let file = File::open(snapshot.memory_ranges())?;
    let mut asked = 0;
    for (offset, length) in hot.runs().iter().flat_map(|run| pieces(&table, run)) {
        fadvise(&file, offset, Some(length), Advice::WillNeed).map_err(std::io::Error::from)?;
        asked += length.get() / PAGE_SIZE;
    }
    Ok(asked)
}

/// Where in the file the pages of a run are: offset and length in bytes, none longer than [`AT_ONCE`]. Pages that are not in
/// the file are left out.
fn pieces(table: &RangeTable, run: &HotRun) -> impl Iterator<Item = (u64, NonZeroU64)> {
    let (mut begin, end) = (
        run.gpa.get(),
        run.gpa.get().saturating_add(u64::from(run.pages) * PAGE_SIZE),
    );
    std::iter::from_fn(move || {
        let range = table
            .ranges()
            .iter()
            .find(|range| range.gpa.get() + range.size > begin)?;
        let from = begin.max(range.gpa.get());
        let to = end
            .min(range.gpa.get() + range.size)
            .min(from.saturating_add(AT_ONCE));
        begin = to;
        let length = NonZeroU64::new(to.checked_sub(from)?)?;
        Some((range.file_offset + (from - range.gpa.get()), length))
    })
}

#[cfg(test)]
mod tests {
    use stencil_uffd::Mark;

    use super::*;

    const STATE: &[u8] = include_bytes!("../../tests/fixtures/cloud-hypervisor/two-regions.state.json");

    fn run(gpa: u64, pages: u32) -> HotRun {
        HotRun {
            gpa: Gpa::new(gpa),
            pages,
            mark: Mark::Read,
        }
    }

    fn places(table: &RangeTable, run: &HotRun) -> Vec<(u64, u64)> {
        pieces(table, run)
            .map(|(offset, length)| (offset, length.get()))
            .collect()
    }

    #[test]
    fn a_run_is_asked_for_where_it_lies_in_the_file_and_in_small_pieces() {
        let table =
            RangeTable::packed([(Gpa::new(0), 0x10_0000), (Gpa::new(0x100_0000), 0x10_0000)]).unwrap();
        assert_eq!(places(&table, &run(0x3000, 2)), [(0x3000, 0x2000)]);
        assert_eq!(places(&table, &run(0x100_1000, 1)), [(0x10_1000, 0x1000)]);
        assert_eq!(
            places(&table, &run(0x1000, 40)),
            [(0x1000, 0x2_0000), (0x2_1000, 0x8000)]
        );
        // Its first page is in the first range; the others are in none.
        assert_eq!(places(&table, &run(0xf_f000, 3)), [(0xf_f000, 0x1000)]);
        assert_eq!(places(&table, &run(0x200_0000, 3)), []);
    }

    #[test]
    fn a_list_of_other_memory_or_none_at_all_is_told_and_nothing_is_asked_for() {
        let scratch = tempfile::tempdir().unwrap();
        let snapshot = SnapshotDir::new(scratch.path());
        fs::write(snapshot.state(), STATE).unwrap();
        fs::write(snapshot.memory_ranges(), [0; 8192]).unwrap();
        let (ours, other) = (MemoryGeneration::random(), MemoryGeneration::random());
        let list = scratch.path().join("hot-pages");
        let touched = [0, 0x1000, 0x5000].map(|gpa| (Gpa::new(gpa), Mark::Read));
        HotPages::from_touches(ours, touched).save(&list).unwrap();
        assert_eq!(try_prefetch(&snapshot, ours, &list).unwrap(), 3);
        let refused = try_prefetch(&snapshot, other, &list);
        assert!(matches!(refused, Err(NotPrefetched::List(_))), "{refused:?}");
        let refused = try_prefetch(&snapshot, ours, scratch.path());
        assert!(matches!(refused, Err(NotPrefetched::NoFile)), "{refused:?}");
        fs::write(&list, "no list").unwrap();
        let refused = try_prefetch(&snapshot, ours, &list);
        assert!(matches!(refused, Err(NotPrefetched::List(_))), "{refused:?}");
        fs::remove_file(&list).unwrap();
        let refused = try_prefetch(&snapshot, ours, &list);
        assert!(matches!(refused, Err(NotPrefetched::Io(_))), "{refused:?}");
    }
}
