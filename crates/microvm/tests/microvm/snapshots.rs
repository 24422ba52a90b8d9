//! Snapshots, and restores from them in each way.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use serde_json::{Value, json};

use crate::guest::SCRATCH;
use crate::vmm::{Vmm, restore_request, url};

const MIB: u64 = 1 << 20;
const MODES: [&str; 3] = ["Copy", "Cow", "Uffd"];

/// What `vm.restore` refuses a snapshot for: the last line.
fn refusal(snapshot: &Path) -> String {
    let vmm = Vmm::start();
    let reply = vmm.put("vm.restore", &restore_request(snapshot, "Cow", None));
    assert_eq!(reply.status, 500, "{}", reply.body);
    assert_eq!(reply.body[1], "The VM could not be restored");
    assert_eq!(vmm.state(), "none");
    assert!(!vmm.path().join("console.sock").exists());
    reply
        .body
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn a_restored_guest_goes_on_where_it_stopped_and_is_told() {
    let source = Vmm::booted(64 * MIB);
    source.ask("cc", "counter 2\n");
    let snapshot = source.snapshot("s");
    for mode in MODES {
        let vmm = Vmm::restored(&snapshot, mode, None);
        assert_eq!(vmm.state(), "Paused");
        vmm.done("vm.resume", &Value::Null);
        vmm.wait_for("restored\n");
        assert_eq!(vmm.ask("c", "counter 3\n"), "restored\ncounter 3\n");
        let times = &vmm.get("vm.counters").body["restore"];
        assert!(times["total_us"].as_u64().unwrap() > 0, "{times}");
    }
    source.done("vm.resume", &Value::Null);
    assert_eq!(
        source.ask("c", "counter 3\n"),
        "ready\ncounter 1\ncounter 2\ncounter 3\n"
    );
}

#[test]
fn memory_ranges_has_its_data_at_the_right_place_and_holes_elsewhere() {
    let vmm = Vmm::booted(64 * MIB);
    vmm.ask("w", "written\n");
    let snapshot = vmm.snapshot("s");
    let file = snapshot.join("memory-ranges");
    let facts = fs::metadata(&file).unwrap();
    assert_eq!(facts.len(), 64 * MIB);
    assert!(
        facts.blocks() * 512 < MIB,
        "{} bytes on disk",
        facts.blocks() * 512
    );
    let memory = fs::read(&file).unwrap();
    for page in 0..16 {
        assert_eq!(memory[usize::try_from(SCRATCH + page * MIB).unwrap()], b'w');
    }
    let names: Vec<_> = fs::read_dir(&snapshot)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names.len(), 3, "{names:?}");
}

#[test]
fn a_snapshot_of_a_lazily_restored_vm_holds_what_it_read_and_what_it_wrote() {
    let source = Vmm::booted(64 * MIB);
    source.ask("w", "written\n");
    let first = source.snapshot("s");
    for mode in ["Cow", "Uffd"] {
        let fork = Vmm::restored(&first, mode, None);
        fork.done("vm.resume", &Value::Null);
        fork.ask("sZ", "kept\n");
        let second = fork.snapshot("s");
        let (before, after) = (
            fs::read(first.join("memory-ranges")).unwrap(),
            fs::read(second.join("memory-ranges")).unwrap(),
        );
        let at = |mib: u64| usize::try_from(SCRATCH + mib * MIB).unwrap();
        assert_eq!((before[at(0)], after[at(0)]), (b'w', b'Z'));
        // Never touched by the fork.
        assert!((1..16).all(|mib| after[at(mib)] == b'w'));
        for mode in MODES {
            let again = Vmm::restored(&second, mode, None);
            again.done("vm.resume", &Value::Null);
            again.ask("v", "value Z\n");
        }
    }
}

#[test]
fn two_forks_at_once_do_not_see_each_other_and_leave_the_file_as_it_is() {
    let source = Vmm::booted(64 * MIB);
    source.ask("w", "written\n");
    let snapshot = source.snapshot("s");
    let before = fs::read(snapshot.join("memory-ranges")).unwrap();
    let forks = [("x", "Cow"), ("y", "Cow"), ("z", "Uffd"), ("u", "Uffd")];
    let forks =
        forks.map(|(text, mode)| (text, Vmm::restored(&snapshot, mode, Some(&text_generation(text)))));
    for (text, fork) in &forks {
        fork.done("vm.resume", &Value::Null);
        fork.ask(&format!("s{text}"), "kept\n");
    }
    for (text, fork) in &forks {
        fork.ask("v", &format!("value {text}\n"));
        fork.ask("g", &format!("{}\n", text_generation(text)));
    }
    assert!(fs::read(snapshot.join("memory-ranges")).unwrap() == before);
}

