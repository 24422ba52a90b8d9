//! Forks that are prepared before anybody asks for them: they are no instances, and nobody notices when one is lost.

use std::collections::HashSet;

use stencil_core::rules::Refusal;
use stencil_core::{InstanceId, MemoryMode, State};
use stencil_engine::{Armed, EngineError, Filter, ForkRequest, Instance, MAX_ARMED};

use crate::scripted::House;
use crate::{PATIENCE, forks, kill};

impl House {
    /// A template `warm` whose hot pages are known, with so many armed forks. Its only fork was the one that recorded.
    async fn armed_template(&self, armed: u32) -> InstanceId {
        let (template, recorder) = self.recorded_template().await;
        self.engine.delete(&recorder.id.to_string()).await.unwrap();
        self.engine.arm("warm", Some(armed)).await.unwrap();
        self.until_armed(armed as usize).await;
        template
    }

    /// Returns when so many forks of `warm` can be taken.
    async fn until_armed(&self, ready: usize) {
        let armed = async {
            while self.engine.get("warm").await.unwrap().armed.unwrap().ready != ready {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, armed).await.unwrap();
    }

    /// Forks `warm`, and says whether the fork was taken from the pool.
    async fn taken(&self) -> (Instance, bool) {
        self.taken_by(ForkRequest::default()).await
    }

    async fn taken_by(&self, request: ForkRequest) -> (Instance, bool) {
        let fork = self.engine.fork("warm", None, request).await.unwrap();
        let phases: Vec<&str> = fork
            .timings
            .as_ref()
            .unwrap()
            .phases
            .iter()
            .map(|phase| phase.0)
            .collect();
        let was_armed = phases.contains(&"take");
        assert_ne!(was_armed, phases.contains(&"spawn"), "{phases:?}");
        (fork, was_armed)
    }
}

#[tokio::test]
async fn a_fork_is_taken_from_the_pool_and_the_pool_is_filled_again() {
    let house = House::new().await;
    let template = house.armed_template(2).await;
    let mut generations = HashSet::new();
    for _ in 0..4 {
        house.until_armed(2).await;
        let (fork, was_armed) = house.taken().await;
        assert!(was_armed);
        assert_eq!(fork.state, State::Running);
        let metadata = fork.metadata.unwrap();
        assert_eq!(metadata.fork_of_template, Some(template));
        assert_eq!(metadata.memory_mode, Some(MemoryMode::Cow));
        // It is the machine that its VMM was told to be.
        assert!(house.hypervisor.restored().contains(&metadata.generation));
        assert!(generations.insert(metadata.generation));
    }
}

#[tokio::test]
async fn forks_that_may_only_begin_paused_are_armed_too() {
    let house = House::new().await;
    house.armed_template(0).await;
    house.hypervisor.tell_no_identity();
    house.engine.arm("warm", Some(1)).await.unwrap();
    house.until_armed(1).await;
    assert!(
        house
            .engine
            .fork("warm", None, ForkRequest::default())
            .await
            .is_err()
    );
    let paused = ForkRequest {
        target_state: Some(State::Paused),
        ..ForkRequest::default()
    };
    // The refusal cost no armed fork.
    let (fork, was_armed) = house.taken_by(paused).await;
    assert!(was_armed);
    assert_eq!(fork.state, State::Paused);
}

#[tokio::test]
async fn armed_forks_are_in_no_list_and_do_not_keep_their_template() {
    let house = House::new().await;
    house.armed_template(3).await;
    let all = house.engine.list(Filter::default()).await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].forks.as_deref(), Some([].as_slice()));
    assert_eq!(all[0].armed, Some(Armed { target: 3, ready: 3 }));
    assert_eq!(house.processes().len(), 3);
    let demoted = house.engine.demote("warm").await.unwrap();
    assert_eq!((demoted.state, demoted.armed), (State::Standby, None));
    assert!(house.processes().is_empty());
    assert_eq!(house.directories(), [demoted.id.to_string()]);
}

#[tokio::test]
async fn deleting_or_stopping_a_template_ends_its_armed_forks() {
    for stop in [false, true] {
        let house = House::new().await;
        house.armed_template(2).await;
        if stop {
            house.engine.stop("warm").await.unwrap();
        } else {
            house.engine.delete("warm").await.unwrap();
        }
        assert!(house.processes().is_empty());
        assert_eq!(house.directories().len(), usize::from(stop));
    }
}

#[tokio::test]
async fn a_dead_armed_fork_is_skipped() {
    let house = House::new().await;
    house.armed_template(2).await;
    for process in house.processes() {
        kill(process);
    }
    house.until_armed(0).await;
    let (fork, was_armed) = house.taken().await;
    assert_eq!((fork.state, was_armed), (State::Running, false));
    // What the dead ones left is gone, and others take their places.
    house.until_armed(2).await;
    let names = house.directories();
    assert_eq!(names.iter().filter(|name| name.starts_with(".new-")).count(), 2);
    assert_eq!(names.len(), 4);
}

