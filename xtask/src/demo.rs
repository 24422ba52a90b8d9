//! The demo: a VM is warmed up once, becomes a template, and is forked many times at once. In the first act that is the test
//! guest on the microVM, which takes KVM; in the second it is Linux on QEMU, on any host.

mod forks;
mod linux;
mod proof;

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use crate::client::{Client, ClientError, Reply};
use crate::guest_console::{self, GuestError};
use crate::host;
use crate::report::{self, step};
use crate::server::{Server, ServerError};
use crate::setup::{self, SetupError};
use crate::{TaskError, build};

/// The instance that becomes the template.
const WARM: &str = "warm";
/// How often the warm guest counts before it is put on standby.
const COUNTED: u64 = 3;
/// The pages of its memory that the warm guest fills: 8 MiB.
const PAGES: u64 = 2048;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many forks are asked for at once.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    forks: u32,
    /// Memory of the VM, in bytes or such as 512MiB.
    #[arg(long, default_value = "512MiB", value_name = "SIZE")]
    memory: String,
    /// Where to write the same facts as one JSON object.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// The demo could not be carried to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("{call} was answered with {status}: {message}")]
    Refused {
        call: String,
        status: u16,
        message: String,
    },
    #[error("{WARM} was not ready in {} s", .0.as_secs())]
    NotReady(Duration),
    #[error("`{script}` ended in the guest with {result}")]
    Command { script: String, result: String },
    #[error("forks were not armed in time; is this host short of memory?")]
    NotArmed,
    #[error("could not watch the data directory")]
    Watch(#[from] rustix::io::Errno),
}

