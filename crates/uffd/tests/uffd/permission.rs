//! Who may serve memory.

use std::os::unix::process::CommandExt as _;
use std::sync::Arc;

use stencil_uffd::{PageServer, StartError, UserfaultError};

use crate::support::{Image, Ram, again, alone};

#[test]
#[ignore = "run by the test below, as another user"]
fn says_whether_it_may() {
    let image = Image::new(4);
    let ram = Ram::new(image.pages);
    match PageServer::start(&[ram.mapping()], Arc::new(image.open()), alone(), |_| ()) {
        Ok(_) => println!("permitted"),
        Err(StartError::Userfault(refused @ UserfaultError::NotPermitted(_))) => {
            println!("refused: {refused}")
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn a_user_without_permission_is_told_which_knobs_there_are() {
    // Only root can become nobody, and where the program is not readable to nobody there is nothing to see.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let program = tempfile::tempdir().unwrap();
    let copy = program.path().join("test");
    std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
    std::fs::set_permissions(
        program.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let output = again("permission::says_whether_it_may", |command| {
        *command = std::process::Command::new(&copy);
        command.args([
            "--exact",
            "permission::says_whether_it_may",
            "--ignored",
            "--nocapture",
        ]);
        command.uid(65534).gid(65534);
    });
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    let open = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd")
        .unwrap()
        .trim()
        == "1";
    let device = std::fs::metadata("/dev/userfaultfd")
        .is_ok_and(|device| std::os::unix::fs::PermissionsExt::mode(&device.permissions()) & 0o006 == 0o006);
    if open || device {
        assert!(said.contains("permitted"), "{said}");
    } else {
        for knob in [
            "/dev/userfaultfd",
            "vm.unprivileged_userfaultfd",
            "CAP_SYS_PTRACE",
        ] {
            assert!(said.contains(knob), "{said}");
        }
    }
}