#[tokio::test]
async fn an_armed_fork_that_cannot_run_costs_the_caller_nothing() {
    let house = House::new().await;
    house.armed_template(2).await;
    house.hypervisor.fail_times("resume", 1);
    let (fork, _) = house.taken().await;
    assert_eq!(fork.state, State::Running);
    assert_eq!(fork.name.unwrap().as_str(), "warm-1");
    let forks = house.engine.get("warm").await.unwrap().forks.unwrap();
    assert_eq!(forks.len(), 1);
}

#[tokio::test]
async fn an_armed_fork_that_does_not_answer_is_given_up_for_a_new_one() {
    let house = House::new().await;
    house.armed_template(2).await;
    house.hypervisor.do_not_answer_once();
    let fork = house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    assert_eq!(
        (fork.state, fork.name.unwrap().as_str()),
        (State::Running, "warm-1")
    );
    house.until_armed(2).await;
    assert_eq!(house.processes().len(), 3, "it did not stay");
}

#[tokio::test]
async fn more_forks_than_are_armed_are_made_as_ever() {
    let house = House::new().await;
    house.armed_template(2).await;
    let outcomes = house.engine.forks("warm", forks(5)).await.unwrap();
    assert!(outcomes.iter().all(|outcome| outcome.result.is_ok()));
    house.until_armed(2).await;
    assert_eq!(house.processes().len(), 7);
}

#[tokio::test]
async fn a_fork_in_another_memory_mode_is_not_taken_from_the_pool() {
    let house = House::new().await;
    house.armed_template(1).await;
    let request = ForkRequest {
        memory_mode: Some(MemoryMode::Uffd),
        ..ForkRequest::default()
    };
    let (fork, was_armed) = house.taken_by(request).await;
    assert!(!was_armed);
    assert_eq!(fork.metadata.unwrap().memory_mode, Some(MemoryMode::Uffd));
    house.until_armed(1).await;
}

#[tokio::test]
async fn what_was_armed_before_hot_pages_were_known_is_armed_anew() {
    let house = House::new().await;
    house.running("warm").await;
    house.engine.standby("warm").await.unwrap();
    let template = house.engine.promote("warm", Some(1)).await.unwrap();
    house.until_armed(1).await;
    // The pool is there, and yet the first fork records.
    let (recorder, was_armed) = house.taken().await;
    assert!(!was_armed);
    assert_eq!(house.hypervisor.hot_pages(), ["without hot pages", "recording"]);
    let list = house.list(template.id);
    house
        .until_rewritten(template.id, || house.close_recording(&recorder, &list))
        .await;
    let prefetched = async {
        while house.hypervisor.hot_pages().last().unwrap() != "prefetching" {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, prefetched).await.unwrap();
    house.until_armed(1).await;
    assert_eq!(house.processes().len(), 2);
}

#[tokio::test]
async fn a_pool_can_be_made_larger_and_smaller() {
    let house = House::new().await;
    house.armed_template(1).await;
    house.engine.arm("warm", Some(3)).await.unwrap();
    house.until_armed(3).await;
    let shown = house.engine.arm("warm", Some(1)).await.unwrap();
    assert_eq!(shown.armed, Some(Armed { target: 1, ready: 1 }));
    assert_eq!(house.processes().len(), 1);
    // As many as the server keeps by default, which here is none.
    let shown = house.engine.arm("warm", None).await.unwrap();
    assert_eq!(shown.armed, Some(Armed { target: 0, ready: 0 }));
    assert!(house.processes().is_empty());
}

#[tokio::test]
async fn more_than_can_be_kept_or_of_no_template_is_refused() {
    let house = House::new().await;
    house.running("web").await;
    assert!(matches!(
        house.engine.arm("web", Some(1)).await,
        Err(EngineError::Refused(Refusal::InvalidState { .. }))
    ));
    house.engine.standby("web").await.unwrap();
    for armed in [MAX_ARMED + 1, u32::MAX] {
        let refused = house.engine.promote("web", Some(armed)).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!("armed is {armed}; a template keeps 0 to 1024 forks prepared")
        );
    }
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Standby);
}

#[tokio::test]
async fn a_server_that_ends_leaves_no_armed_fork_and_the_next_one_arms_again() {
    let house = House::new().await;
    house.armed_template(2).await;
    let (fork, _) = house.taken().await;
    house.engine.close().await;
    assert_eq!(house.processes().len(), 1, "only the fork goes on");
    let house = house.restart().await;
    house.until_armed(2).await;
    assert_eq!(
        house.engine.get(&fork.id.to_string()).await.unwrap().state,
        State::Running
    );
}

#[tokio::test]
async fn what_a_killed_server_leaves_of_a_pool_is_swept() {
    let house = House::new().await;
    let template = house.armed_template(1).await;
    // A server that is killed drops nothing: its armed fork stays as this directory and process.
    let left = house.abandon_armed_fork();
    let house = house.restart().await;
    house.until_armed(1).await;
    assert!(!house.processes().contains(&left));
    let mut names = house.directories();
    names.retain(|name| *name != template.to_string());
    assert_eq!(names.len(), 1, "{names:?}");
}
