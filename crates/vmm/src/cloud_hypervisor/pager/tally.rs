//! What the pager did, in numbers: kept in a file of the instance, so that they can be read also after it has ended.
//!
//! The file is a row of little-endian `u64`, written at once; who reads it while it is written may get numbers of two moments.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use crate::PageCounters;

/// A number that the pager's threads count up. It orders nothing.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// The numbers, being counted.
        #[derive(Debug)]
        pub(super) struct Tally {
            file: File,
            $($(#[$doc])* pub(super) $name: Count,)*
        }

        const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl Tally {
            /// All are zero, in the file at `path` too.
            pub(super) fn create(path: &Path) -> io::Result<Self> {
                let tally = Self { file: File::create(path)?, $($name: Count::default(),)* };
                tally.write()?;
                Ok(tally)
            }

            fn values(&self) -> [U64; NAMES.len()] {
                [$(U64::new(self.$name.get())),*]
            }
        }
    };
}

counters! {
    /// Requests for pages for which somebody waited.
    demand_faults,
    /// Requests of Cloud Hypervisor's walk through all of memory.
    walk_requests,
    /// Pages that were copied, for whatever reason.
    copied_pages,
    /// Pages of zeros for which somebody waited.
    zero_pages,
    /// Bytes read from the snapshot.
    bytes_read,
    /// Hot pages that came before anybody asked for them.
    prefetched,
    /// 1 if there was a list of hot pages that could not be used.
    prefetch_ignored,
    /// 1 while hot pages are recorded.
    recording,
    /// Hot pages that were recorded.
    recorded,
}

impl Tally {
    /// Writes the numbers to the file.
    pub(super) fn write(&self) -> io::Result<()> {
        self.file.write_all_at(self.values().as_bytes(), 0)
    }
}

/// The numbers in the file at `path`; none if it is not there.
pub(crate) fn read(path: &Path) -> PageCounters {
    let bytes = fs::read(path).unwrap_or_default();
    match <[U64; NAMES.len()]>::read_from_bytes(&bytes) {
        Ok(values) => (NAMES.iter().zip(values))
            .map(|(name, value)| ((*name).to_owned(), value.get()))
            .collect(),
        Err(_) => PageCounters::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_is_read_and_what_is_no_such_file_counts_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pages");
        assert!(read(&path).is_empty());
        let tally = Tally::create(&path).unwrap();
        tally.demand_faults.add(3);
        assert_eq!(read(&path)["demand_faults"], 0);
        tally.write().unwrap();
        assert_eq!(read(&path)["demand_faults"], 3);
        fs::write(&path, "short").unwrap();
        assert!(read(&path).is_empty());
    }
}
