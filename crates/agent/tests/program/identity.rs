//! Epochs: what a guest is afterwards, and what happens where it cannot become that.

use stencil_agent::{EpochId, ExecError, ToGuest, ToHost};

use crate::host::{Agent, epoch, shell};

#[test]
fn an_epoch_makes_another_machine() {
    let agent = Agent::start();
    let mut host = agent.greet();
    for number in [1, 2] {
        host.epoch(number);
        let machine_id = format!("{number:02x}").repeat(16);
        assert_eq!(
            host.print("hostname; cat /etc/machine-id"),
            format!("fork-{number}\n{machine_id}\n")
        );
        // What comes next is shorter.
        host.print("echo and so on >>/etc/machine-id");
    }
}

#[test]
fn a_machine_id_that_cannot_be_written_is_laid_over() {
    let agent = Agent::start_with(&["--shared-kernel"], "mount -o remount,ro /etc");
    let mut host = agent.greet();
    for number in [3, 4] {
        host.epoch(number);
        let machine_id = format!("{number:02x}").repeat(16);
        assert_eq!(host.print("cat /etc/machine-id"), format!("{machine_id}\n"));
    }
}

#[test]
fn nothing_runs_before_the_first_epoch() {
    let agent = Agent::start();
    let mut host = agent.greet();
    assert_eq!(host.refused(shell("true")).0, ExecError::NoEpoch);
}

#[test]
fn an_epoch_whose_randomness_cannot_be_renewed_fails_and_nothing_runs() {
    // In a user namespace the kernel refuses it.
    let agent = Agent::start_with(&[], "true");
    let mut host = agent.greet();
    host.send(&ToGuest::Epoch(epoch(1)));
    match host.next() {
        ToHost::EpochFailed { id, why } => {
            assert_eq!(id, EpochId([1; 16]));
            assert!(
                why.starts_with("could not give the kernel fresh randomness: "),
                "{why}"
            );
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(host.refused(shell("true")).0, ExecError::NoEpoch);
    assert!(matches!(host.hello(), ToHost::Hello { epoch: None, .. }));
}

#[test]
fn an_identity_that_is_none_is_refused() {
    let agent = Agent::start();
    let mut host = agent.greet();
    let long = "x".repeat(65);
    for host_name in ["", "a b", "a\nb", "a/b", "ä", &long] {
        let mut epoch = epoch(1);
        epoch.host_name = host_name.to_owned();
        host.send(&ToGuest::Epoch(epoch));
        assert!(
            matches!(host.next(), ToHost::EpochFailed { why, .. } if why.contains("host name")),
            "{host_name}"
        );
    }
    let mut epoch = epoch(1);
    epoch.machine_id = [0; 16];
    host.send(&ToGuest::Epoch(epoch));
    assert!(matches!(host.next(), ToHost::EpochFailed { why, .. } if why.contains("machine id")));
}
