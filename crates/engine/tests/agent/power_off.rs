//! Who is asked to power off when an instance is stopped, and how.

use std::fs;

use stencil_agent::ToGuest;
use stencil_core::State;
use stencil_engine::CreateRequest;

use super::guest::Guest;
use super::{asks_the_agent, house, paused, reaches};
use crate::scripted::House;

const PRESSED: &str = "press the power button";

/// How its VMM was asked to end the guest and then itself.
fn last_calls(house: &House) -> Vec<String> {
    let asked = house.hypervisor.calls().into_iter();
    asked.filter(|call| call == PRESSED || call == "stop").collect()
}

#[tokio::test]
async fn a_guest_whose_instance_is_stopped_is_asked_by_its_agent_to_power_off_first() {
    let (house, mut guests) = house().await;
    house.engine.create(asks_the_agent(&house, "web")).await.unwrap();
    let mut guest = Guest::ready(&mut guests).await;
    assert!(reaches(&house, "web", State::Running).await);
    let engine = house.engine.clone();
    let stopped = tokio::spawn(async move { engine.stop("web").await.unwrap() });
    assert_eq!(guest.hear().await, ToGuest::PowerOff);
    assert_eq!(last_calls(&house), [] as [&str; 0]);
    house.hypervisor.power_guests_off();
    let stopped = stopped.await.unwrap();
    assert_eq!(stopped.state, State::Stopped);
    assert_eq!(last_calls(&house), ["stop"]);
    let timings = stopped.timings.unwrap();
    assert!(
        timings.phases.iter().any(|(phase, _)| *phase == "power_off"),
        "{timings:?}"
    );
}

#[tokio::test]
async fn only_a_guest_that_is_running_is_asked_and_none_that_is_deleted() {
    let (house, mut guests) = house().await;
    for (name, is_ready) in [("booting", false), ("paused", true), ("deleted", true)] {
        house.engine.create(asks_the_agent(&house, name)).await.unwrap();
        let mut guest = Guest::next(&mut guests).await;
        if is_ready {
            guest.take_epoch().await;
            assert!(reaches(&house, name, State::Running).await);
        } else {
            guest.given_epoch().await;
        }
        match name {
            "deleted" => house.engine.delete(name).await.unwrap(),
            "paused" => {
                paused(&house, &mut guest, name).await;
                house.engine.stop(name).await.unwrap();
            }
            _ => drop(house.engine.stop(name).await.unwrap()),
        }
        assert_eq!(guest.hears().await, None, "{name}");
    }
    assert_eq!(last_calls(&house), ["stop"; 3]);
}

#[tokio::test]
async fn the_power_button_is_pressed_where_the_guest_is_likely_to_listen() {
    let house = House::new().await;
    let bzimage = house.data.path().join("bzImage");
    fs::write(&bzimage, [&[0; 0x202][..], b"HdrS"].concat()).unwrap();
    let linux = CreateRequest {
        kernel: Some(bzimage),
        ..house.request("linux")
    };
    house.engine.create(linux).await.unwrap();
    assert_eq!(house.engine.stop("linux").await.unwrap().state, State::Stopped);
    assert_eq!(last_calls(&house), [PRESSED, "stop"]);
    // An ELF that is no Linux as far as one can tell.
    house.running("bare").await;
    house.engine.stop("bare").await.unwrap();
    assert_eq!(last_calls(&house), [PRESSED, "stop", "stop"]);
    // One that cannot be asked is ended all the same.
    house.hypervisor.fail(PRESSED);
    house.engine.start("linux").await.unwrap();
    assert_eq!(house.engine.stop("linux").await.unwrap().state, State::Stopped);
    assert_eq!(house.processes(), [] as [u32; 0]);
}
