//! Runs the binary; starts servers and ends them.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// What a command did.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// Its output as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|_| panic!("this is no JSON: {self:?}"))
    }
}

/// The binary, without anything from the environment of who runs the tests.
pub(crate) fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stencil"));
    command
        .current_dir(directory)
        .env_clear()
        .env("HOME", directory)
        .stdin(Stdio::null());
    command
}

pub(crate) fn done(command: &mut Command) -> Done {
    let output = command.output().unwrap();
    Done {
        code: output.status.code().expect("it exits by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What passes for a VMM and for a kernel as long as nothing is booted.
pub(crate) fn place_vmms(directory: &Path) {
    place(directory, "microvm", "stencil-microvm 0.1.0");
    let kernel = include_bytes!("../../../../fixtures/pvh-note.elf");
    fs::write(directory.join("guest.elf"), kernel).unwrap();
}

/// A program that prints a line.
pub(crate) fn place(directory: &Path, name: &str, line: &str) {
    fs::write(directory.join(name), format!("#!/bin/sh\necho {line}\n")).unwrap();
    fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o755)).unwrap();
}

/// A server process on a directory of its own, ended with the test.
pub(crate) struct Server {
    pub(crate) dir: TempDir,
    process: Child,
    log: BufReader<ChildStderr>,
    /// Where it listens.
    said: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        place_vmms(dir.path());
        Self::start_in(dir)
    }

    /// Returns when it has said that it listens.
    pub(crate) fn start_in(dir: TempDir) -> Self {
        Self::start_with(dir, |_| {})
    }

    /// The same, with a command that is changed before it is run.
    pub(crate) fn start_with(dir: TempDir, change: impl FnOnce(&mut Command)) -> Self {
        let mut serve = command(dir.path());
        serve.args(["serve", "--data", "data", "--microvm", "microvm"]);
        change(&mut serve);
        let mut process = serve.stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("listening on ") {
            let read = log.read_line(&mut said).unwrap();
            assert_ne!(read, 0, "the server ended: {said}");
        }
        let said = said.lines().last().unwrap_or_default().to_owned();
        Self {
            dir,
            process,
            log,
            said,
        }
    }

    /// Its address over TCP, which it has said.
    pub(crate) fn url(&self) -> String {
        let (_, url) = self.said.split_once(" and ").unwrap();
        url.to_owned()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("data/stencil.sock")
    }

    /// A command of a client, in the server's directory.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = command(self.dir.path());
        command.args(words).env("STENCIL_SOCKET", self.socket());
        command
    }

    pub(crate) fn run(&self, words: &[&str]) -> Done {
        done(&mut self.command(words))
    }

    /// An instance that is not started.
    pub(crate) fn create(&self, name: &str) {
        let created = self.run(&["create", name, "--kernel", "guest.elf", "--no-start"]);
        assert_eq!(created.code, 0, "{created:?}");
    }

    /// Sends the signal and waits for the end: the exit code, the rest of the log, and the directory.
    pub(crate) fn end(mut self, signal: Signal) -> (Option<i32>, String, TempDir) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
        let mut rest = String::new();
        while self.log.read_line(&mut rest).unwrap() > 0 {}
        let code = self.process.wait().unwrap().code();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap());
        (code, rest, dir)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
