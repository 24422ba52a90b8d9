//! `stencil fork`: one fork, or many at once, and what is run in them.

use stencil_api::client::Client;
use stencil_api::exec::{CommandEnd, RunCommand};
use stencil_api::reply::{ForkEntry, ForkExec, ForkList, ForkOutcome};
use stencil_api::request::{ForkMany, ForkOne};

use crate::args::Fork;
use crate::failure::Failure;
use crate::output::{self, Reader};
use crate::table;

pub(super) async fn fork(asked: Fork, client: &Client, reader: Reader) -> Result<(), Failure> {
    let count = match asked.count {
        Some(count) => count,
        None if !asked.cmd.is_empty() => 1,
        None => {
            let request = ForkOne {
                name: asked.name,
                from_running: asked.from_running,
                target_state: asked.target_state,
                memory_mode: asked.memory_mode,
            };
            return reader.print(&client.fork(&asked.id, &request).await?, table::changed);
        }
    };
    let exec = (!asked.cmd.is_empty()).then(|| RunCommand {
        timeout: asked.timeout,
        env: asked.env.into_iter().collect(),
        cwd: asked.cwd,
        ..RunCommand::new(asked.cmd)
    });
    let runs = exec.is_some();
    let request = ForkMany {
        count,
        name_prefix: asked.name_prefix,
        from_running: asked.from_running,
        target_state: asked.target_state,
        memory_mode: asked.memory_mode,
        exec,
        delete_after: asked.rm,
    };
    let list = client.forks(&asked.id, &request).await?;
    match reader {
        Reader::Person if runs => tell_work(&list)?,
        _ => reader.print(&list, table::forks)?,
    }
    // Of an only fork it is as if its command had been run here.
    if let [
        ForkEntry {
            exec: Some(ForkExec::Result(result)),
            outcome: ForkOutcome::Instance(_),
            deleted: None | Some(true),
            ..
        },
    ] = &list.forks[..]
        && result.end.code() != 0
    {
        return Err(Failure::Ended {
            code: result.end.code(),
        });
    }
    let failed = list.forks.iter().filter(|fork| !worked(fork)).count();
    if failed == 0 {
        Ok(())
    } else {
        Err(Failure::SomeFailed {
            failed,
            all: list.forks.len(),
        })
    }
}

/// What was run in the forks wrote this: each line behind the name of its fork. What went wrong goes to standard error.
fn tell_work(list: &ForkList) -> Result<(), Failure> {
    let width = list.forks.iter().map(|fork| fork.name.as_str().len()).max();
    let width = width.unwrap_or_default();
    for fork in &list.forks {
        let lines = |text: &str| -> String {
            let line = |line| format!("{:width$} | {line}\n", fork.name.as_str());
            text.lines().map(line).collect()
        };
        let mut wrong = String::new();
        match (&fork.exec, &fork.outcome) {
            (Some(ForkExec::Result(result)), _) => {
                output::write(lines(&result.stdout).as_bytes())?;
                wrong.push_str(&lines(&result.stderr));
                if result.truncated {
                    wrong.push_str(&lines("(its output goes on)"));
                }
                if let Some(end) = ended_badly(&result.end) {
                    wrong.push_str(&lines(&end));
                }
            }
            (Some(ForkExec::Error(error)), _) | (None, ForkOutcome::Error(error)) => {
                wrong.push_str(&lines(&format!("{} [{}]", error.message, error.code)));
            }
            (None, ForkOutcome::Instance(_)) => {}
        }
        if fork.deleted == Some(false) {
            wrong.push_str(&lines("it could not be deleted"));
        }
        eprint!("{wrong}");
    }
    Ok(())
}

fn ended_badly(end: &CommandEnd) -> Option<String> {
    match (end.timed_out, end.exit_code, end.signal) {
        (true, _, _) => Some("(killed: its time was over)".to_owned()),
        (_, Some(0), _) => None,
        (_, Some(code), _) => Some(format!("(exit code {code})")),
        (_, None, Some(signal)) => Some(format!("(killed by signal {signal})")),
        (_, None, None) => Some("(ended)".to_owned()),
    }
}

/// The fork was made, and its command, if there was one, ended with 0.
fn worked(fork: &ForkEntry) -> bool {
    let ran = match &fork.exec {
        None => true,
        Some(ForkExec::Result(result)) => result.end.code() == 0,
        Some(ForkExec::Error(_)) => false,
    };
    ran && matches!(fork.outcome, ForkOutcome::Instance(_)) && fork.deleted != Some(false)
}
