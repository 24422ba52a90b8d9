//! The fake's snapshots, and how a VM comes back from one.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;

use super::http::{Reply, error, reply};
use super::receiver::receive;
use super::{Fake, MEMORY_MANAGER, Vm, json_of, listen_for_the_guest, memory_manager, memory_size};
use crate::directory::fixture;
use crate::replayer::recorded;

impl Fake {
    pub(super) fn snapshot(&mut self, directory: &Path) -> Reply {
        let Some(vm) = self.vm.as_mut().filter(|vm| vm.state == "Paused") else {
            return recorded("snapshot-while-running");
        };
        if vm.coming > 0 {
            vm.coming -= 1;
            return error("VM on-demand memory restore is still in progress");
        }
        let Ok(mut entries) = fs::read_dir(directory) else {
            return recorded("snapshot-missing-directory");
        };
        if entries.next().is_some() {
            return error("the directory is not empty");
        }
        let mut state = json_of(&fixture("cloud-hypervisor/state.json"));
        let mut memory = memory_manager(&state);
        let size = memory_size(&vm.config);
        memory["memory_ranges"]["data"][0]["length"] = size.into();
        memory["guest_ram_mappings"][0]["size"] = size.into();
        *state.pointer_mut(MEMORY_MANAGER).unwrap() = memory.to_string().into();
        fs::write(directory.join("config.json"), vm.config.to_string()).unwrap();
        fs::write(directory.join("state.json"), state.to_string()).unwrap();
        let ranges = File::create(directory.join("memory-ranges")).unwrap();
        ranges.set_len(size).unwrap();
        ranges.write_all_at(&vm.counter.to_le_bytes(), 0).unwrap();
        recorded("snapshot")
    }

    pub(super) fn restore(&mut self, directory: &Path, is_lazy: bool) -> Reply {
        if self.vm.is_some() {
            return recorded("restore-twice");
        }
        if !directory.is_dir() {
            return recorded("restore-missing-directory");
        }
        let config = json_of(&directory.join("config.json"));
        let memory = memory_manager(&json_of(&directory.join("state.json")));
        let mapping = &memory["guest_ram_mappings"][0];
        let (zone, size) = (&config["memory"]["zones"][0], mapping["size"].as_u64().unwrap());
        let ranges = memory["memory_ranges"]["data"].as_array().unwrap();
        let (file, offset, how) = match zone["file"].as_str() {
            // What is read goes over what is mapped.
            _ if !ranges.is_empty() && is_lazy => (directory.join("memory-ranges"), 0, "lazy"),
            _ if !ranges.is_empty() => (directory.join("memory-ranges"), 0, "copied"),
            Some(file) => (file.into(), mapping["file_offset"].as_u64().unwrap(), "mapped"),
            None => return error("the memory is nowhere"),
        };
        let Ok(file) = File::open(file) else {
            return error("the memory file cannot be opened");
        };
        if file.metadata().unwrap().len() < offset + size {
            return error("the memory file is too short");
        }
        if let Err(refused) = listen_for_the_guest(&config) {
            return refused;
        }
        let mut counter = [0; 8];
        file.read_exact_at(&mut counter, offset).unwrap();
        self.vm = Some(Vm {
            config,
            state: "Paused",
            counter: u64::from_le_bytes(counter),
            memory: how,
            coming: if is_lazy { 3 } else { 0 },
            served: None,
        });
        recorded("restore")
    }

    pub(super) fn receive_migration(&mut self, url: &str) -> Reply {
        let Some(received) = receive(url, &self.faults) else {
            return error("Migration was aborted");
        };
        self.vm = Some(Vm {
            config: received.config,
            state: "Paused",
            counter: 0,
            memory: "served",
            coming: 0,
            served: Some(received.memory),
        });
        reply(204, &Value::Null)
    }
}
