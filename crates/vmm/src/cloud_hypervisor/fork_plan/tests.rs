//! Snapshots before and after: one recorded from Cloud Hypervisor v53.0, and one that is made up, with two regions of
//! memory and with devices.

use insta::assert_snapshot;
use serde_json::{Value, json};

use super::*;

const RECORDED_CONFIG: &str = include_str!("../../../tests/fixtures/cloud-hypervisor/config.json");
const RECORDED_STATE: &str = include_str!("../../../tests/fixtures/cloud-hypervisor/state.json");
const DEVICES_CONFIG: &str = include_str!("../../../tests/fixtures/cloud-hypervisor/devices.config.json");
const TWO_REGIONS_STATE: &str =
    include_str!("../../../tests/fixtures/cloud-hypervisor/two-regions.state.json");

const MEMORY_MANAGER: &str = "/snapshots/memory-manager/snapshot_data/state";
const GIB: u64 = 1 << 30;

fn plan(memory: Memory<'static>) -> ForkPlan<'static> {
    ForkPlan {
        memory,
        memory_bytes: 4 * GIB,
        vsock_socket: "vsock.sock",
        taps: [("_net0", "tap-fork")].into(),
    }
}

fn mapped() -> ForkPlan<'static> {
    plan(Memory::Map("/data/template/memory-ranges"))
}

fn value(json: &[u8]) -> Value {
    serde_json::from_slice(json).unwrap()
}

fn memory_of(state: &Value) -> Value {
    value(
        state
            .pointer(MEMORY_MANAGER)
            .unwrap()
            .as_str()
            .unwrap()
            .as_bytes(),
    )
}

/// What of two values differs, each place on lines of its own.
fn differences(before: &Value, after: &Value) -> String {
    let mut told = String::new();
    compare("", before, after, &mut told);
    told
}

fn compare(place: &str, before: &Value, after: &Value, told: &mut String) {
    let inner = match (before, after) {
        (Value::Object(_), Value::Object(_)) => {
            let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            let mut all = keys(before);
            all.extend(keys(after).into_iter().filter(|key| before.get(key).is_none()));
            all
        }
        (Value::Array(b), Value::Array(a)) if b.len() == a.len() => {
            (0..a.len()).map(|i| i.to_string()).collect()
        }
        _ => {
            if before != after {
                *told += &format!("{place}\n  - {before}\n  + {after}\n");
            }
            return;
        }
    };
    for key in inner {
        let place = format!("{place}/{key}");
        let at = |value: &Value| value.pointer(&format!("/{key}")).cloned().unwrap_or_default();
        compare(&place, &at(before), &at(after), told);
    }
}

/// Applies the plan; what it changed in the configuration, in the memory's state, and, which must be nothing, elsewhere.
fn changes(plan: &ForkPlan<'_>, config: &str, state: &str) -> String {
    let rewritten = plan.apply(config.as_bytes(), state.as_bytes()).unwrap();
    let (before, mut after) = (value(state.as_bytes()), value(&rewritten.state));
    let memory = differences(&memory_of(&before), &memory_of(&after));
    *after.pointer_mut(MEMORY_MANAGER).unwrap() = before.pointer(MEMORY_MANAGER).unwrap().clone();
    assert!(before == after, "more than the memory's state is changed");
    let config = differences(&value(config.as_bytes()), &value(&rewritten.config));
    format!(
        "config.json\n{config}\nmemory manager in state.json\n{memory}\nnot mapped because: {:?}\n",
        rewritten.not_mapped
    )
}

#[test]
fn the_recorded_snapshot_is_mapped() {
    assert_snapshot!(changes(&mapped(), RECORDED_CONFIG, RECORDED_STATE));
}

#[test]
fn the_recorded_snapshot_is_copied() {
    assert_snapshot!(changes(&plan(Memory::Read), RECORDED_CONFIG, RECORDED_STATE));
}

#[test]
fn two_regions_and_devices_are_mapped() {
    assert_snapshot!(changes(&mapped(), DEVICES_CONFIG, TWO_REGIONS_STATE));
}

#[test]
fn two_regions_and_devices_are_copied() {
    assert_snapshot!(changes(&plan(Memory::Read), DEVICES_CONFIG, TWO_REGIONS_STATE));
}

