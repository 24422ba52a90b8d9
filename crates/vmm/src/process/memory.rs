//! What a process's memory takes of the host's, from `/proc/<pid>/smaps_rollup`.

use std::fs;

use super::ProcessError;

/// What a process's memory takes of the host's; all in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Proportional set size: each shared page counts for its part. The sum over all VMMs is what they take.
    pub pss: u64,
    /// Pages that nobody else has mapped, clean and dirty: what would be free without this process.
    pub private: u64,
    /// Pages that others have mapped too, clean and dirty: for a fork, what it shares with its template's.
    pub shared: u64,
    /// Resident set size: all pages that are mapped.
    pub rss: u64,
}

impl MemoryUse {
    pub(super) fn of(pid: u32) -> Result<Self, ProcessError> {
        let path = format!("/proc/{pid}/smaps_rollup");
        match fs::read_to_string(&path) {
            Ok(rollup) => Self::parse(&rollup).ok_or(ProcessError::Malformed { path }),
            Err(source) => Err(ProcessError::Read { path, source }),
        }
    }

    /// Lines such as `Private_Dirty:      4212 kB`, below one of addresses.
    fn parse(rollup: &str) -> Option<Self> {
        let bytes = |name: &str| -> Option<u64> {
            let value = rollup
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()?
                .checked_mul(1024)
        };
        Some(Self {
            pss: bytes("Pss")?,
            private: bytes("Private_Clean")?.checked_add(bytes("Private_Dirty")?)?,
            shared: bytes("Shared_Clean")?.checked_add(bytes("Shared_Dirty")?)?,
            rss: bytes("Rss")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROLLUP: &str = "\
00400000-7ffd8a1c6000 ---p 00000000 00:00 0                              [rollup]
Rss:              540672 kB
Pss:                1031 kB
Pss_Dirty:           900 kB
Pss_Anon:            800 kB
Shared_Clean:     539000 kB
Shared_Dirty:         72 kB
Private_Clean:       100 kB
Private_Dirty:      1500 kB
Referenced:       540672 kB
";

    #[test]
    fn a_rollup_is_read_in_bytes() {
        let kib = 1024;
        let expected = MemoryUse {
            pss: 1031 * kib,
            private: 1600 * kib,
            shared: 539_072 * kib,
            rss: 540_672 * kib,
        };
        assert_eq!(MemoryUse::parse(ROLLUP), Some(expected));
    }

    #[test]
    fn a_rollup_without_a_field_is_malformed() {
        assert_eq!(
            MemoryUse::parse(&ROLLUP.replace("Shared_Dirty", "Shared_Other")),
            None
        );
        assert_eq!(MemoryUse::parse(""), None);
    }
}
