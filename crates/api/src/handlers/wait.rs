//! Waiting for a state.

use axum::extract::State;
use stencil_engine::Engine;

use crate::body::{Asked, Reference};
use crate::closing::Closing;
use crate::error::ApiError;
use crate::reply::Waited;
use crate::request::WaitFor;

pub(crate) async fn wait(
    State(engine): State<Engine>,
    State(closing): State<Closing>,
    Reference(id): Reference,
    Asked(asked): Asked<WaitFor>,
) -> Result<axum::Json<Waited>, ApiError> {
    tokio::select! {
        outcome = engine.wait(&id, asked.state, asked.timeout.duration()) => {
            let outcome = outcome?;
            Ok(axum::Json(Waited { reached: outcome.reached, instance: outcome.instance.into() }))
        }
        () = closing.begun() => Err(ApiError::shutting_down()),
    }
}

#[cfg(test)]
mod tests {
    use stencil_core::{Durability, InstanceId, Metadata, Store, VmGeneration, VmSpec};
    use stencil_engine::Config;
    use tokio::sync::watch;

    use super::*;

    #[tokio::test]
    async fn who_waits_is_told_that_the_server_ends() {
        let dir = tempfile::tempdir().unwrap();
        let id = InstanceId::generate();
        let spec = VmSpec::new("microvm".parse().unwrap(), "/boot/guest.elf".into(), 1, 64 << 20);
        let made = Metadata::new(
            id,
            "web".parse().unwrap(),
            spec,
            VmGeneration::random(),
            jiff::Timestamp::now(),
        );
        let store = Store::open(dir.path()).unwrap();
        store
            .begin(id)
            .unwrap()
            .commit(&made, Durability::Synced)
            .unwrap();
        drop(store);
        let engine = Engine::open(Config {
            data: dir.path().to_owned(),
            hypervisors: Vec::new(),
            armed: 0,
            log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
        })
        .await
        .unwrap();

        let (close, closing) = watch::channel(false);
        let running = WaitFor {
            state: stencil_core::State::Running,
            timeout: "10m".parse().unwrap(),
        };
        let waiting = wait(
            State(engine),
            State(Closing(closing)),
            Reference("web".to_owned()),
            Asked(running),
        );
        close.send_replace(true);
        assert_eq!(waiting.await.unwrap_err().body.code, "shutting_down");
    }
}
