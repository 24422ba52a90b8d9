//! Whether the host has what forks need: a pure decision, made before anything is started. What the host has is read in
//! `host`.
//!
//! It refuses what surely cannot be, and no more. Forks share their template's memory, and giving out more than a host has is
//! the point of them; so a fork counts for what its VMM needs even if its guest writes nothing.

use std::fmt;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stencil_core::MemoryMode;

/// What a VMM needs by itself, in bytes. Measured on a kvm-pvm host (Linux 6.18, 2 cores) over three times 300 forks that
/// ran: 232 KiB private to the process, 61 KiB page tables, 262 KiB of the kernel's slab, 80 KiB kernel stacks; with what no
/// counter tells, MemAvailable fell by 1.4 to 2.2 MiB a fork.
const VMM_BYTES: u64 = 1 << 20;
/// What the server holds for each VMM as long as it lives: its pidfd.
const VMM_DESCRIPTORS: u64 = 1;
/// Threads of a VMM beside those of its vCPUs: its main one, the one that runs its VM, KVM's own worker for it.
const VMM_THREADS: u64 = 3;
/// Who waits for a fork's guest to be ready watches its directory.
const FORK_WATCHES: u64 = 1;

/// Something that a host has only so much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// Bytes of memory.
    Memory,
    /// Open files of the server.
    OpenFiles,
    /// Processes and threads.
    Processes,
    /// Directories that can be watched.
    Watches,
}

impl Resource {
    /// A word for programs, such as `open_files`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::OpenFiles => "open_files",
            Self::Processes => "processes",
            Self::Watches => "watches",
        }
    }

    /// What it is counted in.
    fn unit(self) -> &'static str {
        match self {
            Self::Memory => "bytes of memory",
            Self::OpenFiles => "open files",
            Self::Processes => "processes and threads",
            Self::Watches => "inotify watches",
        }
    }
}

/// The host has too little for the forks that were asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Shortage {
    /// Of what.
    pub resource: Resource,
    /// What sets the limit, such as `RLIMIT_NOFILE`.
    pub limit: &'static str,
    /// How many forks would have to be started.
    pub count: u32,
    /// How many were asked for beside them that are armed, and need nothing more.
    pub armed: u32,
    /// What they need at least.
    pub needed: u64,
    /// What there is for them.
    pub available: u64,
    /// How many can be started.
    pub room_for: u64,
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            resource,
            limit,
            count,
            armed,
            needed,
            available,
            room_for,
        } = self;
        let (forks, unit) = (if *count == 1 { "fork" } else { "forks" }, resource.unit());
        write!(f, "{count} {forks} ")?;
        if *armed > 0 {
            write!(f, "beside {armed} armed ones ")?;
        }
        write!(
            f,
            "would need at least {needed} {unit}, and {available} are left ({limit}): there is room for \
             {room_for}; "
        )?;
        f.write_str(match resource {
            Resource::Memory => "ask for fewer, in memory mode cow, or end other VMs first",
            _ => "ask for fewer, end other VMs first, or raise that limit",
        })
    }
}

/// What something needs of each resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    memory_bytes: u64,
    open_files: u64,
    processes: u64,
    watches: u64,
}

impl Needs {
    /// Of one fork with a VMM. `data_bytes` is what there is of its source's memory, holes left out.
    pub(crate) fn of_fork(mode: MemoryMode, vcpus: u32, data_bytes: u64) -> Self {
        let own_copy_bytes = match mode {
            MemoryMode::Cow => 0,
            // Every page that the guest touches becomes its own, at once or as it goes.
            MemoryMode::Copy | MemoryMode::Uffd | MemoryMode::OnDemand => data_bytes,
        };
        Self {
            memory_bytes: VMM_BYTES.saturating_add(own_copy_bytes),
            open_files: VMM_DESCRIPTORS,
            processes: VMM_THREADS + u64::from(vcpus),
            watches: FORK_WATCHES,
        }
    }

    fn of(&self, resource: Resource) -> u64 {
        match resource {
            Resource::Memory => self.memory_bytes,
            Resource::OpenFiles => self.open_files,
            Resource::Processes => self.processes,
            Resource::Watches => self.watches,
        }
    }

