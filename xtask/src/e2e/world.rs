//! What a scenario has: a server of its own, and ways to make instances of the test guest on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::failure::{Failure, answered, holds};
use super::vm::Vm;
use super::way::Way;
use crate::build::Built;
use crate::client::{Client, Reply};
use crate::hypervisor::Hypervisor;
use crate::report;
use crate::server::Server;

/// Memory of an instance for which it does not matter.
const MEMORY: &str = "64MiB";
/// Instances that a failed scenario tells of.
const TOLD: usize = 4;

#[derive(Debug)]
pub(super) struct World {
    pub(super) server: Server,
    pub(super) client: Client,
    pub(super) stencil: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) hypervisor: Arc<Hypervisor>,
    way: Way,
}

impl World {
    pub(super) fn new(built: &Built, hypervisor: &Arc<Hypervisor>, way: Way) -> Result<Self, Failure> {
        let options = [hypervisor.serve_options.clone(), way.options()].concat();
        let server = Server::start_with(&built.stencil, options)?;
        let client = server.client();
        Ok(Self {
            server,
            client,
            stencil: built.stencil.clone(),
            kernel: built.guest.clone(),
            hypervisor: Arc::clone(hypervisor),
            way,
        })
    }

    /// Another server like this one's with more options, in a directory of its own in `parent`.
    pub(super) fn another_in(&self, parent: PathBuf, more: &[&str]) -> Result<Self, Failure> {
        let mut options = [self.hypervisor.serve_options.clone(), self.way.options()].concat();
        options.extend(more.iter().map(Into::into));
        let server = Server::start_in(parent, &self.stencil, options)?;
        let client = server.client();
        Ok(Self {
            server,
            client,
            stencil: self.stencil.clone(),
            kernel: self.kernel.clone(),
            hypervisor: Arc::clone(&self.hypervisor),
            way: self.way,
        })
    }

    /// The body of a create request for the test guest. It says when it is ready, after each restore too, which takes that
    /// it is told of it.
    pub(super) fn request(&self, name: &str) -> Value {
        let readiness = if self.hypervisor.tells_identity {
            json!({"console": "ready epoch="})
        } else {
            json!("none")
        };
        json!({
            "name": name, "hypervisor": self.hypervisor.name, "kernel": self.kernel, "memory": MEMORY,
            "readiness": readiness,
        })
    }

    /// The scenario is about guests that are told who they are.
    pub(super) fn needs_identity(&self) -> Result<(), Failure> {
        self.needs(
            self.hypervisor.tells_identity,
            "does not tell a fork's guest that it is a new machine",
        )
    }

    /// The scenario is about VMMs that stay when their guest has powered off or died.
    pub(super) fn needs_shutdown(&self) -> Result<(), Failure> {
        self.needs(
            self.hypervisor.outlives_guest,
            "does not outlive its guest, so that no instance is Shutdown",
        )
    }

    /// The scenario is about guests that end by a fault.
    pub(super) fn needs_faults(&self) -> Result<(), Failure> {
        self.needs(
            self.hypervisor.tells_faults(),
            "does not tell a triple fault from a reset that the guest asked for",
        )
    }

    /// The scenario is about VMs that were booted and are as before that.
    pub(super) fn needs_unboot(&self) -> Result<(), Failure> {
        self.needs(
            self.hypervisor.unboots(),
            "has no way back to the moment before a boot, in which an instance is Created",
        )
    }

