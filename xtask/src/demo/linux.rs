//! The second act: Linux is booted once and warmed up, and 8 machines go on from there, each as itself.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use comfy_table::{CellAlignment, Table};
use serde_json::{Value, json};

use super::forks::RULED;
use super::{Checks, DemoError, WARM, act, expect, wait_until_running};
use crate::client::Client;
use crate::linux::{LinuxImage, shell};
use crate::report::step;
use crate::server::Server;

const IMAGE: &str = "debian";
const MEMORY: &str = "256MiB";
const FORKS: u32 = 8;
/// How long Linux may take to boot; under emulation, on a busy host, it is slow.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// What is asked of each fork.
const ASKED: &str = "cat /proc/sys/kernel/random/uuid; hostname; date; tail -n 1 /run/count; cat /run/token";

/// What the act found out.
#[derive(Debug)]
pub(super) struct Facts {
    template: Value,
    /// What executes the guests' instructions, `kvm` or `tcg`.
    accelerator: String,
    boot: Duration,
    forks: Vec<Fork>,
    pub(super) checks: Checks,
}

#[derive(Debug)]
struct Fork {
    id: String,
    name: String,
    uuid: String,
    host_name: String,
    date: String,
    count: u64,
    token: String,
    /// From the command's request to its result, as the server counts it.
    exec_us: u64,
    /// How far its clock is from the host's at least.
    clock_off: Option<Duration>,
    /// Its count, somewhat later.
    later: u64,
}

/// Plays the act, on a server of its own.
pub(super) fn show(stencil: &Path, image: &LinuxImage) -> Result<Facts, DemoError> {
    let server = step("server started on a data directory of its own", || {
        Server::start(stencil)
    })?;
    let client = server.client();
    add_image(&client, image)?;
    let (boot, accelerator) = boot(&client)?;
    let (token, count) = step(
        "the guest has a file in a tmpfs, and a process that counts",
        || {
            run(&client, WARM, shell::WARM_UP)?;
            let told = run(&client, WARM, "cat /run/token; tail -n 1 /run/count")?;
            let mut lines = told.lines().map(str::to_owned);
            let token = lines.next().unwrap_or_default();
            Ok::<_, DemoError>((token, number(lines.next())))
        },
    )?;
    step(
        "put on standby: its memory is on disk, its process is gone",
        || act(&client, "standby"),
    )?;
    let template = step("promoted: it is a template", || act(&client, "promote-template"))?;
    let mut forks = step(
        &format!("{FORKS} forks made by one request, and a command run in each"),
        || fork(&client),
    )?;
    step("each fork asked once more, for its clock and its count", || {
        forks.iter_mut().try_for_each(|fork| look_again(&client, fork))
    })?;
    print(&forks);

    let mut checks = Checks::default();
    let all = |holds: fn(&Fork) -> bool| forks.iter().all(holds);
    let distinct = |of: fn(&Fork) -> &str| {
        let values: HashSet<&str> = forks.iter().map(of).filter(|value| !value.is_empty()).collect();
        values.len() == FORKS as usize
    };
    checks.add("each fork of Linux has another uuid", distinct(|fork| &fork.uuid));
    checks.add(
        "each has another host name, which is its own",
        distinct(|fork| &fork.host_name) && all(|fork| fork.host_name == fork.name),
    );
    checks.add(
        "the clock of each is within a second of the host's",
        all(|fork| fork.clock_off.is_some_and(|off| off <= shell::CLOCK_LIMIT)),
    );
    checks.add(
        "the process that counted in the template counts on in each",
        forks
            .iter()
            .all(|fork| fork.count >= count && fork.later > fork.count),
    );
    checks.add(
        "the template's file is in the tmpfs of each",
        !token.is_empty() && forks.iter().all(|fork| fork.token == token),
    );
    step("forks, template and image deleted", || clean_up(&client, &forks))?;
    checks.finish(server);
    Ok(Facts {
        template,
        accelerator,
        boot,
        forks,
        checks,
    })
}

fn add_image(client: &Client, image: &LinuxImage) -> Result<(), DemoError> {
    step(&format!("kernel and initrd added as image `{IMAGE}`"), || {
        let add = json!({"name": IMAGE, "kernel": image.kernel, "initrd": image.initrd, "cmdline": "console=ttyS0"});
        expect(201, client.post("/images", add)?).map(drop)
    })
}

