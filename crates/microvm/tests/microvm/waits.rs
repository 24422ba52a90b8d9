//! A restored VM may wait, paused, for as long as its owner likes: no time passes in it.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use rustix::thread::{ClockId, clock_nanosleep_absolute};
use rustix::time::clock_gettime;
use serde_json::{Value, json};

use crate::vmm::{Vmm, url};

const MIB: u64 = 1 << 20;

/// The guest's own clocks, at about the same moment.
struct Clocks {
    /// The first vCPU's time stamp counter.
    ticks: u64,
    /// Whether it has the host's, which no VMM can change: on kvm-pvm, where a guest's ring 3 runs natively.
    ticks_are_the_hosts: bool,
    /// kvmclock.
    kvmclock: Duration,
    /// What is left of the LAPIC's timer.
    timer: Duration,
    /// How many restore interrupts there were.
    notices: u64,
}

impl Clocks {
    fn read(vmm: &Vmm) -> Self {
        let earliest = host_ticks();
        // What the guest does not know it echoes.
        let printed = vmm.ask("TKLn!\n", "!\n");
        let numbers: Vec<u64> = printed.lines().filter_map(number).collect();
        let [ticks, kvmclock, timer, notices] = numbers[..] else {
            panic!("{printed}");
        };
        Self {
            ticks,
            ticks_are_the_hosts: (earliest..host_ticks()).contains(&ticks),
            kvmclock: Duration::from_nanos(kvmclock),
            timer: Duration::from_nanos(128 * timer),
            notices,
        }
    }
}

fn host_ticks() -> u64 {
    // SAFETY: every CPU with KVM has the counter.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A line with 8 bytes.
fn number(line: &str) -> Option<u64> {
    let bytes: [u8; 8] = hex::decode(line).ok()?.try_into().ok()?;
    Some(u64::from_le_bytes(bytes))
}

/// The vmclock page, as the guest sees it.
struct Page {
    bytes: Vec<u8>,
}

impl Page {
    fn read(vmm: &Vmm) -> Self {
        let printed = vmm.ask("kp", "pong\n");
        let line = printed.lines().find(|line| line.starts_with("56434c4b")).unwrap();
        Self {
            bytes: hex::decode(line).unwrap(),
        }
    }

    fn number(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().unwrap())
    }

    /// UTC when it was written.
    fn utc(&self) -> SystemTime {
        let nanoseconds = (u128::from(self.number(80)) * 1_000_000_000) >> 64;
        SystemTime::UNIX_EPOCH
            + Duration::from_secs(self.number(72))
            + Duration::from_nanos(nanoseconds.try_into().unwrap())
    }

    /// So many ticks of the time stamp counter, as a time.
    fn time(&self, ticks: u64) -> Duration {
        let (fraction, shift) = (self.number(48), self.bytes[39]);
        let nanoseconds = (u128::from(ticks) * u128::from(fraction >> 32) * 1_000_000_000) >> (32 + shift);
        Duration::from_nanos(nanoseconds.try_into().unwrap())
    }
}

/// Returns when the host's clock has gone on by `time`.
fn pass(time: Duration) {
    let mut mark = clock_gettime(ClockId::Monotonic);
    let nanoseconds = mark.tv_nsec + i64::from(time.subsec_nanos());
    mark.tv_sec += i64::try_from(time.as_secs()).unwrap() + nanoseconds / 1_000_000_000;
    mark.tv_nsec = nanoseconds % 1_000_000_000;
    while clock_nanosleep_absolute(ClockId::Monotonic, &mark).is_err() {}
}

/// A VM with two vCPUs and a timer that runs, its clocks, when they were read, and a snapshot of it.
fn source() -> (Vmm, Clocks, Instant, std::path::PathBuf) {
    let source = Vmm::booted_with(64 * MIB, 2);
    source.ask("al", "up\n");
    let read = Instant::now();
    let clocks = Clocks::read(&source);
    assert_eq!(clocks.notices, 0);
    let snapshot = source.snapshot("s");
    (source, clocks, read, snapshot)
}

