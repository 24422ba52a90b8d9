//! Sees instances arrive, from outside the server: by inotify on its data directory, whose layout is documented in
//! docs/architecture.md. An instance is made in `.new-<id>` and renamed; its guest prints to `console.log` in it.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};

use crate::processes;

/// What the test guest prints once it is awake in a restored VM.
const AWAKE: &str = "ready epoch=restore";
/// How the directory of a fork begins that is no instance yet.
pub(crate) const NEW_PREFIX: &str = ".new-";

/// Something that was seen of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Arrival {
    /// Its directory has taken its name: from now on it is an instance.
    Named(String),
    /// Its guest has printed its first line after it was restored.
    Awake(String),
}

/// Watches for instances that are made from now on.
#[derive(Debug)]
pub(crate) struct Arrivals {
    instances: PathBuf,
    inotify: OwnedFd,
    /// The ids of those whose guest has not been heard, by watch.
    unheard: HashMap<i32, String>,
    seen: Vec<(Instant, Arrival)>,
}

impl Arrivals {
    /// Watches the `instances` directory of a data directory.
    pub(crate) fn watch(instances: &Path) -> rustix::io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&inotify, instances, WatchFlags::CREATE | WatchFlags::MOVED_TO)?;
        let mut arrivals = Self {
            instances: instances.to_owned(),
            inotify,
            unheard: HashMap::new(),
            seen: Vec::new(),
        };
        // A fork that is kept prepared has its directory already, and its guest has not run.
        let there = std::fs::read_dir(instances)
            .map_err(|error| rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO))?;
        for entry in there.flatten() {
            if let Some(id) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.strip_prefix(NEW_PREFIX))
            {
                arrivals.listen_to(id.to_owned());
            }
        }
        Ok(arrivals)
    }

    /// Watches what the guest of an instance prints; its watch, unless it is gone again already.
    fn listen_to(&mut self, id: String) -> Option<i32> {
        let directory = self.directory(&id)?;
        let watch =
            inotify::add_watch(&self.inotify, directory, WatchFlags::CREATE | WatchFlags::MODIFY).ok()?;
        self.unheard.insert(watch, id);
        Some(watch)
    }

    /// What is seen next, and when; `None` if it is nothing until the deadline.
    pub(crate) fn next_by(&mut self, deadline: Instant) -> rustix::io::Result<Option<(Instant, Arrival)>> {
        while self.seen.is_empty() {
            if !processes::readable_by(&self.inotify, deadline)? {
                return Ok(None);
            }
            self.read_events()?;
        }
        Ok(Some(self.seen.remove(0)))
    }

    fn read_events(&mut self) -> rustix::io::Result<()> {
        let now = Instant::now();
        let mut new = Vec::new();
        let mut printed = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            let event = match events.next() {
                Ok(event) => event,
                Err(rustix::io::Errno::WOULDBLOCK) => break,
                Err(error) => return Err(error),
            };
            if self.unheard.contains_key(&event.wd()) {
                printed.push(event.wd());
                continue;
            }
            let name = event
                .file_name()
                .map(|name| OsStr::from_bytes(name.to_bytes()).to_string_lossy().into_owned());
            match name {
                Some(name) if event.events().contains(ReadFlags::MOVED_TO) && !name.starts_with('.') => {
                    self.seen.push((now, Arrival::Named(name)));
                }
                Some(name) if event.events().contains(ReadFlags::CREATE) => {
                    new.extend(name.strip_prefix(NEW_PREFIX).map(str::to_owned));
                }
                _ => {}
            }
        }
        for id in new {
            // It may have printed before it was watched.
            printed.extend(self.listen_to(id));
        }
        for watch in printed {
            if self.unheard.get(&watch).is_some_and(|id| self.is_awake(id))
                && let Some(id) = self.unheard.remove(&watch)
            {
                // The directory's further events tell nothing new; one that was deleted has no watch any more.
                let _ = inotify::remove_watch(&self.inotify, watch);
                self.seen.push((now, Arrival::Awake(id)));
            }
        }
        Ok(())
    }

    /// The directory of an instance, under whichever of its two names it has by now.
    fn directory(&self, id: &str) -> Option<PathBuf> {
        let [new, named] = [
            self.instances.join(format!("{NEW_PREFIX}{id}")),
            self.instances.join(id),
        ];
        if new.exists() {
            Some(new)
        } else {
            Some(named).filter(|named| named.exists())
        }
    }

    fn is_awake(&self, id: &str) -> bool {
        // Renamed in between, it is found at the second attempt.
        (0..2).any(|_| {
            let log = self
                .directory(id)
                .and_then(|directory| std::fs::read_to_string(directory.join("console.log")).ok());
            log.is_some_and(|log| log.lines().any(|line| line.starts_with(AWAKE)))
        })
    }
}