fn text_generation(text: &str) -> String {
    hex::encode(text.repeat(16))
}

/// The vmclock page as the guest sees it.
fn clock(vmm: &Vmm) -> Vec<u8> {
    // The answer to `p` comes when that to `k` is complete.
    let printed = vmm.ask("kp", "pong\n");
    hex::decode(printed.lines().find(|line| line.starts_with("56434c4b")).unwrap()).unwrap()
}

#[test]
fn a_fork_is_a_new_machine_and_a_plain_restore_is_not() {
    let source = Vmm::booted(64 * MIB);
    let before = clock(&source);
    let snapshot = source.snapshot("s");
    let u64_at = |page: &[u8], at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
    let (disruption, generation) = (16, 104);
    for mode in MODES {
        let plain = Vmm::restored(&snapshot, mode, None);
        plain.done("vm.resume", &Value::Null);
        plain.ask("g", "000102030405060708090a0b0c0d0e0f\n");
        let after = clock(&plain);
        assert_eq!(u64_at(&after, generation), u64_at(&before, generation));
        assert_eq!(u64_at(&after, disruption), u64_at(&before, disruption) + 1);

        let id = "ffeeddccbbaa99887766554433221100";
        let fork = Vmm::restored(&snapshot, mode, Some(id));
        fork.done("vm.resume", &Value::Null);
        fork.ask("g", &format!("{id}\n"));
        let after = clock(&fork);
        assert_eq!(u64_at(&after, generation), u64_at(&before, generation) + 1);
        assert_eq!(u64_at(&after, disruption), u64_at(&before, disruption) + 1);
        assert_eq!(fork.get("vm.info").body["config"]["generation"], id);
        // And so is a fork of the fork.
        let again = Vmm::restored(
            &fork.snapshot("s"),
            mode,
            Some("0123456789abcdef0123456789abcdef"),
        );
        again.done("vm.resume", &Value::Null);
        assert_eq!(
            u64_at(&clock(&again), generation),
            u64_at(&before, generation) + 2
        );
    }
}

#[test]
fn input_that_waits_is_part_of_the_snapshot() {
    let source = Vmm::booted(64 * MIB);
    source.done("vm.pause", &Value::Null);
    let sent: String = ('0'..='9').cycle().take(1000).collect();
    let console = source.send(&sent);
    while source.get("vm.counters").body["serial"]["bytes_in"] != 1000 {}
    let directory = source.new_directory("s");
    source.done("vm.snapshot", &json!({"destination_url": url(&directory)}));
    drop(console);
    let vmm = Vmm::restored(&directory, "Cow", None);
    vmm.done("vm.resume", &Value::Null);
    vmm.wait_for("restored\n");
    let digits = |text: String| text.chars().filter(char::is_ascii_digit).collect::<String>();
    // What the guest says about the restore comes somewhere in between.
    while digits(vmm.console_log()).len() < sent.len() {
        vmm.get("vm.info");
    }
    assert_eq!(digits(vmm.console_log()), sent);
}

#[test]
fn memory_above_the_hole_comes_back() {
    let source = Vmm::booted(6 << 30);
    source.ask("h", "kept\n");
    let snapshot = source.snapshot("s");
    let facts = fs::metadata(snapshot.join("memory-ranges")).unwrap();
    assert_eq!(facts.len(), 6 << 30);
    assert!(facts.blocks() * 512 < MIB);
    for mode in MODES {
        let vmm = Vmm::restored(&snapshot, mode, None);
        vmm.done("vm.resume", &Value::Null);
        vmm.ask("H", "8877665544332211\n");
    }
}

#[test]
fn a_second_vcpu_lives_on() {
    let source = Vmm::booted_with(64 * MIB, 2);
    source.ask("a", "up\n");
    let snapshot = source.snapshot("s");
    for mode in MODES {
        let vmm = Vmm::restored(&snapshot, mode, None);
        vmm.done("vm.resume", &Value::Null);
        vmm.ask("A", "second\n");
    }
}

#[test]
fn a_second_vcpu_that_was_not_started_can_be_started_after_a_restore() {
    let snapshot = Vmm::booted_with(64 * MIB, 2);
    let directory = snapshot.snapshot("s");
    let vmm = Vmm::restored(&directory, "Cow", None);
    vmm.done("vm.resume", &Value::Null);
    vmm.ask("a", "up\n");
}

