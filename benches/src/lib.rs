//! What the benchmarks of Stencil share.
//!
//! `cargo bench -p stencil-benches` runs them, `cargo bench -p stencil-benches --bench store` one of them:
//!
//! | bench | measures |
//! |---|---|
//! | `kvm_floor` | what the kernel alone takes for a fork: [`kvm_floor`] |
//! | `fork` | forks by the engine in process, with the real VMM and the test guest |
//! | `page_serving` | pages served one by one, in groups, ahead; pages of a mapped file |
//! | `store` | the store and the state of instances, as their number grows |
//!
//! The binary `kvm-floor` prints each single run of the first as JSON; `cargo xtask bench fork` holds the real server
//! against it.

pub mod kvm_floor;

/// The sizes of guests' memory, in bytes, for which forks are measured. The largest is sparse.
pub const MEMORY_SIZES: [u64; 4] = [128 << 20, 512 << 20, 2 << 30, 8 << 30];

/// A size in bytes for people, such as `512 MiB`.
#[must_use]
pub fn size_name(bytes: u64) -> String {
    match bytes >> 20 {
        mebibytes if mebibytes >= 1024 => format!("{} GiB", mebibytes >> 10),
        mebibytes => format!("{mebibytes} MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_the_unit_that_people_use() {
        assert_eq!(
            MEMORY_SIZES.map(size_name),
            ["128 MiB", "512 MiB", "2 GiB", "8 GiB"]
        );
    }
}
