//! The link to the agent in a guest: who a guest is told that it is, and what the engine makes of what agents say.

mod commands;
mod greeting;
mod guest;
mod power_off;

use std::collections::HashSet;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use stencil_agent::{ToGuest, ToHost};
use stencil_core::rules::Refusal;
use stencil_core::{Readiness, State};
use stencil_engine::{AgentState, CreateRequest, EngineError, ForkRequest};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::mpsc;

use self::guest::Guest;
use crate::scripted::House;
use crate::{PATIENCE, forks};

type Guests = mpsc::UnboundedReceiver<UnixStream>;

async fn house() -> (House, Guests) {
    let house = House::new().await;
    let guests = house.hypervisor.give_agent_ports();
    (house, guests)
}

fn asks_the_agent(house: &House, name: &str) -> CreateRequest {
    CreateRequest {
        readiness: Readiness::Agent,
        ..house.request(name)
    }
}

async fn reaches(house: &House, name: &str, state: State) -> bool {
    house.engine.wait(name, state, PATIENCE).await.unwrap().reached
}

/// Waits until this is known of the instance's agent.
async fn agent_is(house: &House, name: &str, expected: impl Fn(&AgentState) -> bool) {
    let seen = async {
        loop {
            let agent = house.engine.get(name).await.unwrap().agent.unwrap();
            if expected(&agent) {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, seen).await.unwrap();
}

/// A template that asks the agent of its forks.
async fn template(house: &House, guests: &mut Guests, name: &str) {
    house.engine.create(asks_the_agent(house, name)).await.unwrap();
    let mut guest = Guest::ready(guests).await;
    assert!(reaches(house, name, State::Running).await);
    standby(house, &mut guest, name).await;
    house.engine.promote(name, None).await.unwrap();
}

async fn standby(house: &House, guest: &mut Guest, name: &str) {
    let engine = house.engine.clone();
    let name = name.to_owned();
    let standby = tokio::spawn(async move { engine.standby(&name).await.unwrap() });
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    guest.say(ToHost::Frozen).await;
    standby.await.unwrap();
}

/// Pauses an instance, whose guest stops its processes.
async fn paused(house: &House, guest: &mut Guest, name: &str) {
    let (engine, name) = (house.engine.clone(), name.to_owned());
    let pausing = tokio::spawn(async move { engine.pause(&name).await.unwrap() });
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    guest.say(ToHost::Frozen).await;
    assert_eq!(pausing.await.unwrap().state, State::Paused);
}

#[tokio::test]
async fn a_guest_that_is_paused_stops_its_processes_and_is_told_the_time_when_it_goes_on() {
    let (house, mut guests) = house().await;
    house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    let mut guest = Guest::next(&mut guests).await;
    let first = guest.take_epoch().await;
    assert!(reaches(&house, "web", State::Running).await);
    paused(&house, &mut guest, "web").await;
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    house.engine.resume("web").await.unwrap();
    let again = guest.take_epoch_again().await;
    assert!(again.id == first.id && again.wall_clock >= before);
    // Its processes are stopped as they are for a snapshot, so that forks can be made of one.
    paused(&house, &mut guest, "web").await;
    house.engine.standby("web").await.unwrap();
    house.engine.promote("web", None).await.unwrap();
}

#[tokio::test]
async fn a_guest_is_running_when_its_agent_has_taken_the_epoch() {
    let (house, mut guests) = house().await;
    let web = house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    assert_eq!(web.state, State::Initializing);
    assert_eq!(web.agent, Some(AgentState::Absent));
    let mut guest = Guest::next(&mut guests).await;
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let epoch = guest.given_epoch().await;
    agent_is(&house, "web", |agent| *agent == AgentState::Connected).await;
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Initializing);
    let metadata = web.metadata.unwrap();
    assert_eq!(epoch.host_name, "web");
    assert_eq!(epoch.machine_id, *metadata.generation.as_bytes());
    assert_eq!(epoch.id.0, *metadata.vmm.unwrap().epoch.id.as_bytes());
    assert!(epoch.wall_clock >= before);
    guest.say(ToHost::EpochTaken { id: epoch.id }).await;
    assert!(reaches(&house, "web", State::Running).await);
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
}

#[tokio::test]
async fn no_two_forks_are_told_the_same() {
    let (house, mut guests) = house().await;
    template(&house, &mut guests, "warm").await;
    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.forks("warm", forks(5)).await.unwrap() });
    let (mut told, mut alive) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let mut guest = Guest::next(&mut guests).await;
        told.push(guest.take_epoch().await);
        alive.push(guest);
    }
    let outcomes = forked.await.unwrap();
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.result.as_ref().unwrap().state == State::Running)
    );
    let names: HashSet<_> = told.iter().map(|epoch| &epoch.host_name).collect();
    assert_eq!(
        names,
        outcomes
            .iter()
            .map(|o| o.name.to_string())
            .collect::<Vec<_>>()
            .iter()
            .collect()
    );
    assert_eq!(told.iter().map(|epoch| epoch.id).collect::<HashSet<_>>().len(), 5);
    assert_eq!(
        told.iter()
            .map(|epoch| epoch.machine_id)
            .collect::<HashSet<_>>()
            .len(),
        5
    );
    assert_eq!(
        told.iter()
            .map(|epoch| epoch.entropy.0)
            .collect::<HashSet<_>>()
            .len(),
        5
    );
}

