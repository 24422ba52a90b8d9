//! Who the guest is, and what time it is: the generation page and the vmclock page in guest memory.
//!
//! A fork is a new machine: it gets a new generation id, and `vm_generation_counter` rises. Every restore disturbs the
//! clock: `disruption_marker` rises, and the time is given anew.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stencil_vmm_api::{GENERATION_GPA, VMCLOCK_GPA};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::memory::GuestRam;

/// A VM generation id: 16 bytes, written as 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation([u8; 16]);

/// A generation id that is none.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no generation id: 32 hexadecimal digits are right")]
pub(crate) struct GenerationError(String);

impl Generation {
    pub(crate) fn random() -> Self {
        Self(rand::random())
    }
}

impl FromStr for Generation {
    type Err = GenerationError;

    fn from_str(text: &str) -> Result<Self, GenerationError> {
        let mut bytes = [0; 16];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| GenerationError(text.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl Serialize for Generation {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Generation {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A reading of the guest's TSC and of UTC at the same instant.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClockReading {
    /// The guest's counter.
    pub(crate) tsc: u64,
    /// Since 1970-01-01 00:00:00 UTC.
    pub(crate) utc: Duration,
    /// The counter's frequency; `None` where KVM does not know it.
    pub(crate) tsc_khz: Option<u32>,
}

/// What the two pages say, apart from the time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    generation: Generation,
    vm_generation_counter: u64,
    disruption_marker: u64,
    seq_count: u32,
}

impl Identity {
    pub(crate) fn at_boot(generation: Generation) -> Self {
        Self {
            generation,
            vm_generation_counter: 1,
            disruption_marker: 1,
            seq_count: 0,
        }
    }

    /// After a restore as the machine with this id; another id than before makes it a fork.
    pub(crate) fn restored(mut self, machine: Option<Generation>) -> Self {
        self.disruption_marker = self.disruption_marker.wrapping_add(1);
        if let Some(generation) = machine.filter(|id| *id != self.generation) {
            self.generation = generation;
            self.vm_generation_counter = self.vm_generation_counter.wrapping_add(1);
        }
        // Even: no update is under way. The guest, which is stopped, cannot see one in between.
        self.seq_count = self.seq_count.wrapping_add(2);
        self
    }

    /// Writes both pages.
    pub(crate) fn write(&self, ram: &GuestRam, clock: ClockReading) -> io::Result<()> {
        ram.write(GENERATION_GPA, &self.generation.0)?;
        ram.write(VMCLOCK_GPA, self.vmclock(clock).as_bytes())
    }

    fn vmclock(&self, clock: ClockReading) -> Vmclock {
        let period = clock.tsc_khz.and_then(CounterPeriod::of_khz);
        let fraction = (u128::from(clock.utc.subsec_nanos()) << 64) / 1_000_000_000;
        Vmclock {
            magic: U32::new(MAGIC),
            size: U32::new(REGION_BYTES),
            version: U16::new(1),
            counter_id: if period.is_some() {
                COUNTER_X86_TSC
            } else {
                COUNTER_INVALID
            },
            time_type: TIME_UTC,
            seq_count: U32::new(self.seq_count),
            disruption_marker: U64::new(self.disruption_marker),
            flags: U64::new(FLAG_VM_GEN_COUNTER_PRESENT),
            pad: [0; 2],
            clock_status: STATUS_FREERUNNING,
            leap_second_smearing_hint: 0,
            tai_offset_sec: U16::ZERO,
            leap_indicator: 0,
            counter_period_shift: period.map_or(0, |period| period.shift),
            counter_value: U64::new(clock.tsc),
            counter_period_frac_sec: U64::new(period.map_or(0, |period| period.fraction)),
            counter_period_esterror_rate_frac_sec: U64::ZERO,
            counter_period_maxerror_rate_frac_sec: U64::ZERO,
            time_sec: U64::new(clock.utc.as_secs()),
            time_frac_sec: U64::new(u64::try_from(fraction).unwrap_or(u64::MAX)),
            time_esterror_nanosec: U64::ZERO,
            time_maxerror_nanosec: U64::ZERO,
            vm_generation_counter: U64::new(self.vm_generation_counter),
        }
    }
}

/// One tick of the counter, in units of 2^-(64 + shift) seconds, with as many significant bits as fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CounterPeriod {
    fraction: u64,
    shift: u8,
}

impl CounterPeriod {
    fn of_khz(khz: u32) -> Option<Self> {
        let hz = u128::from(khz) * 1000;
        // The largest shift with 2^(64 + shift) / hz still below 2^64.
        let shift = hz.checked_sub(1)?.checked_ilog2()?;
        let fraction = u64::try_from((1_u128 << (64 + shift)) / hz).ok()?;
        Some(Self {
            fraction,
            shift: u8::try_from(shift).ok()?,
        })
    }
}

const MAGIC: u32 = 0x4b4c_4356;
/// The page that the structure lies in.
const REGION_BYTES: u32 = 4096;
const COUNTER_X86_TSC: u8 = 1;
const COUNTER_INVALID: u8 = 0xff;
const TIME_UTC: u8 = 0;
const STATUS_FREERUNNING: u8 = 3;
const FLAG_VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;

/// `struct vmclock_abi` (Linux, include/uapi/linux/vmclock-abi.h), little-endian.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct Vmclock {
    magic: U32,
    size: U32,
    version: U16,
    counter_id: u8,
    time_type: u8,
    seq_count: U32,
    disruption_marker: U64,
    flags: U64,
    pad: [u8; 2],
    clock_status: u8,
    leap_second_smearing_hint: u8,
    tai_offset_sec: U16,
    leap_indicator: u8,
    counter_period_shift: u8,
    counter_value: U64,
    counter_period_frac_sec: U64,
    counter_period_esterror_rate_frac_sec: U64,
    counter_period_maxerror_rate_frac_sec: U64,
    time_sec: U64,
    time_frac_sec: U64,
    time_esterror_nanosec: U64,
    time_maxerror_nanosec: U64,
    vm_generation_counter: U64,
}

const _: () = assert!(size_of::<Vmclock>() == 112);

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity::at_boot("00112233445566778899aabbccddeeff".parse().unwrap())
    }

    #[test]
    fn a_restore_that_is_no_fork_keeps_the_generation() {
        for machine in [None, Some(identity().generation)] {
            let restored = identity().restored(machine);
            assert_eq!(restored.generation, identity().generation);
            assert_eq!(restored.vm_generation_counter, identity().vm_generation_counter);
            assert_ne!(restored.disruption_marker, identity().disruption_marker);
        }
    }

    #[test]
    fn a_fork_is_another_machine() {
        let fork = identity().restored(Some(Generation::random()));
        assert_ne!(fork.generation, identity().generation);
        assert_eq!(fork.vm_generation_counter, identity().vm_generation_counter + 1);
        assert_ne!(fork.disruption_marker, identity().disruption_marker);
        assert_ne!(fork.seq_count, identity().seq_count);
        assert_eq!(fork.seq_count % 2, 0);
    }

    #[test]
    fn a_second_of_ticks_is_a_second() {
        for khz in [1, 1000, 2_596_150, 4_294_967_295, 1_048_576] {
            let period = CounterPeriod::of_khz(khz).unwrap();
            let second = (u128::from(period.fraction) * u128::from(khz) * 1000) >> period.shift;
            let error = (1_u128 << 64) - second;
            assert!(error < 1 << 34, "{khz} kHz: off by {error} / 2^64 s");
        }
        assert_eq!(CounterPeriod::of_khz(0), None);
    }

    #[test]
    fn fields_lie_where_the_abi_has_them() {
        let clock = ClockReading {
            tsc: 7,
            utc: Duration::from_millis(1500),
            tsc_khz: Some(1_000_000),
        };
        let clock = identity().vmclock(clock);
        let bytes = clock.as_bytes();
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(&bytes[..4], b"VCLK");
        assert_eq!(
            (u64_at(16), u64_at(40), u64_at(72), u64_at(80), u64_at(104)),
            (1, 7, 1, 1 << 63, 1)
        );
        assert_eq!((bytes[10], bytes[34]), (1, 3));
    }
}