/// Lets `vmm` wait, longer than all else has taken since `read`, and run; its clocks must not have gone on meanwhile.
fn check_that_no_time_passes(vmm: &Vmm, before: &Clocks, read: Instant) {
    let restored = Instant::now();
    pass(restored.duration_since(read) + Duration::from_secs(1));
    let waited = restored.elapsed();
    let utc = SystemTime::now();
    vmm.done("vm.resume", &Value::Null);
    vmm.wait_for("restored\n");
    let resumed = SystemTime::now();
    let after = Clocks::read(vmm);
    let most = read.elapsed() - waited;

    let page = Page::read(vmm);
    assert!((utc..=resumed).contains(&page.utc()), "{:?}", page.utc());
    assert!((before.ticks..after.ticks).contains(&page.number(40)));

    if !before.ticks_are_the_hosts {
        // The counter's frequency is known to the kHz.
        let went_on = page.time(after.ticks - before.ticks);
        assert!(went_on < most + most / 100, "TSC: {went_on:?} of {most:?}");
    }
    let went_on = after.kvmclock.checked_sub(before.kvmclock).unwrap();
    assert!(went_on < most, "kvmclock: {went_on:?} of {most:?}");
    let went_on = before.timer.checked_sub(after.timer).unwrap();
    assert!(went_on < most, "LAPIC timer: {went_on:?} of {most:?}");

    let printed = vmm.ask("AS?\n", "?\n");
    let second = printed.lines().filter_map(number).next_back().unwrap();
    assert!(second > before.ticks);
    if !before.ticks_are_the_hosts {
        let went_on = page.time(second - before.ticks);
        let most = read.elapsed() - waited;
        assert!(went_on < most + most / 100, "second TSC: {went_on:?} of {most:?}");
    }

    // No other restore interrupt came later.
    assert_eq!(after.notices, 1);
    let printed = vmm.ask("n;\n", ";\n");
    assert_eq!(printed.lines().filter_map(number).next_back(), Some(1));
    assert_eq!(printed.matches("restored\n").count(), 1);
}

fn machine(snapshot: &Path) -> [Value; 2] {
    let text = std::fs::read(snapshot.join("state.json")).unwrap();
    let mut state: Value = serde_json::from_slice(&text).unwrap();
    [state["machine"].take(), state["vcpus"].take()]
}

#[test]
fn no_time_passes_in_a_vm_that_waits_after_its_restore() {
    let (_source, before, read, snapshot) = source();
    for mode in ["Cow", "Uffd"] {
        let vmm = Vmm::restored(&snapshot, mode, Some("ffeeddccbbaa99887766554433221100"));
        check_that_no_time_passes(&vmm, &before, read);
    }
}

#[test]
fn a_vm_that_never_ran_is_saved_as_it_was_restored() {
    let (_source, before, read, first) = source();
    let waiting = Vmm::restored(&first, "Cow", Some("ffeeddccbbaa99887766554433221100"));
    let second = waiting.new_directory("s");
    waiting.done("vm.snapshot", &json!({"destination_url": url(&second)}));
    assert!(machine(&second) == machine(&first));
    let vmm = Vmm::restored(&second, "Cow", None);
    check_that_no_time_passes(&vmm, &before, read);
    vmm.ask("g", "ffeeddccbbaa99887766554433221100\n");
    // And it can still run itself.
    check_that_no_time_passes(&waiting, &before, read);
}

#[test]
fn input_that_comes_while_a_restored_vm_waits_is_read_when_it_runs() {
    let source = Vmm::booted(64 * MIB);
    let snapshot = source.snapshot("s");
    let vmm = Vmm::restored(&snapshot, "Cow", None);
    let console = vmm.send("p");
    let deadline = Instant::now() + Duration::from_secs(20);
    while vmm.get("vm.counters").body["serial"]["bytes_in"] != 1 {
        assert!(Instant::now() < deadline, "the input does not arrive");
    }
    vmm.done("vm.resume", &Value::Null);
    vmm.wait_for("restored\n");
    vmm.wait_for("pong\n");
    drop(console);
}

#[test]
fn the_counters_say_when_a_vm_first_ran_and_only_once_it_has() {
    let source = Vmm::booted(64 * MIB);
    let vmm = Vmm::restored(&source.snapshot("s"), "Cow", None);
    let ran = |vmm: &Vmm| vmm.get("vm.counters").body["run"].take();
    let now = || {
        let now = clock_gettime(ClockId::Monotonic);
        u64::try_from(now.tv_sec * 1_000_000_000 + now.tv_nsec).ok()
    };
    assert_eq!(ran(&vmm), json!({}));
    let earliest = now();
    vmm.done("vm.resume", &Value::Null);
    vmm.wait_for("restored\n");
    let latest = now();
    let first = ran(&vmm);
    let (resume, exit) = (first["first_resume_ns"].as_u64(), first["first_exit_ns"].as_u64());
    assert!(earliest < resume && resume < exit && exit < latest, "{first}");
    vmm.done("vm.pause", &Value::Null);
    vmm.done("vm.resume", &Value::Null);
    vmm.ask("p", "pong\n");
    assert_eq!(ran(&vmm), first);
}

#[test]
fn only_a_restored_vm_is_told_of_a_restore() {
    let vmm = Vmm::booted(64 * MIB);
    vmm.done("vm.pause", &Value::Null);
    vmm.done("vm.resume", &Value::Null);
    assert_eq!(Clocks::read(&vmm).notices, 0);
    let vmm = Vmm::restored(&vmm.snapshot("s"), "Cow", None);
    vmm.done("vm.resume", &Value::Null);
    vmm.wait_for("restored\n");
    vmm.done("vm.pause", &Value::Null);
    vmm.done("vm.resume", &Value::Null);
    assert_eq!(Clocks::read(&vmm).notices, 1);
}