#[test]
fn two_regions_and_devices_are_served() {
    assert_snapshot!(changes(&plan(Memory::Serve), DEVICES_CONFIG, TWO_REGIONS_STATE));
}

#[test]
fn what_a_migration_says_of_a_vm_has_its_definition_its_cpuid_and_its_memory() {
    let rewritten = plan(Memory::Serve)
        .apply(RECORDED_CONFIG.as_bytes(), RECORDED_STATE.as_bytes())
        .unwrap();
    let state = State::read(&rewritten.state).unwrap();
    let said = value(&state.migration_config(&rewritten.config).unwrap());
    assert_eq!(said["vm_config"], value(&rewritten.config));
    assert_eq!(said["memory_manager_data"], memory_of(&value(&rewritten.state)));
    assert_eq!(said["common_cpuid"][0]["ebx"], 1_752_462_657);
    let without = state_with(|_| ()).replace("common_cpuid", "other");
    let state = State::read(without.as_bytes()).unwrap();
    let error = state.migration_config(&rewritten.config).unwrap_err();
    assert_snapshot!(error, @"state.json has no CPUID of the VM in it");
}

#[test]
fn the_files_as_they_are_written() {
    let rewritten = mapped()
        .apply(DEVICES_CONFIG.as_bytes(), TWO_REGIONS_STATE.as_bytes())
        .unwrap();
    let pretty = |json| serde_json::to_string_pretty(&value(json)).unwrap();
    assert_snapshot!(format!(
        "{}\n{}",
        pretty(&rewritten.config),
        pretty(&rewritten.state)
    ));
}

#[test]
fn a_fork_s_own_snapshot_is_copied_without_the_template_s_file() {
    let first = mapped()
        .apply(RECORDED_CONFIG.as_bytes(), RECORDED_STATE.as_bytes())
        .unwrap();
    let config = String::from_utf8(first.config).unwrap();
    assert!(config.contains("/data/template/memory-ranges"));
    let second = plan(Memory::Read)
        .apply(config.as_bytes(), RECORDED_STATE.as_bytes())
        .unwrap();
    assert!(
        !String::from_utf8(second.config)
            .unwrap()
            .contains("memory-ranges")
    );
}

/// The recorded configuration with one field changed.
fn config_with(place: &str, field: &str, content: Value) -> String {
    let mut config = value(RECORDED_CONFIG.as_bytes());
    config.pointer_mut(place).unwrap()[field] = content;
    config.to_string()
}

/// The recorded state with its memory manager changed.
fn state_with(change: impl FnOnce(&mut Value)) -> String {
    let mut state = value(RECORDED_STATE.as_bytes());
    let mut memory = memory_of(&state);
    change(&mut memory);
    *state.pointer_mut(MEMORY_MANAGER).unwrap() = memory.to_string().into();
    state.to_string()
}

fn refusal(config: &str) -> String {
    mapped()
        .apply(config.as_bytes(), RECORDED_STATE.as_bytes())
        .unwrap_err()
        .to_string()
}

#[test]
fn devices_that_two_vms_cannot_both_have_are_refused_by_name() {
    let devices = [
        (
            "fs",
            json!([{"id": "myfs", "tag": "home", "socket": "/run/fs.sock"}]),
        ),
        (
            "generic_vhost_user",
            json!([{"id": "gpu", "socket": "/run/gpu.sock"}]),
        ),
        (
            "devices",
            json!([{"id": "nic", "path": "/sys/bus/pci/devices/0000:01:00.0"}]),
        ),
        ("user_devices", json!([{"socket": "/run/user.sock"}])),
        ("vdpa", json!([{"id": "vdpa0", "path": "/dev/vhost-vdpa-0"}])),
        ("ivshmem", json!({"path": "/dev/shm/window", "size": 128})),
        ("tpm", json!({"socket": "/run/swtpm.sock"})),
        ("pmem", json!([{"id": "store", "file": "/images/store.img"}])),
        ("disks", json!([{"id": "data", "path": "/images/data.img"}])),
        (
            "disks",
            json!([{"id": "_disk0", "vhost_user": true, "vhost_socket": "/run/blk.sock"}]),
        ),
        ("net", json!([{"id": "lan", "tap": "tap0"}])),
        ("net", json!([{"id": "_net0", "vhost_user": true}])),
    ];
    let told: Vec<String> = devices
        .into_iter()
        .map(|(field, device)| refusal(&config_with("", field, device)))
        .collect();
    assert_snapshot!(told.join("\n"));
    assert!(!told.join("").contains('/'), "a path of the host is told");
}