    fn each(self, other: Self, with: fn(u64, u64) -> u64) -> Self {
        Self {
            memory_bytes: with(self.memory_bytes, other.memory_bytes),
            open_files: with(self.open_files, other.open_files),
            processes: with(self.processes, other.processes),
            watches: with(self.watches, other.watches),
        }
    }

    fn times(self, count: u32) -> Self {
        let count = u64::from(count);
        let counts = Self {
            memory_bytes: count,
            open_files: count,
            processes: count,
            watches: count,
        };
        self.each(counts, u64::saturating_mul)
    }
}

/// What is left of a resource, as one limit has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Supply {
    pub(crate) resource: Resource,
    pub(crate) limit: &'static str,
    pub(crate) left: u64,
}

/// Refuses `count` forks that each need `each` where a supply, less what is promised to others, does not have it.
fn check(count: u32, each: Needs, promised: Needs, supplies: &[Supply]) -> Result<(), Shortage> {
    let all = each.times(count);
    let shortages = supplies.iter().filter_map(|supply| {
        let available = supply.left.saturating_sub(promised.of(supply.resource));
        let needed = all.of(supply.resource);
        (needed > available).then(|| Shortage {
            resource: supply.resource,
            limit: supply.limit,
            count,
            armed: 0,
            needed,
            available,
            // Something is needed, or there would be no shortage.
            room_for: available / each.of(supply.resource).max(1),
        })
    });
    // The one that leaves the least room: who asks for so many is not refused again.
    shortages
        .min_by_key(|shortage| shortage.room_for)
        .map_or(Ok(()), Err)
}

/// What was promised to forks that are being made, so that two calls do not get the same.
#[derive(Debug, Default)]
pub(crate) struct Promises(Mutex<Needs>);

impl Promises {
    /// Promises `count` forks what they need, until the promise is dropped.
    pub(crate) fn promise(
        self: &Arc<Self>,
        count: u32,
        each: Needs,
        supplies: &[Supply],
    ) -> Result<Promise, Shortage> {
        let mut promised = self.promised();
        check(count, each, *promised, supplies)?;
        *promised = promised.each(each.times(count), u64::saturating_add);
        Ok(Promise {
            promises: Arc::clone(self),
            each,
            left: AtomicU32::new(count),
        })
    }

    fn promised(&self) -> MutexGuard<'_, Needs> {
        // Nothing panics while it holds this lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What forks that are being made may count on.
#[derive(Debug)]
pub(crate) struct Promise {
    promises: Arc<Promises>,
    each: Needs,
    /// How many forks have not taken yet what they were promised.
    left: AtomicU32,
}

impl Promise {
    /// A fork has what it was promised: what the host has left is less by it.
    pub(crate) fn keep_one(&self) {
        let one_less = |left: u32| left.checked_sub(1);
        if self.left.fetch_update(Relaxed, Relaxed, one_less).is_ok() {
            self.take_back(1);
        }
    }

