//! Forks of a Linux guest on QEMU: from the request to Running, which is when the guest's agent has acknowledged the fork's epoch,
//! and to the result of a command in it; cold and armed, in turns on one server. Then what a command costs by way of the agent,
//! beside what the guest itself takes to begin a program.

mod show;

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use super::world::World;
use super::{BenchError, MIB};
use crate::armed::was_armed;
use crate::bench::rows::{Bound, Quantiles, Row, Target, milliseconds};
use crate::bench::{Conditions, Told};
use crate::build::Built;
use crate::client::Connection;
use crate::linux::LinuxImage;
use crate::report;

/// The memory of each guest, in bytes.
const MEMORY: u64 = 256 * MIB;
/// How many seconds Linux may take to boot; under emulation, on a busy host, it is slow.
const BOOT_SECONDS: u64 = 100;
const COLD: &str = "cold";
const ARMED: &str = "armed";
/// Commands between two looks at what the guest takes by itself.
const COMMANDS: usize = 10;
/// How often the guest's shell begins a program in a row.
const PROGRAMS: u32 = 50;

/// Forks of one kind.
#[derive(Debug)]
struct Line {
    /// The name of its template, too.
    name: &'static str,
    forks: Vec<Forked>,
    /// From a request for a fork with a command in it to the command's result, in milliseconds.
    echoes: Vec<f64>,
}

/// One fork.
#[derive(Debug)]
struct Forked {
    /// When it was Running, in milliseconds since its request.
    running: f64,
    was_armed: bool,
    /// What the server says that it did, and for how many milliseconds.
    phases: Vec<(String, f64)>,
}

/// One command in a guest that runs, in milliseconds.
#[derive(Debug)]
struct Command {
    /// From its request to its result, as it is seen by who asked.
    took: f64,
    /// The same as the server counts it.
    in_server: f64,
    /// From before the agent forked until it knew of the end, by the guest's clock.
    in_guest: f64,
}

/// What is told of times, in milliseconds.
type Times = (String, Quantiles);

type Part = fn(&Command) -> f64;

/// What a run has found.
#[derive(Debug)]
pub(in crate::bench) struct Findings {
    version: String,
    /// What executes the guests' instructions, `kvm` or `tcg`.
    accelerator: String,
    lines: [Line; 2],
    commands: Vec<Command>,
    /// What the guest's shell takes to fork, to execute `true` and to wait for it, in milliseconds; the mean of many in a row.
    own: Vec<f64>,
}

