//! What a page server did, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long faults took, from when the server learnt of them until the page was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Bucket n counts times of at least 2^n ns and less than 2^(n+1); the first also counts 0.
    pub buckets: [u64; Self::BUCKETS],
}

impl Histogram {
    /// The last bucket begins at 2^35 ns: 34 s.
    pub const BUCKETS: usize = 36;

    /// How many faults were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// A time that at least this share (0 to 1) of the faults did not exceed; the end of a bucket, so up to twice as
    /// long as the true one.
    #[must_use]
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let count = self.count();
        let mut seen = 0;
        for (bucket, faults) in self.buckets.iter().enumerate() {
            seen += faults;
            #[expect(
                clippy::cast_precision_loss,
                reason = "a share of so many faults need not be exact"
            )]
            let reached = seen as f64 >= share * count as f64;
            if seen > 0 && reached {
                return Some(Duration::from_nanos(2 << bucket));
            }
        }
        None
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a server did since its start.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
            /// How long demand faults took.
            pub latency: Histogram,
        }

        /// The same, being counted.
        #[derive(Debug)]
        pub(crate) struct Tally {
            $(pub(crate) $name: Count,)*
            latency: [Count; Histogram::BUCKETS],
        }

        impl Tally {
            pub(crate) fn new() -> Self {
                Self { $($name: Count::default(),)* latency: std::array::from_fn(|_| Count::default()) }
            }

            pub(crate) fn read(&self) -> Counters {
                let buckets = std::array::from_fn(|bucket| self.latency[bucket].get());
                Counters { $($name: self.$name.get(),)* latency: Histogram { buckets } }
            }
        }
    };
}

counters! {
    /// Faults on pages that were not there. Each stopped a thread or a vCPU.
    demand_faults,
    /// Those of them that came of a write.
    demand_writes,
    /// Faults on pages that were write-protected to see whether they are written, while recording.
    write_protect_faults,
    /// Pages copied in because somebody waited for them or for a neighbour.
    demand_pages,
    /// Pages filled with zeros, which the source knows without reading.
    zero_pages,
    /// Bytes read from the source.
    bytes_read,
    /// Hot pages that were there before anybody asked for them: each is a fault less, if the guest touches it. (Whether
    /// it does, userfaultfd cannot tell: nobody faults on a page that is there.)
    prefetch_hits,
    /// Hot pages that had come by demand before the prefetch came to them.
    prefetch_late,
    /// Hot pages that were read in vain: when they were to be put in place, somebody else had done so, or the memory
    /// had been discarded.
    prefetch_waste,
    /// Pages that were there when they were to be filled (EEXIST), hot or not.
    already_there,
    /// Fills that had to be tried again because the memory was being changed (EAGAIN).
    retries,
    /// Pages that were discarded (MADV_DONTNEED) while they were served.
    discarded_pages,
}

/// A number that several threads count up. It orders nothing.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Tally {
    pub(crate) fn took(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).max(1);
        let bucket = (nanoseconds.ilog2() as usize).min(Histogram::BUCKETS - 1);
        self.latency[bucket].add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_counted_in_its_power_of_two() {
        let tally = Tally::new();
        for nanoseconds in [0, 1, 2, 3, 4, 1023, 1024, u64::MAX] {
            tally.took(Duration::from_nanos(nanoseconds));
        }
        let latency = tally.read().latency;
        assert_eq!(latency.buckets[..3], [2, 2, 1]);
        assert_eq!(
            (latency.buckets[9], latency.buckets[10], latency.buckets[35]),
            (1, 1, 1)
        );
        assert_eq!(latency.quantile(0.5), Some(Duration::from_nanos(4)));
        assert_eq!(Tally::new().read().latency.quantile(0.5), None);
    }
}
