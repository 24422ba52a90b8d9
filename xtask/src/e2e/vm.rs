//! One instance, as a scenario handles it: every method expects to succeed, and says so if not.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::Pid;
use serde_json::{Value, json};

use super::failure::{Failure, answered, holds, refused, same};
use super::way::Way;
use crate::client::{Client, Reply};
use crate::guest_console;
use crate::hypervisor::Hypervisor;

/// How long a state is waited for, in seconds.
const WAIT_SECONDS: u32 = 60;

#[derive(Clone, Debug)]
pub(super) struct Vm {
    pub(super) client: Client,
    dir: PathBuf,
    pub(super) id: String,
    pub(super) name: String,
    way: Way,
    hypervisor: Arc<Hypervisor>,
}

impl Vm {
    pub(super) fn new(
        client: Client,
        dir: PathBuf,
        id: String,
        name: String,
        way: Way,
        hypervisor: Arc<Hypervisor>,
    ) -> Self {
        Self {
            client,
            dir,
            id,
            name,
            way,
            hypervisor,
        }
    }

    /// The directory of the instance.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A file of its snapshot.
    pub(super) fn snapshot(&self, file: &str) -> PathBuf {
        self.dir.join("snapshot").join(file)
    }

    pub(super) fn path(&self, rest: &str) -> String {
        format!("/instances/{}{rest}", self.id)
    }

    pub(super) fn show(&self) -> Result<Value, Failure> {
        answered(200, self.client.get(&self.path(""))?)
    }

    /// A field of what GET shows that is a text; empty where it is absent.
    pub(super) fn text(&self, field: &str) -> Result<String, Failure> {
        Ok(self.show()?[field].as_str().unwrap_or_default().to_owned())
    }

    pub(super) fn state(&self) -> Result<String, Failure> {
        self.text("state")
    }

    pub(super) fn is_in(&self, state: &str) -> Result<(), Failure> {
        let shown = self.show()?;
        holds(
            shown["state"] == state,
            format!("the state of {}", self.name),
            state,
            shown.to_string(),
        )
    }

    /// Its VMM's process.
    pub(super) fn pid(&self) -> Result<Pid, Failure> {
        let shown = self.show()?;
        let pid = shown["pid"]
            .as_i64()
            .and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        pid.ok_or_else(|| Failure::Unexpected {
            what: format!("the process of {}", self.name),
            expected: "a pid".to_owned(),
            found: shown.to_string(),
        })
    }

    /// Asks for an operation. Where it rests on what this host cannot do, the scenario is skipped.
    pub(super) fn try_act(&self, operation: &str) -> Result<Reply, Failure> {
        if operation == "standby" {
            self.needs_snapshots()?;
        }
        Ok(self
            .client
            .post(&self.path(&format!("/{operation}")), Value::Null)?)
    }

    /// Does an operation that answers 200.
    pub(super) fn act(&self, operation: &str) -> Result<Value, Failure> {
        answered(200, self.try_act(operation)?)
    }

    /// Waits until the state is reached.
    pub(super) fn wait(&self, state: &str) -> Result<(), Failure> {
        let path = self.path(&format!("/wait?state={state}&timeout={WAIT_SECONDS}s"));
        let waited = answered(200, self.client.get(&path)?)?;
        holds(
            waited["reached"] == true,
            format!("{} within {WAIT_SECONDS} s", self.name),
            state,
            waited.to_string(),
        )
    }

    /// Gives the guest a command; its answer, which is `ok ...`.
    pub(super) fn ask(&self, command: &str) -> Result<String, Failure> {
        let answer = guest_console::ask(&self.client, &self.id, command)?;
        holds(
            answer.starts_with("ok"),
            format!("`{command}` to {}", self.name),
            "ok",
            &answer,
        )?;
        Ok(answer)
    }

    pub(super) fn ask_for(&self, command: &str, field: &str) -> Result<String, Failure> {
        Ok(guest_console::ask_for(&self.client, &self.id, command, field)?)
    }

    /// Adds one to the guest's counter; what it is then.
    pub(super) fn count(&self) -> Result<u64, Failure> {
        let counter = self.ask_for("counter", "counter")?;
        counter.parse().map_err(|_| Failure::Unexpected {
            what: format!("the counter of {}", self.name),
            expected: "a number".to_owned(),
            found: counter,
        })
    }

    pub(super) fn write(&self, page: u64, count: u64, seed: u64) -> Result<(), Failure> {
        let written = self.ask_for(&format!("write {page} {count} {seed}"), "written")?;
        same(
            format!("pages that {} has written", self.name),
            count.to_string(),
            written,
        )
    }

    /// The guest's hash over pages of its memory.
    pub(super) fn hash(&self, page: u64, count: u64) -> Result<String, Failure> {
        self.ask_for(&format!("hash {page} {count}"), "hash")
    }

