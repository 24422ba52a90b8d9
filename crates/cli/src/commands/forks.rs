//! `stencil fork`: one fork, or many at once.

use stencil_api::client::Client;
use stencil_api::reply::ForkOutcome;
use stencil_api::request::{ForkMany, ForkOne};

use crate::args::Fork;
use crate::failure::Failure;
use crate::output::Reader;
use crate::table;

pub(super) async fn fork(asked: Fork, client: &Client, reader: Reader) -> Result<(), Failure> {
    let Some(count) = asked.count else {
        let request = ForkOne {
            name: asked.name,
            from_running: asked.from_running,
            target_state: asked.target_state,
            memory_mode: asked.memory_mode,
        };
        return reader.print(&client.fork(&asked.id, &request).await?, table::changed);
    };
    let request = ForkMany {
        count,
        name_prefix: asked.name_prefix,
        from_running: asked.from_running,
        target_state: asked.target_state,
        memory_mode: asked.memory_mode,
    };
    let list = client.forks(&asked.id, &request).await?;
    reader.print(&list, table::forks)?;
    let failed = list
        .forks
        .iter()
        .filter(|fork| matches!(fork.outcome, ForkOutcome::Error(_)))
        .count();
    if failed == 0 {
        Ok(())
    } else {
        Err(Failure::SomeFailed {
            failed,
            all: list.forks.len(),
        })
    }
}