#[test]
fn restore_runs_at_once_and_makes_memory_resident_where_it_is_asked_to() {
    let source = Vmm::booted(64 * MIB);
    source.ask("w", "written\n");
    let snapshot = source.snapshot("s");
    for mode in ["Copy", "Cow"] {
        let vmm = Vmm::start();
        let mut request = restore_request(&snapshot, mode, None);
        request["resume"] = json!(true);
        request["prefault"] = json!(true);
        vmm.done("vm.restore", &request);
        assert_eq!(vmm.state(), "Running");
        vmm.wait_for("restored\n");
        let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", vmm.pid())).unwrap();
        let resident: u64 = rollup
            .lines()
            .find_map(|line| {
                line.strip_prefix("Rss:")?
                    .trim()
                    .strip_suffix(" kB")?
                    .parse()
                    .ok()
            })
            .unwrap();
        assert!(resident >= 64 << 10, "{mode}: {resident} KiB resident");
    }
}

#[test]
fn a_snapshot_never_overwrites_anything() {
    let vmm = Vmm::booted(64 * MIB);
    let directory = vmm.snapshot("s");
    let before = fs::read(directory.join("state.json")).unwrap();
    let reply = vmm.put("vm.snapshot", &json!({"destination_url": url(&directory)}));
    assert_eq!(reply.body[4], format!("Destination is not empty: {directory:?}"));
    assert_eq!(fs::read(directory.join("state.json")).unwrap(), before);
    let reply = vmm.put("vm.snapshot", &json!({"destination_url": "s"}));
    assert_eq!(
        reply.body[4],
        "\"s\" is not the URL of a directory; right is file:// and an absolute path"
    );
}

#[test]
fn a_snapshot_that_misses_a_file_is_refused() {
    let source = Vmm::booted(64 * MIB);
    assert!(refusal(&source.new_directory("empty")).contains("No such file"));
    for name in ["config.json", "state.json", "memory-ranges"] {
        source.put("vm.resume", &Value::Null);
        let snapshot = source.snapshot(&format!("without-{name}"));
        fs::remove_file(snapshot.join(name)).unwrap();
        let vmm = Vmm::start();
        let reply = vmm.put("vm.restore", &restore_request(&snapshot, "Cow", None));
        let path = format!("{:?} cannot be read", snapshot.join(name));
        assert_eq!(reply.body[3], path, "{}", reply.body);
    }
}

#[test]
fn a_truncated_memory_file_is_refused_with_both_sizes() {
    let source = Vmm::booted(64 * MIB);
    let snapshot = source.snapshot("s");
    let file = fs::OpenOptions::new()
        .write(true)
        .open(snapshot.join("memory-ranges"))
        .unwrap();
    file.set_len(64 * MIB - 4096).unwrap();
    let expected = format!(
        "{:?} has 67104768 bytes; its ranges have 67108864",
        snapshot.join("memory-ranges")
    );
    assert_eq!(refusal(&snapshot), expected);
}

#[test]
fn another_version_of_the_state_is_refused_as_such() {
    let source = Vmm::booted(64 * MIB);
    let snapshot = source.snapshot("s");
    let path = snapshot.join("state.json");
    let mut state: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    state["version"] = json!(2);
    let expected = format!("{path:?} has version 2; this VMM reads version 1");
    fs::write(&path, state.to_string()).unwrap();
    assert_eq!(refusal(&snapshot), expected);
    // Also where nothing else of it can be read.
    fs::write(&path, r#"{"version": 2}"#).unwrap();
    assert_eq!(refusal(&snapshot), expected);
}

#[test]
fn a_damaged_state_is_refused() {
    let source = Vmm::booted(64 * MIB);
    let snapshot = source.snapshot("s");
    let path = snapshot.join("state.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, &text[..text.len() / 2]).unwrap();
    assert!(
        refusal(&snapshot).contains("EOF while parsing"),
        "{}",
        refusal(&snapshot)
    );
    let mut state: Value = serde_json::from_str(&text).unwrap();
    state["memory_ranges"][0]["length"] = json!(4096);
    fs::write(&path, state.to_string()).unwrap();
    assert!(
        refusal(&snapshot).starts_with("state.json has memory at"),
        "{}",
        refusal(&snapshot)
    );
    state = serde_json::from_str(&text).unwrap();
    state["vcpus"] = json!([]);
    fs::write(&path, state.to_string()).unwrap();
    assert_eq!(refusal(&snapshot), "state.json has 0 vCPUs, config.json 1");
}

#[test]
fn ways_to_restore_that_are_not_there_are_refused() {
    let source = Vmm::booted(64 * MIB);
    let snapshot = source.snapshot("s");
    let vmm = Vmm::start();
    let reply = vmm.put("vm.restore", &restore_request(&snapshot, "OnDemand", None));
    assert_eq!(
        reply.body[3],
        "memory_restore_mode is OnDemand; right is Copy, Cow or Uffd"
    );
    let reply = vmm.put("vm.restore", &restore_request(&snapshot, "Cow", Some("short")));
    assert_eq!(
        reply.body[4],
        "\"short\" is no generation id: 32 hexadecimal digits are right"
    );
    assert_eq!(vmm.state(), "none");
}