    pub(super) fn answers(&self) -> Result<(), Failure> {
        same(
            format!("`ping` to {}", self.name),
            "ok pong".to_owned(),
            self.ask("ping")?,
        )
    }

    /// The scenario rests on snapshots.
    pub(super) fn needs_snapshots(&self) -> Result<(), Failure> {
        match self.hypervisor.no_snapshots {
            None => Ok(()),
            Some(_) => Err(Failure::Skipped(format!(
                "this {} writes no snapshots on this host",
                self.hypervisor.name
            ))),
        }
    }

    pub(super) fn try_fork(&self, request: Value) -> Result<Reply, Failure> {
        if request["from_running"] == true {
            self.needs_snapshots()?;
        }
        self.let_them_run(self.ask_for_forks("/fork", request)?)
    }

    pub(super) fn fork(&self, request: Value) -> Result<Self, Failure> {
        self.of(&answered(201, self.try_fork(request)?)?)
    }

    pub(super) fn try_forks(&self, request: Value) -> Result<Reply, Failure> {
        self.let_them_run(self.ask_for_forks("/forks", request)?)
    }

    /// Lets forks run that began paused although they are to run.
    pub(super) fn let_them_run(&self, asked: Asked) -> Result<Reply, Failure> {
        let mut reply = asked.reply;
        if !asked.begins_paused || reply.status >= 300 {
            return Ok(reply);
        }
        // Of many forks, those that there are; else the one that is shown.
        match reply.body.get_mut("forks").and_then(Value::as_array_mut) {
            Some(entries) => {
                for entry in entries.iter_mut().filter(|entry| entry["error"].is_null()) {
                    self.let_run(&mut entry["instance"])?;
                }
            }
            None => self.let_run(&mut reply.body)?,
        }
        Ok(reply)
    }

    /// Asks for forks. Where a fork's guest cannot be told that it is one, the server refuses forks that would run, and says
    /// that they can begin Paused: that is asked for then.
    pub(super) fn ask_for_forks(&self, path: &str, request: Value) -> Result<Asked, Failure> {
        let path = self.path(path);
        let mut request = self.way.request(request);
        let reply = self.client.post(&path, request.clone())?;
        let would_run = request["target_state"].is_null() || request["target_state"] == "Running";
        let begins_paused = !self.hypervisor.tells_identity && would_run && reply.status == 400;
        if !begins_paused {
            return Ok(Asked { reply, begins_paused });
        }
        request["target_state"] = json!("Paused");
        let reply = self.client.post(&path, request)?;
        Ok(Asked { reply, begins_paused })
    }

    /// Lets a fork run that began paused, as its user would; it is shown as it is then, with the timings of the fork. One that
    /// does not come to it stays as it was shown.
    fn let_run(&self, fork: &mut Value) -> Result<(), Failure> {
        let id = fork["id"].as_str().unwrap_or_default();
        let resumed = self
            .client
            .post(&format!("/instances/{id}/resume"), Value::Null)?;
        if resumed.status == 200 {
            let timings = fork["timings"].take();
            *fork = resumed.body;
            fork["timings"] = timings;
        }
        Ok(())
    }

    /// Asks for many forks at once, all of which have to work.
    pub(super) fn forks(&self, count: usize) -> Result<Vec<Self>, Failure> {
        let made = answered(201, self.try_forks(json!({"count": count}))?)?;
        let entries = made["forks"].as_array().cloned().unwrap_or_default();
        same("forks of one request", count, entries.len())?;
        entries.iter().map(|entry| self.of(&entry["instance"])).collect()
    }

    pub(super) fn try_delete(&self) -> Result<Reply, Failure> {
        Ok(self.client.delete(&self.path(""))?)
    }

    pub(super) fn delete(&self) -> Result<(), Failure> {
        answered(204, self.try_delete()?).map(drop)
    }

    /// That the server does not know it any more.
    pub(super) fn is_gone(&self) -> Result<(), Failure> {
        refused(404, "not_found", self.client.get(&self.path(""))?)?;
        holds(
            !self.dir.exists(),
            format!("the directory of {}", self.name),
            "none",
            &self.dir,
        )
    }

    /// Another instance, as an answer shows it.
    fn of(&self, instance: &Value) -> Result<Self, Failure> {
        let text = |field: &str| instance[field].as_str().unwrap_or_default().to_owned();
        let id = text("id");
        holds(
            !id.is_empty(),
            format!("a fork of {}", self.name),
            "an instance",
            instance.to_string(),
        )?;
        Ok(Self {
            client: self.client.clone(),
            dir: self.dir.with_file_name(&id),
            id,
            name: text("name"),
            way: self.way,
            hypervisor: Arc::clone(&self.hypervisor),
        })
    }
}

/// An answer to a request for forks, and whether they begin paused although they are to run.
#[derive(Debug)]
pub(super) struct Asked {
    reply: Reply,
    begins_paused: bool,
}
