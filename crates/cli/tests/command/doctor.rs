//! What `stencil doctor` tells of a host, and its exit code.

use serde_json::{Value, json};

use crate::stencil::{Done, command, done, place, place_vmms};

/// What it says with these VMMs; the directory has what passes for a microVM.
fn doctor(words: &[&str]) -> Done {
    let dir = tempfile::tempdir().unwrap();
    place_vmms(dir.path());
    place(dir.path(), "ch", "cloud-hypervisor v53.0");
    place(dir.path(), "old-ch", "cloud-hypervisor v28.0");
    place(dir.path(), "old-qemu", "QEMU emulator version 5.2.0");
    done(command(dir.path()).args(["doctor", "--data", "data"]).args(words))
}

fn finding(report: &Value, about: &str) -> Value {
    let findings = report["findings"].as_array().unwrap().iter();
    findings
        .clone()
        .find(|finding| finding["about"] == about)
        .unwrap_or(&Value::Null)
        .clone()
}

#[test]
fn doctor_says_whether_vms_can_run_and_exits_so() {
    // Whether this host has KVM or a QEMU is not the test's to say; that the answers agree is.
    let told = doctor(&["--json", "--microvm", "microvm"]);
    let report = told.json();
    let is_there = |about| finding(&report, about)["mark"] != json!("missing");
    let can_run = is_there("KVM") || is_there("qemu");
    assert_eq!(report["can_run_vms"], json!(can_run), "{told:?}");
    assert_eq!(told.code, if can_run { 0 } else { 1 }, "{told:?}");
    assert_eq!(finding(&report, "microvm")["mark"], json!("good"), "{told:?}");
    let person = doctor(&["--microvm", "microvm"]);
    assert_eq!(person.code, told.code);
    assert!(person.stdout.contains("microvm           0.1.0, "), "{person:?}");
    assert!(
        person.stdout.ends_with(if can_run {
            "\nVMs can run on this host\n"
        } else {
            "\nno VM can run on this host\n"
        }),
        "{person:?}"
    );
}

#[test]
fn doctor_says_what_is_wrong_with_each_vmm_and_what_would_be_right() {
    let told = doctor(&["--json", "--microvm", "nobody", "--cloud-hypervisor", "old-ch"]);
    let report = told.json();
    assert_eq!(
        (told.code, &report["can_run_vms"]),
        (1, &json!(false)),
        "{told:?}"
    );
    assert_eq!(told.stderr, "error: no VM can run on this host\n");
    let old = finding(&report, "cloud-hypervisor");
    assert_eq!(old["mark"], json!("missing"));
    assert!(
        old["fact"]
            .as_str()
            .unwrap()
            .contains("is version 28.0; this takes version 51 to 53"),
        "{old}"
    );
    assert!(
        finding(&report, "microvm")["advice"]
            .as_str()
            .unwrap()
            .contains("--microvm"),
        "{told:?}"
    );

    let report = doctor(&["--json", "--microvm", "nobody"]).json();
    let absent = finding(&report, "cloud-hypervisor");
    assert_eq!(absent["mark"], json!("missing"));
    assert!(
        absent["advice"].as_str().unwrap().contains("v51 to v53"),
        "{absent}"
    );

    let old = finding(
        &doctor(&["--json", "--microvm", "nobody", "--qemu", "old-qemu"]).json(),
        "qemu",
    );
    let told_of_it = old["fact"].as_str().unwrap();
    assert!(
        told_of_it.contains("is version 5.2.0; this takes version 7.2 and later"),
        "{old}"
    );

    // The server wants a microVM, whatever else there is.
    let told = doctor(&["--json", "--microvm", "nobody", "--cloud-hypervisor", "ch"]);
    let found = finding(&told.json(), "cloud-hypervisor");
    assert!(found["fact"].as_str().unwrap().starts_with("53.0, "), "{found}");
    assert_eq!(told.code, 1, "{told:?}");
}