/// How long the guest may take from its boot until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// What must hold, and whether it does.
#[derive(Debug, Default)]
struct Checks(Vec<(&'static str, bool)>);

impl Checks {
    /// Takes a check down, and tells it.
    fn add(&mut self, name: &'static str, ok: bool) {
        println!("{} {name}", report::mark(ok));
        self.0.push((name, ok));
    }

    /// Ends the server, whose instances have been deleted: nothing of them is left, and then nothing of it.
    fn finish(&mut self, server: Server) {
        let left = server.left_behind();
        for what in &left {
            println!("  left: {what}");
        }
        self.add(
            "no process and no directory of an instance is left",
            left.is_empty(),
        );
        let ended = server.finish();
        if let Err(error) = &ended {
            println!("  {}", report::chain(error));
        }
        self.add("the server ends and leaves nothing", ended.is_ok());
    }

    fn json(&self) -> Value {
        let checks = self.0.iter().map(|(name, ok)| json!({"name": name, "ok": ok}));
        checks.collect()
    }
}

/// What is known of the template.
#[derive(Clone, Debug)]
struct Template {
    instance: Value,
    counter: u64,
    hash: String,
}

/// The `demo` task; whether all checks hold.
pub(crate) fn run(options: &Options) -> Result<bool, TaskError> {
    let host = setup::prepare()?;
    println!(
        "Stencil on {}, {} cores, {}, Linux {}",
        host.cpu,
        host.cores,
        report::bytes(host.memory_bytes),
        host.kernel
    );
    println!("KVM: {}\n", host.kvm);
    let (kvm, linux) = (host::try_kvm(), setup::prepare_linux());
    let kvm = match (kvm, &linux) {
        (Err(no_kvm), Err(no_linux)) => {
            println!("no Linux guests: {}", report::chain(no_linux));
            return Err(SetupError::from(no_kvm).into());
        }
        (kvm, _) => kvm,
    };
    let mut acts = json!({"host": host.json()});
    let mut checks = Vec::new();
    let built = step("built in release, with the test guest", build::build)?;

    println!("\nFirst act: a small test guest on the microVM");
    if let Err(error) = kvm {
        println!("SKIPPED: {}", report::chain(&error));
        acts["first_act_skipped"] = json!(report::chain(&error));
    } else {
        let facts = show(options, &built)?;
        acts["template"] = facts.template.json();
        acts["forks"] = facts.batch.json().into();
        acts["checks"] = facts.checks.json();
        checks.extend(facts.checks.0);
    }

    println!("\nSecond act: Linux on QEMU");
    if let Err(error) = linux {
        println!("SKIPPED: {}", report::chain(&error));
        acts["second_act_skipped"] = json!(report::chain(&error));
    } else {
        let image = step("packed a Linux with the agent", crate::linux::image)?;
        let facts = linux::show(&built.stencil, &image)?;
        acts["linux"] = facts.json();
        checks.extend(facts.checks.0);
    }
    if let Some(path) = &options.json {
        std::fs::write(path, format!("{acts:#}\n")).map_err(|source| TaskError::Write {
            path: path.clone(),
            source,
        })?;
    }
    let failed = checks.iter().filter(|(_, ok)| !ok).count();
    match failed {
        0 => println!("\nall {} checks hold", checks.len()),
        failed => println!("\n{failed} of {} checks do not hold", checks.len()),
    }
    Ok(failed == 0)
}

/// All that the first act found out.
struct Facts {
    template: Template,
    batch: forks::Batch,
    checks: Checks,
}

fn show(options: &Options, built: &build::Built) -> Result<Facts, DemoError> {
    let server = step("server started on a data directory of its own", || {
        Server::start(&built.stencil)
    })?;
    let client = server.client();
    let template = make_template(&client, options, built)?;
    let mut batch = forks::fork(&server, options.forks, "forks")?;
    step(
        &format!("{} forks armed: prepared, and not named yet", options.forks),
        || forks::arm(&server, options.forks),
    )?;
    let armed = forks::fork(&server, options.forks, "armed forks")?;
    batch.forks.extend(armed.forks);
    batch.print();

    let mut checks = Checks::default();
    checks.add(
        "as many forks run as were asked for",
        batch.forks.len() == 2 * options.forks as usize,
    );
    checks.add(
        "every fork goes on from the template's counter",
        batch
            .forks
            .iter()
            .all(|fork| fork.counter == template.counter + 1),
    );
    checks.add(
        "the generations of the template and its forks all differ",
        proof::generations_differ(&client, &template, &batch)?,
    );
    checks.add(
        "every fork has the template's memory",
        proof::have_memory_of(&client, &template, &batch)?,
    );
    checks.add(
        "no fork sees what another one writes",
        proof::are_isolated(&client, &batch)?,
    );
    checks.add(
        "deleting the template is refused with 409, its forks named",
        proof::delete_is_refused(&client, &batch)?,
    );
    clean_up(&client, &batch)?;
    checks.finish(server);
    Ok(Facts {
        template,
        batch,
        checks,
    })
}

fn make_template(client: &Client, options: &Options, built: &build::Built) -> Result<Template, DemoError> {
    step(
        &format!(
            "created and booted `{WARM}` ({}), its guest is ready",
            options.memory
        ),
        || {
            let create = json!({
                "name": WARM, "kernel": built.guest, "memory": options.memory, "readiness": {"console": "ready epoch="},
            });
            expect(201, client.post("/instances", create)?)?;
            wait_until_running(client, READY_LIMIT)
        },
    )?;
    let hash = step(
        &format!("the guest has counted to {COUNTED} and filled 8 MiB of its memory"),
        || {
            for _ in 0..COUNTED {
                guest_console::ask_for(client, WARM, "counter", "counter")?;
            }
            guest_console::ask_for(client, WARM, &format!("write 0 {PAGES} 42"), "written")?;
            guest_console::ask_for(client, WARM, &format!("hash 0 {PAGES}"), "hash")
        },
    )?;
    step(
        "put on standby: its memory is on disk, its process is gone",
        || act(client, "standby"),
    )?;
    let instance = step("promoted: it is a template", || act(client, "promote-template"))?;
    Ok(Template {
        instance,
        counter: COUNTED,
        hash,
    })
}

/// Deletes the forks, demotes the template and deletes it.
fn clean_up(client: &Client, batch: &forks::Batch) -> Result<(), DemoError> {
    step("forks deleted, template demoted and deleted", || {
        for fork in &batch.forks {
            expect(204, client.delete(&format!("/instances/{}", fork.id))?)?;
        }
        act(client, "demote-template")?;
        expect(204, client.delete(&format!("/instances/{WARM}"))?)
    })?;
    Ok(())
}

/// Waits until the guest that becomes the template is ready.
fn wait_until_running(client: &Client, limit: Duration) -> Result<(), DemoError> {
    let path = format!(
        "/instances/{WARM}/wait?state=Running&timeout={}s",
        limit.as_secs()
    );
    let waited = expect(200, client.get(&path)?)?;
    if waited["reached"] == true {
        Ok(())
    } else {
        Err(DemoError::NotReady(limit))
    }
}

fn act(client: &Client, operation: &str) -> Result<Value, DemoError> {
    expect(
        200,
        client.post(&format!("/instances/{WARM}/{operation}"), Value::Null)?,
    )
}

fn expect(status: u16, reply: Reply) -> Result<Value, DemoError> {
    if reply.status == status {
        return Ok(reply.body);
    }
    let message = reply.body["message"]
        .as_str()
        .map_or_else(|| reply.body.to_string(), str::to_owned);
    Err(DemoError::Refused {
        call: reply.call,
        status: reply.status,
        message,
    })
}

impl Template {
    fn json(&self) -> Value {
        let mut template = self.instance.clone();
        template["counter"] = json!(self.counter);
        template["memory_hash"] = json!(self.hash);
        template
    }
}
