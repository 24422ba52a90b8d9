//! A server of its own, with templates whose hot pages are known.

use std::cell::Cell;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use hyper::Method;
use serde_json::{Value, json};

use super::BenchError;
use crate::build::Built;
use crate::client::{Body, Client, Reply};
use crate::server::Server;

/// How long something may take that takes some seconds at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether it is there.
const TICK: Duration = Duration::from_millis(2);
/// After how long it is asked again for armed forks that do not come.
const AGAIN: Duration = Duration::from_secs(2);
/// How many calls are made at a time where many instances are dealt with; each waits for its guest or its VMM's end.
const AT_A_TIME: usize = 8;

/// Where the servers' directories lie: in memory, where the host has such a place.
///
/// On ext4 a run of this benchmark would be measured by the next one: while the file system remembers inodes that were
/// deleted in the last minutes (`recently_deleted` in fs/ext4/ialloc.c of Linux), it passes over all of them each time
/// it makes a file, which then takes up to a millisecond. A fork makes seven files.
pub(super) fn place() -> PathBuf {
    let shared_memory = PathBuf::from("/dev/shm");
    if shared_memory.is_dir() {
        shared_memory
    } else {
        std::env::temp_dir()
    }
}

/// The server, and who talks to it.
#[derive(Debug)]
pub(super) struct World {
    pub(super) server: Server,
    pub(super) client: Client,
    guest: PathBuf,
}

impl World {
    pub(super) fn start(built: &Built) -> Result<Self, BenchError> {
        Self::start_with(built, Vec::new())
    }

    /// The same, with options of `stencil serve`.
    pub(super) fn start_with(built: &Built, options: Vec<OsString>) -> Result<Self, BenchError> {
        let server = Server::start_in(place(), &built.stencil, options)?;
        Ok(Self {
            client: server.client(),
            guest: built.guest.clone(),
            server,
        })
    }

    /// Defines an instance, and boots it if `start`.
    pub(super) fn create(&self, name: &str, memory: u64, start: bool) -> Result<Value, BenchError> {
        let create = json!({
            "name": name, "kernel": self.guest, "memory": memory, "start": start,
            "readiness": {"console": "ready epoch="},
        });
        self.expect(self.client.post("/instances", create)?)
    }

    /// Makes a template of a guest that has booted and done nothing. Its hot pages are recorded: its next fork gets them.
    pub(super) fn template(&self, name: &str, memory: u64) -> Result<(), BenchError> {
        self.create(name, memory, true)?;
        let waited = format!(
            "/instances/{name}/wait?state=Running&timeout={}s",
            PATIENCE.as_secs()
        );
        if self.expect(self.client.get(&waited)?)?["reached"] != true {
            return Err(self.late(format!("the guest of {name}")));
        }
        self.act(name, "standby")?;
        self.act(name, "promote-template")?;
        let recording = self.expect(
            self.client
                .post(&format!("/instances/{name}/fork"), Value::Null)?,
        )?;
        let recording = recording["id"].as_str().unwrap_or_default();
        // Pausing it closes its recording.
        self.act(recording, "pause")?;
        self.until_hot_pages(name)?;
        self.delete(&[recording.to_owned()])
    }

    /// Boots an instance on a hypervisor; its guest is not asked whether it is ready.
    pub(super) fn boot(&self, name: &str, hypervisor: &str, memory: u64) -> Result<(), BenchError> {
        let create = json!({"name": name, "hypervisor": hypervisor, "kernel": self.guest, "memory": memory});
        self.expect(self.client.post("/instances", create)?).map(drop)
    }

    /// Waits until the hot pages of a template are known.
    pub(super) fn until_hot_pages(&self, template: &str) -> Result<(), BenchError> {
        self.until(&format!("the list of hot pages of {template}"), || {
            Ok(self.get(template)?["hot_pages"] == true)
        })
    }