#[test]
fn memory_that_is_shared_with_others_is_refused() {
    let mut config = value(config_with("/memory/zones/0", "shared", true.into()).as_bytes());
    config["memory"]["zones"][0]["file"] = "/dev/shm/guest".into();
    assert_snapshot!(refusal(&config.to_string()), @"its device memory zone mem0 cannot be brought back: its file is shared with other programs and not in the snapshot; create the VM without it");
}

#[test]
fn what_cannot_be_mapped_is_copied_and_the_reason_told() {
    let zone = "/memory/zones/0";
    let configs = [
        config_with("", "balloon", json!({"size": 0})),
        config_with("/memory", "hugepages", true.into()),
        config_with(zone, "hugepages", true.into()),
        config_with("/memory", "hotplug_size", GIB.into()),
        config_with(zone, "hotplug_size", GIB.into()),
        config_with(zone, "shared", true.into()),
        config_with(zone, "id", "other".into()),
        config_with("/memory", "zones", Value::Null),
    ];
    let states = [
        state_with(|memory| memory["guest_ram_mappings"][0]["virtio_mem"] = true.into()),
        state_with(|memory| memory["memory_ranges"]["data"][0]["gpa"] = 4096.into()),
        state_with(|memory| memory["memory_ranges"]["data"][0]["length"] = 4096.into()),
        state_with(|memory| memory["guest_ram_mappings"][0]["size"] = u64::MAX.into()),
    ];
    let snapshots = (configs.iter().map(|config| (config.as_str(), RECORDED_STATE)))
        .chain(states.iter().map(|state| (RECORDED_CONFIG, state.as_str())));
    let mut told = String::new();
    for (config, state) in snapshots {
        let rewritten = mapped().apply(config.as_bytes(), state.as_bytes()).unwrap();
        told += &format!("{}\n", rewritten.not_mapped.expect("it is not mapped"));
        let (before, after) = (value(state.as_bytes()), value(&rewritten.state));
        assert_eq!(
            memory_of(&before),
            memory_of(&after),
            "it is read as it was written"
        );
        assert!(
            !String::from_utf8(rewritten.config)
                .unwrap()
                .contains("/data/template")
        );
    }
    assert_snapshot!(told);
}

#[test]
fn a_memory_file_that_is_cut_off_is_refused_in_both_modes() {
    for memory in [
        Memory::Read,
        Memory::Map("/data/template/memory-ranges"),
        Memory::Serve,
    ] {
        let short = ForkPlan {
            memory_bytes: (128 << 20) - 1,
            ..plan(memory)
        };
        let error = short
            .apply(RECORDED_CONFIG.as_bytes(), RECORDED_STATE.as_bytes())
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "memory-ranges has 134217727 bytes and the VM's memory 134217728; the snapshot is cut off"
        );
    }
}

#[test]
fn files_that_are_no_snapshot_are_refused_by_name() {
    let told: Vec<String> = [
        ("{", RECORDED_STATE),
        ("[]", RECORDED_STATE),
        (RECORDED_CONFIG, "nonsense"),
        (RECORDED_CONFIG, "{}"),
        (
            RECORDED_CONFIG,
            r#"{"snapshots":{"memory-manager":{"snapshot_data":{"state":"{}"}}}}"#,
        ),
    ]
    .map(|(config, state)| {
        mapped()
            .apply(config.as_bytes(), state.as_bytes())
            .unwrap_err()
            .to_string()
    })
    .into();
    assert_snapshot!(told.join("\n"), @r"
    config.json is not what Cloud Hypervisor v51 to v53 writes
    config.json is not what Cloud Hypervisor v51 to v53 writes
    state.json is not what Cloud Hypervisor v51 to v53 writes
    state.json has no memory manager in it
    state.json is not what Cloud Hypervisor v51 to v53 writes
    ");
}
