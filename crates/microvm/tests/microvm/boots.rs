//! Booting, the console, pausing and resuming.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::guest;
use crate::vmm::{Vmm, definition};

const MIB: u64 = 1 << 20;

#[test]
fn a_guest_boots_prints_and_answers() {
    let vmm = Vmm::booted(64 * MIB);
    assert_eq!(vmm.state(), "Running");
    vmm.ask("p", "pong\n");
    let counters = vmm.get("vm.counters").body;
    assert_eq!(counters["serial"]["bytes_out"], "ready\npong\n".len());
    assert_eq!(counters["serial"]["bytes_in"], 1);
    assert!(counters["vcpu0"]["exits"].as_u64().unwrap() > 0);
}

#[test]
fn every_client_gets_the_output_from_when_it_connects_and_all_can_write() {
    let vmm = Vmm::booted(64 * MIB);
    let (mut one, mut other) = (vmm.attach(), vmm.attach());
    // An echo to each proves that both are connected.
    for (client, text) in [(&mut one, "x"), (&mut other, "y")] {
        client.write_all(text.as_bytes()).unwrap();
        client.read_exact(&mut [0]).unwrap();
    }
    one.write_all(b"p").unwrap();
    for client in [&mut one, &mut other] {
        let mut seen = Vec::new();
        while !seen.ends_with(b"pong\n") {
            let mut byte = [0];
            client.read_exact(&mut byte).unwrap();
            seen.push(byte[0]);
        }
    }
}

#[test]
fn input_of_many_fifos_arrives_whole_and_in_order() {
    let vmm = Vmm::booted(64 * MIB);
    // Digits and capitals that the guest only echoes.
    let sent: String = ('0'..='9').chain('B'..='G').cycle().take(3000).collect();
    assert!(vmm.ask(&sent, &sent).ends_with(&sent));
}

#[test]
fn input_of_a_client_that_hangs_up_at_once_arrives_whole() {
    let vmm = Vmm::booted(64 * MIB);
    let sent: String = ('0'..='9').cycle().take(20_000).collect();
    // In one piece in the socket's buffer; the first echo finds nobody who listens.
    drop(vmm.send(&sent));
    vmm.wait_for(&sent);
}