    /// Keeps `count` forks of a template prepared, and waits until they are.
    pub(super) fn arm(&self, template: &str, count: u32) -> Result<(), BenchError> {
        self.set_armed(template, &json!(count))?;
        self.until_armed(template)
    }

    fn set_armed(&self, template: &str, count: &Value) -> Result<(), BenchError> {
        let path = format!("/instances/{template}");
        let body = Body::Json(json!({"armed": count}));
        self.expect(self.client.call(Method::PATCH, &path, body)?)
            .map(drop)
    }

    /// Waits until as many forks of a template are prepared as are to be. Those that went when the host was short of
    /// memory are made again when somebody asks.
    pub(super) fn until_armed(&self, template: &str) -> Result<(), BenchError> {
        let asked = Cell::new(Instant::now());
        self.until(&format!("armed forks of {template}"), || {
            let armed = &self.get(template)?["armed"];
            let all = armed["ready"].is_u64() && armed["ready"] == armed["target"];
            if !all && asked.get().elapsed() > AGAIN {
                asked.set(Instant::now());
                self.set_armed(template, &armed["target"])?;
            }
            Ok(all)
        })
    }

    fn until(&self, what: &str, there: impl Fn() -> Result<bool, BenchError>) -> Result<(), BenchError> {
        let deadline = Instant::now() + PATIENCE;
        while !there()? {
            if Instant::now() > deadline {
                return Err(self.late(what.to_owned()));
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn late(&self, what: String) -> BenchError {
        BenchError::Late {
            what,
            seconds: PATIENCE.as_secs(),
            log: self.server.log_tail(),
        }
    }

    /// An instance as the server shows it.
    pub(super) fn get(&self, name: &str) -> Result<Value, BenchError> {
        self.expect(self.client.get(&format!("/instances/{name}"))?)
    }

    pub(super) fn act(&self, name: &str, operation: &str) -> Result<Value, BenchError> {
        let path = format!("/instances/{name}/{operation}");
        self.expect(self.client.post(&path, Value::Null)?)
    }

    pub(super) fn delete(&self, ids: &[String]) -> Result<(), BenchError> {
        let deleted = in_parallel(ids, |id| {
            self.expect(self.client.delete(&format!("/instances/{id}"))?)
        });
        deleted.map(drop)
    }

    /// Removes a template that has no forks.
    pub(super) fn remove_template(&self, name: &str) -> Result<(), BenchError> {
        self.act(name, "demote-template")?;
        self.delete(&[name.to_owned()])
    }

    /// Ends the server. What it has of instances at rest goes with its directory.
    pub(super) fn terminate(mut self) -> Result<(), BenchError> {
        Ok(self.server.terminate()?)
    }

    /// The body of an answer that is no refusal.
    pub(super) fn expect(&self, reply: Reply) -> Result<Value, BenchError> {
        if (200..300).contains(&reply.status) {
            return Ok(reply.body);
        }
        Err(BenchError::Api {
            call: reply.call,
            status: reply.status,
            body: reply.body.to_string(),
            log: self.server.log_tail(),
        })
    }
}

/// Does something with all of them, a few at a time; what came of it, in their order.
pub(super) fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    act: impl Fn(&T) -> Result<R, BenchError> + Sync,
) -> Result<Vec<R>, BenchError> {
    let left = Mutex::new(items.iter().enumerate());
    let work = || {
        let mut done = Vec::new();
        loop {
            let next = left.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some((index, item)) = next else {
                return Ok(done);
            };
            done.push((index, act(item)?));
        }
    };
    let done = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_A_TIME.min(items.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let joined = workers.into_iter().map(|worker| {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        joined.collect::<Result<Vec<_>, BenchError>>()
    })?;
    let mut done: Vec<(usize, R)> = done.into_iter().flatten().collect();
    done.sort_by_key(|(index, _)| *index);
    Ok(done.into_iter().map(|(_, result)| result).collect())
}