#[tokio::test]
async fn a_fork_whose_guest_cannot_become_a_new_machine_is_not_running_and_says_why() {
    let (house, mut guests) = house().await;
    template(&house, &mut guests, "warm").await;
    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.fork("warm", None, ForkRequest::default()).await });
    let mut guest = Guest::next(&mut guests).await;
    let epoch = guest.given_epoch().await;
    let why = "could not set the clock".to_owned();
    guest.say(ToHost::EpochFailed { id: epoch.id, why }).await;
    let fork = tokio::time::timeout(PATIENCE, forked)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert_eq!(fork.state, State::Initializing);
    let why = "the guest could not become a new machine: could not set the clock";
    assert_eq!(fork.agent, Some(AgentState::Failed(why.to_owned())));
    assert_eq!(fork.state_error, Some(format!("its agent failed: {why}")));
    let refused = house.engine.agent("warm-1").await.unwrap_err();
    assert!(matches!(refused, EngineError::Refused(_)), "{refused:?}");
}

#[tokio::test]
async fn a_guest_that_has_its_epoch_is_ready_for_the_next_server_without_another() {
    let (house, mut guests) = house().await;
    house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    let mut before = Guest::next(&mut guests).await;
    let epoch = before.take_epoch().await;
    assert!(reaches(&house, "web", State::Running).await);
    let house = house.restart().await;
    let mut guest = Guest::next(&mut guests).await;
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Initializing);
    guest.greet(Some(epoch.id)).await;
    assert!(reaches(&house, "web", State::Running).await);
}

#[tokio::test]
async fn an_agent_that_was_started_anew_is_given_the_epoch_again_and_the_instance_goes_on_running() {
    let (house, mut guests) = house().await;
    house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    let mut guest = Guest::next(&mut guests).await;
    let first = guest.take_epoch().await;
    assert!(reaches(&house, "web", State::Running).await);
    let hello = ToHost::Hello {
        epoch: None,
        frozen: false,
    };
    guest.say_to_nobody(hello).await;
    let second = guest.given_epoch().await;
    assert_eq!(second.id, first.id);
    assert_ne!(second.entropy, first.entropy);
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
}

#[tokio::test]
async fn a_link_that_breaks_is_made_again() {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let mut guest = Guest::next(&mut guests).await;
    let epoch = guest.take_epoch().await;
    drop(guest);
    let mut guest = Guest::next(&mut guests).await;
    guest.greet(Some(epoch.id)).await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
}

#[tokio::test]
async fn users_processes_are_stopped_before_the_vcpus_are_and_go_on_if_the_snapshot_fails() {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let mut guest = Guest::next(&mut guests).await;
    let epoch = guest.take_epoch().await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
    house.hypervisor.fail("snapshot");
    let engine = house.engine.clone();
    let standby = tokio::spawn(async move { engine.standby("web").await });
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    assert!(!house.hypervisor.calls().contains(&"pause".to_owned()));
    guest.say(ToHost::Frozen).await;
    match guest.hear().await {
        ToGuest::Epoch(again) => assert_eq!(again.id, epoch.id),
        other => panic!("an epoch was expected: {other:?}"),
    }
    assert!(standby.await.unwrap().is_err());
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
}

