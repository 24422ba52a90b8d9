//! One instance, as a scenario handles it: every method expects to succeed, and says so if not.

use std::path::{Path, PathBuf};

use rustix::process::Pid;
use serde_json::{Value, json};

use super::failure::{Failure, answered, holds, refused, same};
use super::way::Way;
use crate::client::{Client, Reply};
use crate::guest_console;

/// How long a state is waited for, in seconds.
const WAIT_SECONDS: u32 = 60;

#[derive(Clone, Debug)]
pub(super) struct Vm {
    client: Client,
    dir: PathBuf,
    pub(super) id: String,
    pub(super) name: String,
    way: Way,
}

impl Vm {
    pub(super) fn new(client: Client, dir: PathBuf, id: String, name: String, way: Way) -> Self {
        Self {
            client,
            dir,
            id,
            name,
            way,
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

    pub(super) fn try_act(&self, operation: &str) -> Result<Reply, Failure> {
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

    pub(super) fn try_fork(&self, request: Value) -> Result<Reply, Failure> {
        Ok(self.client.post(&self.path("/fork"), self.way.request(request))?)
    }

    pub(super) fn fork(&self, request: Value) -> Result<Self, Failure> {
        self.of(&answered(201, self.try_fork(request)?)?)
    }

    pub(super) fn try_forks(&self, request: Value) -> Result<Reply, Failure> {
        Ok(self
            .client
            .post(&self.path("/forks"), self.way.request(request))?)
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
        })
    }
}
