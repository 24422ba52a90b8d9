//! That the forks are what they should be: the same memory, machines of their own, and none sees another.

use std::collections::HashSet;

use super::forks::Batch;
use super::{DemoError, PAGES, Template, WARM};
use crate::client::Client;
use crate::guest_console::ask_for;

/// By what the server says and by what each guest reads in its own memory.
pub(super) fn generations_differ(
    client: &Client,
    template: &Template,
    batch: &Batch,
) -> Result<bool, DemoError> {
    let mut seen = HashSet::from([template.instance["generation"]
        .as_str()
        .unwrap_or_default()
        .to_owned()]);
    for fork in &batch.forks {
        let by_guest = ask_for(client, &fork.id, "generation", "generation")?;
        if by_guest != fork.generation || !seen.insert(by_guest) {
            return Ok(false);
        }
    }
    Ok(true)
}

pub(super) fn have_memory_of(client: &Client, template: &Template, batch: &Batch) -> Result<bool, DemoError> {
    for fork in &batch.forks {
        if ask_for(client, &fork.id, &format!("hash 0 {PAGES}"), "hash")? != template.hash {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Each fork fills the same pages with data of its own; when all have, each still has its own.
pub(super) fn are_isolated(client: &Client, batch: &Batch) -> Result<bool, DemoError> {
    let mut written = Vec::new();
    for (number, fork) in batch.forks.iter().enumerate() {
        ask_for(
            client,
            &fork.id,
            &format!("write 0 64 {}", 1000 + number),
            "written",
        )?;
        written.push(ask_for(client, &fork.id, "hash 0 64", "hash")?);
    }
    let distinct: HashSet<&String> = written.iter().collect();
    for (fork, hash) in batch.forks.iter().zip(&written) {
        if ask_for(client, &fork.id, "hash 0 64", "hash")? != *hash {
            return Ok(false);
        }
    }
    Ok(distinct.len() == batch.forks.len())
}

pub(super) fn delete_is_refused(client: &Client, batch: &Batch) -> Result<bool, DemoError> {
    let reply = client.delete(&format!("/instances/{WARM}"))?;
    if let Some(message) = reply.body["message"].as_str() {
        println!(
            "  DELETE /instances/{WARM} -> {} {}: {message}",
            reply.status,
            reply.code()
        );
    }
    let named: HashSet<&str> = reply.body["details"]["forks"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|fork| fork["id"].as_str())
        .collect();
    let expected: HashSet<&str> = batch.forks.iter().map(|fork| fork.id.as_str()).collect();
    Ok(reply.status == 409 && reply.code() == "template_in_use" && named == expected)
}