/// Nothing is made of this instance's snapshot but itself, and nothing is left of the attempts.
async fn is_for_itself_only(house: &House, name: &str) {
    let before = house.directories();
    for target in [State::Running, State::Paused, State::Standby] {
        let request = ForkRequest {
            target_state: Some(target),
            ..ForkRequest::default()
        };
        not_frozen(house.engine.fork(name, None, request).await.unwrap_err());
    }
    assert_eq!(house.directories(), before);
}

#[track_caller]
fn not_frozen(refused: EngineError) {
    assert!(
        matches!(refused, EngineError::Refused(Refusal::NotFrozen { .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn an_agent_that_does_not_stop_its_processes_does_not_keep_a_vm_from_standby_and_there_are_no_forks_of_it()
 {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let mut guest = Guest::ready(&mut guests).await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
    assert_eq!(house.engine.standby("web").await.unwrap().state, State::Standby);
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    assert_eq!(guest.hears().await, None, "the link ends with its VM");
    not_frozen(house.engine.promote("web", None).await.unwrap_err());
    is_for_itself_only(&house, "web").await;
    // It goes on itself, and does better the next time.
    house.engine.restore("web").await.unwrap();
    let mut guest = Guest::ready(&mut guests).await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
    standby(&house, &mut guest, "web").await;
    house.engine.promote("web", None).await.unwrap();
    // And what is made of it can be forked as well.
    let asleep = ForkRequest {
        target_state: Some(State::Standby),
        ..ForkRequest::default()
    };
    house.engine.fork("web", None, asleep).await.unwrap();
    house.engine.promote("web-1", None).await.unwrap();
}

#[tokio::test]
async fn a_vm_that_was_paused_goes_on_standby_and_there_are_no_forks_of_it() {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let _guest = Guest::ready(&mut guests).await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
    house.engine.pause("web").await.unwrap();
    house.engine.standby("web").await.unwrap();
    not_frozen(house.engine.promote("web", None).await.unwrap_err());
    is_for_itself_only(&house, "web").await;
    house.engine.restore("web").await.unwrap();
}

#[tokio::test]
async fn a_running_source_whose_agent_does_not_stop_its_processes_is_not_forked_and_runs_on() {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let mut guest = Guest::ready(&mut guests).await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
    let request = ForkRequest {
        from_running: true,
        ..ForkRequest::default()
    };
    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.fork("web", None, request).await });
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    let why = "no cgroups".to_owned();
    guest.say(ToHost::FreezeFailed { why }).await;
    not_frozen(forked.await.unwrap().unwrap_err());
    // What was stopped of them goes on.
    assert!(matches!(guest.hear().await, ToGuest::Epoch(_)));
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
    assert!(!house.hypervisor.calls().contains(&"pause".to_owned()));
}

#[tokio::test]
async fn an_agent_that_stops_its_processes_late_has_not_stopped_them_for_the_next_fork() {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let mut guest = Guest::ready(&mut guests).await;
    agent_is(&house, "web", |agent| *agent == AgentState::Ready).await;
    let fork = || {
        let engine = house.engine.clone();
        let request = ForkRequest {
            from_running: true,
            ..ForkRequest::default()
        };
        tokio::spawn(async move { engine.fork("web", None, request).await })
    };
    // Nobody answers, until nobody waits.
    not_frozen(fork().await.unwrap().unwrap_err());
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    assert!(matches!(guest.hear().await, ToGuest::Epoch(_)));
    let next = fork();
    assert_eq!(guest.hear().await, ToGuest::Freeze);
    guest.say(ToHost::Frozen).await;
    let why = "they were let go on before".to_owned();
    guest.say(ToHost::FreezeFailed { why }).await;
    not_frozen(next.await.unwrap().unwrap_err());
}

#[tokio::test]
async fn a_template_of_an_earlier_version_whose_guest_has_an_agent_has_no_forks() {
    let (house, mut guests) = house().await;
    template(&house, &mut guests, "warm").await;
    let warm = house.engine.get("warm").await.unwrap();
    let manifest = house
        .metadata_path(&warm.id)
        .with_file_name("snapshot/manifest.json");
    let said = fs::read_to_string(&manifest).unwrap();
    let without = said.replace("  \"frozen\": true,\n", "");
    assert_ne!(without, said);
    fs::write(&manifest, without).unwrap();
    is_for_itself_only(&house, "warm").await;
    house.engine.demote("warm").await.unwrap();
    not_frozen(house.engine.promote("warm", None).await.unwrap_err());
}

#[tokio::test]
async fn nonsense_without_end_is_given_up_and_said_so() {
    let (house, mut guests) = house().await;
    house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    let mut guest = Guest::next(&mut guests).await;
    let noise = vec![0x5a; 64 << 10];
    // It hangs up when it has heard enough.
    while guest.stream.write_all(&noise).await.is_ok() {}
    agent_is(&house, "web", |agent| matches!(agent, AgentState::Failed(_))).await;
    let web = house.engine.get("web").await.unwrap();
    assert_eq!(web.state, State::Initializing);
    assert!(
        web.state_error
            .unwrap()
            .contains("does not speak the agent's protocol")
    );
}

#[tokio::test]
async fn what_belongs_to_another_conversation_or_is_cut_off_is_nothing() {
    let (house, mut guests) = house().await;
    house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    let mut guest = Guest::next(&mut guests).await;
    let mut theirs = Vec::new();
    let other = stencil_agent::Nonce::new(std::num::NonZeroU64::MIN);
    let taken = ToHost::EpochTaken {
        id: stencil_agent::EpochId([1; 16]),
    };
    stencil_agent::encode(other, &taken, &mut theirs).unwrap();
    let half = theirs.len() / 2;
    guest.stream.write_all(&theirs).await.unwrap();
    guest.stream.write_all(&theirs[..half]).await.unwrap();
    guest.take_epoch().await;
    assert!(reaches(&house, "web", State::Running).await);
}

#[tokio::test]
async fn an_agent_that_speaks_another_version_is_told_so() {
    let (house, mut guests) = house().await;
    house.running("web").await;
    let mut guest = Guest::next(&mut guests).await;
    // Version, nonce, the number of a message, and the CRC-32 of these.
    let mut frame = vec![7, 1, 2, 3, 4, 5, 6, 7, 8, 99];
    frame.extend(crc32fast::hash(&frame).to_le_bytes());
    let mut encoded = vec![0; cobs::max_encoding_length(frame.len())];
    let length = cobs::encode(&frame, &mut encoded);
    encoded.truncate(length);
    encoded.push(0);
    guest.stream.write_all(&encoded).await.unwrap();
    agent_is(&house, "web", |agent| {
        *agent
            == AgentState::Failed("it speaks version 7 of the protocol and this server speaks 1".to_owned())
    })
    .await;
}

#[tokio::test]
async fn readiness_by_an_agent_is_refused_where_the_hypervisor_has_no_port_for_one() {
    let house = House::new().await;
    let refused = house
        .engine
        .create(asks_the_agent(&house, "web"))
        .await
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "readiness is agent; scripted gives its guests no port for one: take a hypervisor that does, or readiness.console"
    );
    assert_eq!(house.directories(), [] as [&str; 0]);
    house.running("web").await;
    assert_eq!(house.engine.get("web").await.unwrap().agent, None);
}

#[tokio::test]
async fn forks_run_where_only_the_agent_can_tell_them_who_they_are() {
    let (house, mut guests) = house().await;
    house.hypervisor.tell_no_identity();
    template(&house, &mut guests, "warm").await;
    let engine = house.engine.clone();
    let forked = tokio::spawn(async move { engine.fork("warm", None, ForkRequest::default()).await });
    Guest::ready(&mut guests).await;
    assert_eq!(forked.await.unwrap().unwrap().state, State::Running);
}