/// Boots Linux and waits for its agent; how long that took, and what executes its instructions.
fn boot(client: &Client) -> Result<(Duration, String), DemoError> {
    let began = Instant::now();
    step(
        &format!("created and booted `{WARM}` ({MEMORY}), its agent is ready"),
        || {
            let create = json!({
                "name": WARM, "hypervisor": "qemu", "image": IMAGE, "memory": MEMORY, "readiness": "agent",
            });
            expect(201, client.post("/instances", create)?)?;
            wait_until_running(client, BOOT_LIMIT)
        },
    )?;
    let took = began.elapsed();
    let shown = expect(200, client.get(&format!("/instances/{WARM}"))?)?;
    let accelerator = shown["accelerator"].as_str().unwrap_or_default().to_owned();
    println!("  its instructions are executed by {accelerator}");
    Ok((took, accelerator))
}

fn fork(client: &Client) -> Result<Vec<Fork>, DemoError> {
    let request = json!({"count": FORKS, "exec": {"cmd": ["sh", "-c", ASKED], "timeout": "60s"}});
    let made = expect(201, client.post(&format!("/instances/{WARM}/forks"), request)?)?;
    let entries = made["forks"].as_array().into_iter().flatten();
    let forks = entries.map(|entry| {
        let result = &entry["exec"]["result"];
        let mut lines = result["stdout"]
            .as_str()
            .unwrap_or_default()
            .lines()
            .map(str::to_owned);
        let mut line = || lines.next().unwrap_or_default();
        Fork {
            id: entry["instance"]["id"].as_str().unwrap_or_default().to_owned(),
            name: entry["name"].as_str().unwrap_or_default().to_owned(),
            uuid: line(),
            host_name: line(),
            date: line(),
            count: number(Some(line())),
            token: line(),
            exec_us: result["timings"]["total_us"].as_u64().unwrap_or_default(),
            clock_off: None,
            later: 0,
        }
    });
    Ok(forks.collect())
}

/// Compares its clock with the host's before and after, and looks at its count again.
fn look_again(client: &Client, fork: &mut Fork) -> Result<(), DemoError> {
    let before = SystemTime::now();
    let told = run(
        client,
        &fork.id,
        &format!("{}; sleep 0.2; tail -n 1 /run/count", shell::CLOCK),
    )?;
    let after = SystemTime::now();
    let mut lines = told.lines();
    let clock = lines.next().unwrap_or_default();
    fork.clock_off = shell::clock_off(clock, before, after);
    fork.later = number(lines.next().map(str::to_owned));
    Ok(())
}

/// Runs a script in a guest; what it wrote.
fn run(client: &Client, instance: &str, script: &str) -> Result<String, DemoError> {
    let asked = json!({"cmd": ["sh", "-c", script], "timeout": "60s"});
    let result = expect(200, client.post(&format!("/instances/{instance}/exec"), asked)?)?;
    if result["exit_code"] == 0 {
        Ok(result["stdout"].as_str().unwrap_or_default().to_owned())
    } else {
        Err(DemoError::Command {
            script: script.to_owned(),
            result: result.to_string(),
        })
    }
}

fn number(line: Option<String>) -> u64 {
    line.and_then(|line| line.parse().ok()).unwrap_or_default()
}

fn print(forks: &[Fork]) {
    let mut table = Table::new();
    table.load_style(RULED);
    table.set_header([
        "hostname",
        "/proc/sys/kernel/random/uuid",
        "date",
        "counter",
        "later",
    ]);
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for fork in forks {
        table.add_row([
            fork.host_name.clone(),
            fork.uuid.clone(),
            fork.date.clone(),
            fork.count.to_string(),
            fork.later.to_string(),
        ]);
    }
    println!("\n{table}");
    println!("counter: of a process that the template's guest started; later: the same, asked once more.\n");
}

fn clean_up(client: &Client, forks: &[Fork]) -> Result<(), DemoError> {
    for fork in forks {
        expect(204, client.delete(&format!("/instances/{}", fork.id))?)?;
    }
    act(client, "demote-template")?;
    expect(204, client.delete(&format!("/instances/{WARM}"))?)?;
    expect(204, client.delete(&format!("/images/{IMAGE}"))?).map(drop)
}

impl Facts {
    pub(super) fn json(&self) -> Value {
        let forks = self.forks.iter().map(|fork| {
            json!({
                "name": fork.name, "id": fork.id, "host_name": fork.host_name, "uuid": fork.uuid, "date": fork.date,
                "counter": fork.count, "later": fork.later, "token": fork.token, "exec_us": fork.exec_us,
                "clock_off_ms": fork.clock_off.map(|off| off.as_secs_f64() * 1e3),
            })
        });
        json!({
            "template": self.template, "accelerator": self.accelerator, "boot_ms": self.boot.as_secs_f64() * 1e3,
            "forks": forks.collect::<Vec<_>>(), "checks": self.checks.json(),
        })
    }
}