    /// The state of an instance whose guest has powered off.
    pub(super) fn when_down(&self) -> &'static str {
        if self.hypervisor.outlives_guest {
            "Shutdown"
        } else {
            "Stopped"
        }
    }

    /// The scenario is about this memory mode, or what rests on it.
    pub(super) fn needs_mode(&self, mode: &str) -> Result<(), Failure> {
        self.needs(self.has_mode(mode), &format!("has no memory mode {mode}"))
    }

    pub(super) fn has_mode(&self, mode: &str) -> bool {
        self.hypervisor.memory_modes.iter().any(|has| has == mode)
    }

    fn needs(&self, able: bool, lack: &str) -> Result<(), Failure> {
        if able {
            return Ok(());
        }
        Err(Failure::Skipped(format!("{} {lack}", self.hypervisor.name)))
    }

    /// The same, with fields added or replaced.
    pub(super) fn request_with(&self, name: &str, fields: Value) -> Value {
        let mut request = self.request(name);
        for (field, value) in fields.as_object().into_iter().flatten() {
            request[field] = value.clone();
        }
        request
    }

    pub(super) fn try_create(&self, request: Value) -> Result<Reply, Failure> {
        Ok(self.client.post("/instances", request)?)
    }

    pub(super) fn create(&self, request: Value) -> Result<Vm, Failure> {
        let made = answered(201, self.try_create(request)?)?;
        self.vm(&made)
    }

    /// The instance that an answer shows.
    pub(super) fn vm(&self, instance: &Value) -> Result<Vm, Failure> {
        let text = |field: &str| instance[field].as_str().map(str::to_owned);
        match (text("id"), text("name")) {
            (Some(id), Some(name)) => Ok(Vm::new(
                self.client.clone(),
                self.server.instances().join(&id),
                id,
                name,
                self.way,
                Arc::clone(&self.hypervisor),
            )),
            _ => Err(Failure::Unexpected {
                what: "an instance".to_owned(),
                expected: "an id and a name".to_owned(),
                found: instance.to_string(),
            }),
        }
    }

    /// An instance whose guest is ready.
    pub(super) fn running(&self, name: &str) -> Result<Vm, Failure> {
        let vm = self.create(self.request(name))?;
        vm.wait("Running")?;
        Ok(vm)
    }

    /// An instance that has worked and is on standby.
    pub(super) fn standby(&self, name: &str) -> Result<Vm, Failure> {
        let vm = self.running(name)?;
        vm.count()?;
        vm.act("standby")?;
        Ok(vm)
    }

    /// A template whose guest has worked before.
    pub(super) fn template(&self, name: &str) -> Result<Vm, Failure> {
        let vm = self.standby(name)?;
        vm.act("promote-template")?;
        Ok(vm)
    }

    /// All instances.
    pub(super) fn list(&self) -> Result<Vec<Value>, Failure> {
        let list = answered(200, self.client.get("/instances")?)?;
        // A bare list, or one in an object that names it.
        let instances = list.as_array().or_else(|| list["instances"].as_array());
        instances.cloned().ok_or_else(|| Failure::Unexpected {
            what: "GET /instances".to_owned(),
            expected: "a list".to_owned(),
            found: list.to_string(),
        })
    }

    /// That nothing was made and nothing is left: no instance, no directory, no process.
    pub(super) fn is_empty(&self) -> Result<(), Failure> {
        let listed = self.list()?;
        holds(listed.is_empty(), "instances", "none", &listed)?;
        let left = self.server.left_behind();
        holds(left.is_empty(), "processes and directories", "none", &left)
    }

    /// Deletes what there is, forks before their templates: nothing may be left.
    pub(super) fn clear(&self) -> Result<(), Failure> {
        loop {
            let mut refused = None;
            let mut deleted = 0;
            for instance in self.list()? {
                let id = instance["id"].as_str().unwrap_or_default();
                let reply = self.client.delete(&format!("/instances/{id}"))?;
                if reply.status == 204 {
                    deleted += 1;
                } else {
                    refused = Some(reply);
                }
            }
            match refused {
                None => return self.is_empty(),
                // A template goes after its forks: in the next round.
                Some(_) if deleted > 0 => {}
                Some(reply) => answered(204, reply).map(drop)?,
            }
        }
    }

    /// Ends the server, of which nothing may be left.
    pub(super) fn finish(self) -> Result<(), Failure> {
        Ok(self.server.finish()?)
    }

    /// What the server and its VMMs said last.
    pub(super) fn last_words(&self) -> String {
        let mut words = format!("the server's log ends with:\n{}", self.server.log_tail());
        let instances = std::fs::read_dir(self.server.instances())
            .into_iter()
            .flatten()
            .flatten();
        for instance in instances.take(TOLD) {
            words.push_str(&tail(&instance.path(), "vmm.log"));
            words.push_str(&tail(&instance.path(), "console.log"));
        }
        words
    }
}

fn tail(directory: &Path, file: &str) -> String {
    let path = directory.join(file);
    match std::fs::read(&path) {
        Ok(content) => {
            let content = String::from_utf8_lossy(&content).into_owned();
            let lines: Vec<&str> = content.lines().collect();
            let name = directory.file_name().unwrap_or_default().to_string_lossy();
            format!(
                "\n{name}/{file} ends with:\n{}",
                lines[lines.len().saturating_sub(4)..].join("\n")
            )
        }
        Err(error) => format!("\n{}: {}", path.display(), report::chain(&error)),
    }
}