/// Measures all of it.
pub(in crate::bench) fn measure(
    built: &Built,
    image: &LinuxImage,
    is_quick: bool,
) -> Result<Findings, BenchError> {
    let (rounds, turns) = if is_quick { (10, 4) } else { (100, 20) };
    let world = World::start(built)?;
    let (version, accelerator) = report::step("Linux booted, and two templates made of it", || {
        prepare(&world, image)
    })?;
    let mut lines = [COLD, ARMED].map(|name| Line {
        name,
        forks: Vec::new(),
        echoes: Vec::new(),
    });
    report::step(&format!("{rounds} rounds of forks, cold and armed"), || {
        let bar = report::bar("rounds", rounds);
        for _ in 0..rounds {
            for line in &mut lines {
                line.fork(&world)?;
                line.echo(&world)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok::<_, BenchError>(())
    })?;
    world.arm(ARMED, 0)?;
    let (commands, own) = report::step("commands in a fork that runs", || commands(&world, turns))?;
    for line in lines.iter().rev() {
        world.remove_template(line.name)?;
    }
    world.server.finish()?;
    Ok(Findings {
        version,
        accelerator,
        lines,
        commands,
        own,
    })
}

/// Boots Linux and makes it two templates, which share their memory file; the version of QEMU, and what executes the guests'
/// instructions.
fn prepare(world: &World, image: &LinuxImage) -> Result<(String, String), BenchError> {
    let create = json!({
        "name": COLD, "hypervisor": "qemu", "kernel": image.kernel, "initrd": image.initrd,
        "cmdline": "console=ttyS0", "memory": MEMORY, "readiness": "agent",
    });
    world.expect(world.client.post("/instances", create)?)?;
    let wait = format!("/instances/{COLD}/wait?state=Running&timeout={BOOT_SECONDS}s");
    if world.expect(world.client.get(&wait)?)?["reached"] != true {
        return Err(BenchError::Late {
            what: "Linux".to_owned(),
            seconds: BOOT_SECONDS,
            log: world.server.log_tail(),
        });
    }
    let shown = world.get(COLD)?;
    let text = |value: &Value| value.as_str().unwrap_or("unknown").to_owned();
    let accelerator = text(&shown["accelerator"]);
    world.act(COLD, "standby")?;
    let manifest = world
        .server
        .instances()
        .join(text(&shown["id"]))
        .join("snapshot/manifest.json");
    let manifest = fs::read_to_string(&manifest)
        .and_then(|json| Ok(serde_json::from_str::<Value>(&json)?))
        .map_err(|source| BenchError::Io {
            what: "read",
            path: manifest,
            source,
        })?;
    world.act(COLD, "promote-template")?;
    let fork = json!({"name": ARMED, "target_state": "Standby"});
    world.expect(world.client.post(&format!("/instances/{COLD}/fork"), fork)?)?;
    world.act(ARMED, "promote-template")?;
    world.arm(ARMED, 1)?;
    Ok((text(&manifest["hypervisor_version"]), accelerator))
}

impl Line {
    /// A fork that is asked for alone.
    fn fork(&mut self, world: &World) -> Result<(), BenchError> {
        let (forked, running) = ask(world, &format!("/instances/{}/fork", self.name), json!({}))?;
        if forked["state"] != "Running" {
            return Err(wrong("a fork", &forked));
        }
        world.delete(&[id(&forked)])?;
        self.forks.push(Forked {
            running,
            was_armed: was_armed(&forked),
            phases: super::asking::phases(&forked),
        });
        Ok(())
    }

    /// A fork with a command in it.
    fn echo(&mut self, world: &World) -> Result<(), BenchError> {
        let request = json!({"count": 1, "exec": {"cmd": ["echo", "hi"]}});
        let (made, answered) = ask(world, &format!("/instances/{}/forks", self.name), request)?;
        let fork = &made["forks"][0];
        if fork["exec"]["result"]["stdout"] != "hi\n" {
            return Err(wrong("echo in a fork", fork));
        }
        world.delete(&[id(&fork["instance"])])?;
        self.echoes.push(answered);
        Ok(())
    }

    fn running(&self) -> Quantiles {
        Quantiles::of(self.forks.iter().map(|fork| fork.running))
    }

    fn echoed(&self) -> Quantiles {
        Quantiles::of(self.echoes.iter().copied())
    }
}

/// Asks for a fork when nothing else is being done; the answer, and after how many milliseconds it came.
fn ask(world: &World, path: &str, body: Value) -> Result<(Value, f64), BenchError> {
    // An armed fork that is being prepared would be measured with a cold one.
    world.until_armed(ARMED)?;
    let mut connection = Connection::open(&world.server.data().join("stencil.sock"))?;
    let asked = Instant::now();
    let reply = connection.post(path, body)?;
    let answered = milliseconds(asked.elapsed());
    Ok((world.expect(reply)?, answered))
}

/// Runs `true` again and again in a fork, and in turns with it has the guest's shell do so.
fn commands(world: &World, turns: u64) -> Result<(Vec<Command>, Vec<f64>), BenchError> {
    let fork = world.expect(world.client.post(&format!("/instances/{COLD}/fork"), json!({}))?)?;
    let path = format!("/instances/{}/exec", id(&fork));
    let mut connection = Connection::open(&world.server.data().join("stencil.sock"))?;
    let mut run = |cmd: Value| {
        let asked = Instant::now();
        let reply = connection.post(&path, json!({"cmd": cmd}))?;
        let took = milliseconds(asked.elapsed());
        let result = world.expect(reply)?;
        let in_part = |part: &str| result["timings"][part].as_f64().map(|us| us / 1e3);
        match (
            result["exit_code"].as_u64(),
            in_part("total_us"),
            in_part("guest_us"),
        ) {
            (Some(0), Some(in_server), Some(in_guest)) => Ok(Command {
                took,
                in_server,
                in_guest,
            }),
            _ => Err(wrong(&format!("{cmd} in a fork"), &result)),
        }
    };
    let in_a_row = |programs: u32| {
        let script = format!("n=0; while [ $n -lt {programs} ]; do /bin/true; n=$((n+1)); done");
        json!(["sh", "-c", script])
    };
    // What is done first, an emulator has to translate.
    run(json!(["true"]))?;
    run(in_a_row(1))?;
    let (mut commands, mut own) = (Vec::new(), Vec::new());
    let bar = report::bar("turns", turns);
    for _ in 0..turns {
        for _ in 0..COMMANDS {
            commands.push(run(json!(["true"]))?);
        }
        let (none, many) = (run(in_a_row(0))?, run(in_a_row(PROGRAMS))?);
        own.push((many.in_guest - none.in_guest) / f64::from(PROGRAMS));
        bar.inc(1);
    }
    bar.finish_and_clear();
    world.delete(&[id(&fork)])?;
    Ok((commands, own))
}

fn id(instance: &Value) -> String {
    instance["id"].as_str().unwrap_or_default().to_owned()
}

fn wrong(what: &str, result: &Value) -> BenchError {
    BenchError::Wrong {
        what: what.to_owned(),
        result: result.to_string(),
    }
}

impl Findings {
    fn line(&self, name: &str) -> &Line {
        let [cold, armed] = &self.lines;
        if name == COLD { cold } else { armed }
    }

    fn command(&self, part: Part) -> Quantiles {
        Quantiles::of(self.commands.iter().map(part))
    }

    fn own(&self) -> Quantiles {
        Quantiles::of(self.own.iter().copied())
    }

    /// What a command takes beyond what the guest takes to begin a program.
    fn overhead(&self) -> f64 {
        self.command(|command| command.took).p50 - self.own().p50
    }

    fn of_forks(&self) -> Vec<Times> {
        let of_line = |line: &Line| {
            let fork = format!("{} fork, request to", line.name);
            [
                (format!("{fork} Running"), line.running()),
                (format!("{fork} the result of `echo`"), line.echoed()),
            ]
        };
        self.lines.iter().flat_map(of_line).collect()
    }

    fn of_commands(&self) -> Vec<Times> {
        let parts: [(&str, Part); 3] = [
            ("request to result", |command| command.took),
            ("in the server", |command| command.in_server),
            ("in the guest", |command| command.in_guest),
        ];
        let parts =
            parts.map(|(name, part)| (format!("`true` by way of the agent, {name}"), self.command(part)));
        let own = ("`true` by the guest's own shell".to_owned(), self.own());
        parts.into_iter().chain([own]).collect()
    }

    pub(in crate::bench) fn rows(&self) -> Vec<Row> {
        let times = self.of_forks().into_iter().chain(self.of_commands());
        times
            .map(|(name, quantiles)| Row {
                name: format!("qemu {}, {}: {name}", self.version, self.accelerator),
                unit: "ms",
                quantiles,
            })
            .collect()
    }

    pub(in crate::bench) fn targets(&self) -> Vec<Target> {
        vec![
            Target::new(
                format!("armed fork on {}, request to Running, p50, ms", self.accelerator),
                self.line(ARMED).running().p50,
                Bound::AtMost(60.0),
            ),
            Target::new(
                "`true` by way of the agent, less the guest's own fork and exec, p50, ms",
                self.overhead(),
                Bound::AtMost(5.0),
            ),
        ]
    }
}

/// What there is to tell of it.
pub(in crate::bench) fn tell(conditions: &Conditions, findings: &Findings) -> Told {
    Told {
        rows: findings.rows(),
        targets: findings.targets(),
        section: show::section(conditions, findings),
        drawings: Vec::new(),
    }
}