    fn take_back(&self, count: u32) {
        let mut promised = self.promises.promised();
        *promised = promised.each(self.each.times(count), u64::saturating_sub);
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        let left = *self.left.get_mut();
        self.take_back(left);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn supply(resource: Resource, left: u64) -> Supply {
        Supply {
            resource,
            limit: "a limit",
            left,
        }
    }

    fn cow() -> Needs {
        Needs::of_fork(MemoryMode::Cow, 1, GIB)
    }

    #[test]
    fn a_fork_that_shares_its_memory_needs_only_its_vmm_and_one_that_does_not_needs_it_too() {
        let bytes = |mode| Needs::of_fork(mode, 1, GIB).memory_bytes;
        assert_eq!(bytes(MemoryMode::Cow), VMM_BYTES);
        assert_eq!(bytes(MemoryMode::Copy), VMM_BYTES + GIB);
        assert_eq!(bytes(MemoryMode::Uffd), VMM_BYTES + GIB);
        assert_eq!(bytes(MemoryMode::OnDemand), VMM_BYTES + GIB);
    }

    #[test]
    fn of_two_shortages_the_one_with_less_room_is_told() {
        let supplies = [
            supply(Resource::Memory, 500 * VMM_BYTES),
            supply(Resource::OpenFiles, 100),
        ];
        let shortage = check(1000, cow(), Needs::default(), &supplies).unwrap_err();
        assert_eq!((shortage.resource, shortage.room_for), (Resource::OpenFiles, 100));
        assert_eq!(check(100, cow(), Needs::default(), &supplies), Ok(()));
    }

    #[test]
    fn a_promise_that_is_kept_is_promised_no_longer() {
        let promises = Arc::new(Promises::default());
        let supplies = [supply(Resource::OpenFiles, 3)];
        let promise = promises.promise(3, cow(), &supplies).unwrap();
        assert!(promises.promise(1, cow(), &supplies).is_err());
        promise.keep_one();
        assert!(promises.promise(2, cow(), &supplies).is_err());
        let other = promises.promise(1, cow(), &supplies).unwrap();
        drop((promise, other));
        assert!(promises.promise(3, cow(), &supplies).is_ok());
    }

    #[test]
    fn a_shortage_says_what_is_needed_what_there_is_and_how_many_would_fit() {
        let supplies = [
            supply(Resource::Memory, GIB),
            Supply {
                resource: Resource::OpenFiles,
                limit: "RLIMIT_NOFILE",
                left: 100,
            },
        ];
        let shortage = check(150, cow(), Needs::default(), &supplies).unwrap_err();
        assert_eq!(
            shortage.to_string(),
            "150 forks would need at least 150 open files, and 100 are left (RLIMIT_NOFILE): there is room for 100; ask for \
             fewer, end other VMs first, or raise that limit"
        );
        assert_eq!(check(100, cow(), Needs::default(), &supplies), Ok(()));
    }

    #[test]
    fn the_threads_of_vcpus_count() {
        let with = |vcpus| Needs::of_fork(MemoryMode::Cow, vcpus, 0);
        let supplies = [supply(Resource::Processes, 100)];
        assert_eq!(check(25, with(1), Needs::default(), &supplies), Ok(()));
        let shortage = check(25, with(2), Needs::default(), &supplies).unwrap_err();
        assert_eq!((shortage.needed, shortage.room_for), (125, 20));
    }

    #[test]
    fn what_is_promised_to_one_call_is_not_promised_to_another() {
        let promises = Arc::new(Promises::default());
        let supplies = [supply(Resource::Watches, 10)];
        let first = promises.promise(7, cow(), &supplies).unwrap();
        let refused = promises.promise(4, cow(), &supplies).unwrap_err();
        assert_eq!((refused.available, refused.room_for), (3, 3));
        let _second = promises.promise(3, cow(), &supplies).unwrap();
        drop(first);
        promises.promise(7, cow(), &supplies).unwrap();
    }

    fn resource() -> impl Strategy<Value = Resource> {
        use Resource::{Memory, OpenFiles, Processes, Watches};
        prop::sample::select(vec![Memory, OpenFiles, Processes, Watches])
    }

    proptest! {
        #[test]
        fn as_many_as_there_is_room_for_are_allowed_and_one_more_is_not(
            count in 1..5000_u32, vcpus in 1..16_u32, data: u64, copy: bool, resource in resource(), left: u64, others in 0..10_u32,
        ) {
            let mode = if copy { MemoryMode::Copy } else { MemoryMode::Cow };
            let each = Needs::of_fork(mode, vcpus, data);
            let promised = each.times(others);
            let supplies = [supply(resource, left)];
            if let Err(shortage) = check(count, each, promised, &supplies) {
                prop_assert!(shortage.needed > shortage.available);
                prop_assert!(shortage.room_for < u64::from(count));
                let fits = u32::try_from(shortage.room_for).unwrap();
                prop_assert_eq!(check(fits, each, promised, &supplies), Ok(()));
                prop_assert!(check(fits + 1, each, promised, &supplies).is_err());
            }
        }
    }
}