#[test]
fn a_client_that_only_stops_to_write_still_gets_the_answer() {
    let vmm = Vmm::booted(64 * MIB);
    let mut console = vmm.send("p");
    console.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answer = [0; 5];
    console.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong\n");
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on_when_resumed() {
    let vmm = Vmm::booted(64 * MIB);
    vmm.done("vm.pause", &Value::Null);
    assert_eq!(vmm.state(), "Paused");
    let console = vmm.send("p");
    while vmm.get("vm.counters").body["serial"]["bytes_in"] != 1 {}
    assert_eq!(vmm.console_log(), "ready\n");
    vmm.done("vm.resume", &Value::Null);
    vmm.wait_for("pong\n");
    drop(console);
}

#[test]
fn a_guest_that_never_rests_can_be_paused() {
    let vmm = Vmm::booted(64 * MIB);
    vmm.ask("b", "busy\n");
    for _ in 0..20 {
        vmm.done("vm.pause", &Value::Null);
        vmm.done("vm.resume", &Value::Null);
    }
}

#[test]
fn output_survives_pauses_at_any_moment() {
    let vmm = Vmm::booted(64 * MIB);
    let sent: String = ('0'..='9').cycle().take(2000).collect();
    let console = vmm.send(&sent);
    // An access to the port that was interrupted must neither be lost nor be done twice.
    while !vmm.console_log().contains(&sent) {
        vmm.done("vm.pause", &Value::Null);
        vmm.done("vm.resume", &Value::Null);
        assert!(
            vmm.console_log().len() <= "ready\n".len() + sent.len(),
            "{}",
            vmm.console_log()
        );
    }
    drop(console);
}

#[test]
fn memory_above_the_hole_is_there() {
    let vmm = Vmm::booted(5 << 30);
    vmm.ask("h", "kept\n");
    vmm.ask("H", "8877665544332211\n");
}

#[test]
fn a_second_vcpu_starts() {
    let vmm = Vmm::booted_with(64 * MIB, 2);
    vmm.ask("a", "up\n");
    vmm.ask("A", "second\n");
    assert!(vmm.get("vm.counters").body["vcpu1"]["exits"].as_u64().is_some());
}

#[test]
fn the_guest_finds_its_generation_and_a_clock() {
    let vmm = Vmm::booted(64 * MIB);
    vmm.ask("g", "000102030405060708090a0b0c0d0e0f\n");
    let printed = vmm.ask("k", "56434c4b");
    let printed = if printed.ends_with('\n') {
        printed
    } else {
        vmm.ask("p", "pong\n")
    };
    let clock = printed.lines().find(|line| line.starts_with("56434c4b")).unwrap();
    let clock = hex::decode(clock).unwrap();
    let seconds = u64::from_le_bytes(clock[72..80].try_into().unwrap());
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(
        (now - 300..=now).contains(&seconds),
        "{seconds} is not about {now}"
    );
}

#[test]
fn a_vm_that_was_shut_down_boots_anew() {
    let vmm = Vmm::booted(64 * MIB);
    vmm.ask("c", "counter 1\n");
    vmm.done("vm.shutdown", &Value::Null);
    assert_eq!(vmm.state(), "Created");
    vmm.done("vm.boot", &Value::Null);
    // The log goes on, and the counter begins anew.
    vmm.ask("c", "ready\ncounter 1\nready\ncounter 1\n");
}

#[test]
fn a_kernel_that_cannot_be_booted_is_refused_and_leaves_nothing() {
    let vmm = Vmm::start();
    let text = vmm.path().join("notes.txt");
    std::fs::write(&text, "no kernel").unwrap();
    let noteless = guest::write_elf_without_note(vmm.path());
    let truncated = vmm.path().join("truncated.elf");
    std::fs::write(&truncated, &std::fs::read(&noteless).unwrap()[..100]).unwrap();
    for (kernel, why) in [
        (
            Path::new("/nowhere/kernel"),
            "payload.kernel cannot be read: \"/nowhere/kernel\"",
        ),
        (vmm.path(), "payload.kernel cannot be read"),
        (&text, "is neither an ELF nor a bzImage"),
        (&noteless, "is an ELF without a PVH note"),
        (&truncated, "cannot be loaded"),
    ] {
        vmm.done("vm.create", &definition(kernel, 64 * MIB, 1));
        let reply = vmm.put("vm.boot", &Value::Null);
        assert_eq!(reply.status, 500);
        let lines: Vec<String> = serde_json::from_value(reply.body).unwrap();
        assert_eq!(
            lines[..4],
            [
                "Error from API",
                "The VM could not boot",
                "Cannot boot VM",
                "the kernel cannot be loaded"
            ]
        );
        assert!(lines[4].contains(why), "{lines:?}");
        assert_eq!(vmm.state(), "Created");
        assert!(!vmm.path().join("console.sock").exists());
        vmm.done("vm.delete", &Value::Null);
    }
}

#[test]
fn both_kinds_of_kernel_get_their_command_line_and_initrd() {
    let kernels: [fn(&Path) -> PathBuf; 2] =
        [guest::write_elf, |directory| guest::write_bzimage(directory, 1)];
    for kernel in kernels {
        let vmm = Vmm::start();
        let initrd = vmm.path().join("initrd");
        std::fs::write(&initrd, "a file system\0").unwrap();
        let mut definition = definition(&kernel(vmm.path()), 64 * MIB, 1);
        definition["payload"]["initramfs"] = json!(initrd);
        vmm.done("vm.create", &definition);
        vmm.done("vm.boot", &Value::Null);
        vmm.wait_for("ready\n");
        vmm.ask("m", "console=ttyS0\n");
        vmm.ask("i", "a file system\n");
        vmm.ask("p", "pong\n");
    }
}

#[test]
fn a_bzimage_without_a_64_bit_entry_or_without_room_is_refused() {
    for (xloadflags, memory, why) in [
        (0, 64 * MIB, "is a bzImage without a 64-bit entry point"),
        (
            1,
            2 * MIB,
            "the kernel needs memory up to 0x300000; below 3 GiB the VM has 0x200000 bytes",
        ),
    ] {
        let vmm = Vmm::start();
        vmm.done(
            "vm.create",
            &definition(&guest::write_bzimage(vmm.path(), xloadflags), memory, 1),
        );
        let reply = vmm.put("vm.boot", &Value::Null);
        assert!(reply.body[4].as_str().unwrap().contains(why), "{}", reply.body);
    }
}

#[test]
fn an_initrd_that_does_not_fit_is_refused() {
    let vmm = Vmm::start();
    let kernel = guest::write_elf(vmm.path());
    let initrd = vmm.path().join("initrd");
    std::fs::File::create(&initrd).unwrap().set_len(64 * MIB).unwrap();
    let mut definition = definition(&kernel, 32 * MIB, 1);
    definition["payload"]["initramfs"] = json!(initrd);
    vmm.done("vm.create", &definition);
    let reply = vmm.put("vm.boot", &Value::Null);
    assert!(
        reply.body.to_string().contains("67108864 bytes does not fit"),
        "{}",
        reply.body
    );
}
