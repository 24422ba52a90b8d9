//! What a guest renews by itself in a new epoch, before its users' processes go on.

use stencil_agent::{EpochId, ExecError, ToGuest, ToHost};

use crate::host::{Agent, Host, epoch, shell};
use crate::skipped::skipped;

/// Puts a program into `/etc/stencil/fork.d`.
fn program(name: &str, script: &str) -> String {
    let path = format!("/etc/stencil/fork.d/{name}");
    format!("mkdir -p /etc/stencil/fork.d && printf '#!/bin/sh\\n{script}\\n' >{path} && chmod 755 {path}")
}

#[test]
fn programs_of_the_guest_run_once_in_each_epoch_in_the_order_of_their_names() {
    let prepare = [
        program("20-second", "echo second $STENCIL_NAME >>/run/ran; echo said"),
        program("10-first", "echo first >>/run/ran"),
        program("30-not.dpkg-new", "exit 1"),
        "echo exit 1 >/etc/stencil/fork.d/40-no-program".to_owned(),
    ];
    let agent = Agent::start_with(&["--shared-kernel"], &prepare.join(" && "));
    let mut host = agent.greet();
    host.epoch(1);
    assert_eq!(
        host.print("cat /run/ran /run/stencil/fork.d.log"),
        "first\nsecond fork-1\nsaid\n"
    );
    assert_eq!(
        host.print("cat /run/stencil/epoch"),
        format!("{}\n", "01".repeat(16))
    );
    // Told again it is for the time alone.
    host.epoch(1);
    assert_eq!(host.print("wc -l </run/ran"), "2\n");
    host.epoch(2);
    assert_eq!(host.print("wc -l </run/ran"), "4\n");
}

#[test]
fn an_epoch_in_which_a_program_fails_or_does_not_end_is_refused_with_its_words() {
    for (script, expected) in [
        (
            "echo no key server; exit 3",
            "/etc/stencil/fork.d/key ended with exit status: 3: no key server",
        ),
        (
            "sleep 1000",
            "/etc/stencil/fork.d/key did not end in time; all programs of /etc/stencil/fork.d together have 10 s",
        ),
    ] {
        let agent = Agent::start_with(&["--shared-kernel"], &program("key", script));
        let mut host = agent.greet();
        host.send(&ToGuest::Epoch(epoch(1)));
        match host.next() {
            ToHost::EpochFailed { id, why } => {
                assert_eq!(id, EpochId([1; 16]));
                assert_eq!(why, expected);
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(host.refused(shell("true")).0, ExecError::NoEpoch);
    }
}

#[test]
fn a_process_that_asks_for_it_is_told_and_nobody_can_ask_for_anothers() {
    let agent = Agent::start();
    let mut host = agent.greet();
    host.epoch(1);
    host.print(
        "(trap 'echo told >>/run/told' USR2; echo USR2 >/run/stencil/notify.d/$(exec sh -c 'echo $PPID'); touch /run/asked; \
         while :; do sleep 0.05; done) >/dev/null 2>&1 &
         until [ -e /run/asked ]; do sleep 0.05; done; echo KILL >/run/stencil/notify.d/1; echo >/run/stencil/notify.d/999999999",
    );
    host.epoch(2);
    host.print("until [ -e /run/told ]; do sleep 0.05; done");
    let script = "cat /run/told; ls /run/stencil/notify.d | wc -l; kill -9 $(ls /run/stencil/notify.d)";
    assert_eq!(host.print(script), "told\n1\n");
}

#[test]
fn a_warm_python_that_asks_to_be_told_has_other_random_numbers_after_it() {
    /// As docs/hypervisors.md has it.
    const WARM: &str = r#"
import os, random, signal, sys
random.seed(1)
signal.signal(signal.SIGUSR1, lambda *_: random.seed())
open(f"/run/stencil/notify.d/{os.getpid()}", "w").close()
open("/run/asked", "w").close()
for line in sys.stdin:
    print(random.random(), flush=True)
"#;
    if !std::process::Command::new("python3")
        .arg("--version")
        .output()
        .is_ok_and(|ran| ran.status.success())
    {
        skipped("there is no python3 in PATH");
        return;
    }
    // Two guests that are at the same point, as forks of one template are.
    let numbers = [1, 2].map(|number| {
        let agent = Agent::start();
        let mut host = agent.greet();
        host.epoch(9);
        host.print("mkfifo /run/in; touch /run/out");
        host.print(&format!(
            "(exec 3<>/run/in; exec python3 -c '{WARM}' <&3 >/run/out 2>/run/errors) &
             until [ -e /run/asked ] || [ -s /run/errors ]; do sleep 0.05; done; cat /run/errors"
        ));
        let number_of = |host: &mut Host, line: u32| {
            host.print(&format!(
                "echo >/run/in; until [ $(wc -l </run/out) -ge {line} ]; do sleep 0.05; done; sed -n {line}p /run/out"
            ))
        };
        let before = number_of(&mut host, 1);
        host.epoch(number);
        let after = number_of(&mut host, 2);
        host.print("kill -9 $(ls /run/stencil/notify.d)");
        (before, after)
    });
    assert_eq!(numbers[0].0, numbers[1].0, "both are warm in the same way");
    assert_ne!(numbers[0].1, numbers[1].1);
}
