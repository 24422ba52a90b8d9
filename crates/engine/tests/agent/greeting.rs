//! Armed forks of an emulated guest, which have run until their agents answered a greeting.

use stencil_agent::{ToGuest, ToHost};
use stencil_core::State;
use stencil_engine::ForkRequest;

use super::guest::Guest;
use super::{Guests, house, template};
use crate::scripted::House;
use crate::within;

async fn until_armed(house: &House) {
    within(async {
        while house.engine.get("warm").await.unwrap().armed.unwrap().ready != 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A guest of an armed fork that has been greeted.
async fn greeted(house: &House, guests: &mut Guests) -> Guest {
    house.engine.arm("warm", Some(1)).await.unwrap();
    let mut guest = Guest::next(guests).await;
    assert_eq!(guest.hear().await, ToGuest::Hello);
    guest
}

/// What was done to VMMs since then.
fn done(house: &House, since: usize) -> Vec<String> {
    house.hypervisor.calls().split_off(since)
}

#[tokio::test]
async fn an_armed_fork_of_an_emulated_guest_has_run_until_its_agent_answered_and_is_told_who_it_is_when_it_is_taken()
 {
    let (house, mut guests) = house().await;
    house.hypervisor.emulate();
    template(&house, &mut guests, "warm").await;
    let before = house.hypervisor.calls().len();
    let mut guest = greeted(&house, &mut guests).await;
    let until_answered = ["spawn", "restore", "without hot pages", "resume"];
    assert_eq!(done(&house, before), until_answered);
    assert_eq!(house.engine.get("warm").await.unwrap().armed.unwrap().ready, 0);
    let (epoch, frozen) = (None, true);
    guest.say(ToHost::Hello { epoch, frozen }).await;
    until_armed(&house).await;
    assert_eq!(done(&house, before)[until_answered.len()..], ["pause"]);

    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.fork("warm", None, ForkRequest::default()).await });
    // By the connection that is there.
    let epoch = guest.take_epoch().await;
    let fork = within(forked).await.unwrap().unwrap();
    assert_eq!(fork.state, State::Running);
    assert_eq!(epoch.host_name, "warm-1");
    let metadata = fork.metadata.unwrap();
    assert_eq!(epoch.machine_id, *metadata.generation.as_bytes());
    assert_eq!(epoch.id.0, *metadata.vmm.unwrap().epoch.id.as_bytes());
}

#[tokio::test]
async fn an_armed_fork_in_which_something_runs_ahead_is_ended() {
    let (house, mut guests) = house().await;
    house.hypervisor.emulate();
    template(&house, &mut guests, "warm").await;
    let mut guest = greeted(&house, &mut guests).await;
    let (epoch, frozen) = (None, false);
    guest.say(ToHost::Hello { epoch, frozen }).await;
    assert_eq!(guest.hears().await, None, "the connection ends with its VM");
    within(async {
        while !house.processes().is_empty() || house.directories().len() > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(house.engine.get("warm").await.unwrap().armed.unwrap().ready, 0);
}

#[tokio::test]
async fn armed_forks_of_a_guest_that_is_not_emulated_have_not_run() {
    let (house, mut guests) = house().await;
    template(&house, &mut guests, "warm").await;
    let before = house.hypervisor.calls().len();
    house.engine.arm("warm", Some(1)).await.unwrap();
    until_armed(&house).await;
    assert_eq!(done(&house, before), ["spawn", "restore", "without hot pages"]);
}
