//! When the agent is killed, silent or not there, and when the server is.

use std::time::{Duration, Instant};

use serde_json::json;

use super::{Failure, Linux, MEMORY, Scenario, Vm, answered, disks, holds, outputs, same};
use crate::linux;

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "linux that was paused has the host's time when its processes go on",
        paused_keeps_time,
    ),
    (
        "a server that was killed finds the guest's agent again",
        server_comes_back,
    ),
    (
        "an agent that is killed, silent or speaks nonsense costs a command, and no guest",
        agent_comes_back,
    ),
    ("a linux without an agent says so, and runs no command", no_agent),
    (
        "a command in a fork of a linux that is stopped waits until it has booted",
        waits_for_boot,
    ),
    (
        "forks that were to go after their work go when the server is killed amid it",
        work_ends_with_its_server,
    ),
];

/// How long an agent may take to be back.
const BACK_LIMIT: Duration = Duration::from_secs(60);

/// An init that starts the agent as a service, and again when it ends, but for as long as it is held.
const SERVICE: &str = "#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in $(cat /lib/modules/list); do insmod $module; done
while :; do stencil-agent; sleep 0.2; while [ -e /run/held ]; do sleep 0.1; done; done
";

/// Kills the agent and says a million random bytes in its place, as soon as the port is free. Nobody hears what else it says.
const NONSENSE: &str = "exec >/dev/null 2>&1; touch /run/held; kill -KILL $(pidof stencil-agent)
until head -c 1000000 /dev/urandom >/dev/vport0p1; do sleep 0.1; done; touch /run/said; rm /run/held";

/// An init that knows of no agent.
const WITHOUT: &str = "#!/bin/sh
mount -t proc proc /proc
echo no agent here
while :; do sleep 1000; done
";

fn server_comes_back(linux: &mut Linux) -> Result<(), Failure> {
    let fork = linux.template.fork(json!({}))?;
    let uuid = fork.sh("cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id; hostname")?;
    let count = fork.counter()?;
    linux.world.server.kill9()?;
    linux.world.server.start_again()?;
    let again = fork.sh("cat /proc/sys/kernel/random/boot_id; cat /etc/machine-id; hostname")?;
    same("what the guest is, after the server came back", uuid, again)?;
    fork.counts_on_from(count)?;
    // The template is one as before.
    linux.template.fork(json!({}))?.counts_on_from(linux.count)
}

fn agent_comes_back(linux: &mut Linux) -> Result<(), Failure> {
    let image = linux::image_with_service(SERVICE)?;
    let vm = linux.boot("service", &image, json!("agent"))?;
    vm.wait_for_boot()?;
    let exec = vm.path("/exec");
    let run = |script: &str| {
        let asked = json!({"cmd": ["sh", "-c", script], "timeout": "2s"});
        linux.world.client.post(&exec, asked)
    };
    // It stands still for longer than the server waits for the command's end.
    let reply = run(
        "(sleep 10; kill -CONT $(pidof stencil-agent)) & kill -STOP $(pidof stencil-agent); echo heard by nobody",
    )?;
    same("a command of a silent agent", "agent_lost", reply.code())?;
    vm.is_in("Running")?;
    runs_commands_again(&vm)?;
    let reply = run("kill -KILL $(pidof stencil-agent)")?;
    same("a command whose agent was killed", "agent_lost", reply.code())?;
    vm.is_in("Running")?;
    runs_commands_again(&vm)?;
    let reply = run(NONSENSE)?;
    same("a command before nonsense", "agent_lost", reply.code())?;
    runs_commands_again(&vm)?;
    vm.sh("test -e /run/said")?;
    vm.is_in("Running")?;
    // Nor does one keep its guest from being stopped that does not hear that it is to power off.
    let reply = run("kill -STOP $(pidof stencil-agent)")?;
    same("the last command", "agent_lost", reply.code())?;
    vm.act("stop")?;
    vm.is_in("Stopped")
}

/// That commands can be run again some time after the agent was lost. Each try waits for the agent a while itself.
fn runs_commands_again(vm: &Vm) -> Result<(), Failure> {
    let deadline = Instant::now() + BACK_LIMIT;
    loop {
        let reply = vm
            .client
            .post(&vm.path("/exec"), json!({"cmd": ["echo", "back"]}))?;
        if reply.status == 200 || Instant::now() > deadline {
            return same(
                "what it wrote",
                json!("back\n"),
                answered(200, reply)?["stdout"].clone(),
            );
        }
    }
}

fn no_agent(linux: &mut Linux) -> Result<(), Failure> {
    let image = linux::image_without_agent(WITHOUT)?;
    let vm = linux.boot("without", &image, json!({"console": "no agent here"}))?;
    vm.wait_for_boot()?;
    same(
        "its agent",
        json!("absent"),
        vm.show()?["agent"]["status"].clone(),
    )?;
    let reply = linux
        .world
        .client
        .post(&vm.path("/exec"), json!({"cmd": ["true"]}))?;
    same("exec", (409, "no_agent"), (reply.status, reply.code()))
}

fn waits_for_boot(linux: &mut Linux) -> Result<(), Failure> {
    let cold = linux.world.create(json!({
        "name": "cold", "hypervisor": "qemu", "image": disks::IMAGE, "memory": MEMORY, "start": false,
    }))?;
    let asked = json!({"count": 1, "exec": {"cmd": ["hostname"], "timeout": "180s"}, "delete_after": true});
    let made = answered(201, cold.try_forks(asked)?)?;
    same(
        "what the command wrote",
        vec!["cold-1\n".to_owned()],
        outputs(&made)?,
    )
}

fn work_ends_with_its_server(linux: &mut Linux) -> Result<(), Failure> {
    let source = linux.template.clone();
    let asked = std::thread::spawn(move || {
        let work = json!({"cmd": ["sleep", "1000"], "timeout": "600s"});
        source.try_forks(json!({"count": 2, "exec": work, "delete_after": true}))
    });
    let deadline = Instant::now() + BACK_LIMIT;
    loop {
        let all = linux.world.list()?;
        let running = all.iter().filter(|instance| instance["state"] == "Running");
        let running = running.count();
        if running == 2 || Instant::now() > deadline {
            same("forks that run", 2, running)?;
            break;
        }
    }
    linux.world.server.kill9()?;
    let reply = asked
        .join()
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    holds(reply.is_err(), "the call", "cut off", reply.is_ok())?;
    linux.world.server.start_again()?;
    same("instances of the next server", 1, linux.world.list()?.len())
}

fn paused_keeps_time(linux: &mut Linux) -> Result<(), Failure> {
    /// More than a clock may be off.
    const PAUSED: Duration = Duration::from_secs(3);
    let fork = linux.template.fork(json!({}))?;
    // It notes the time whenever it has jumped.
    fork.sh(
        "(last=$(date +%s); touch /run/began; while :; do now=$(date +%s); [ $((now - last)) -lt 2 ] || echo $now >>/run/jumps; last=$now; \
         sleep 0.1; done) >/dev/null 2>&1 &
         until [ -e /run/began ]; do sleep 0.1; done",
    )?;
    fork.act("pause")?;
    // Nothing is waited for but that time passes.
    std::thread::sleep(PAUSED);
    fork.act("resume")?;
    fork.has_the_time()?;
    // The first thing that its processes see is the right time: one jump, and not a slow start from the old one.
    let jumps = fork.sh("until [ -e /run/jumps ]; do sleep 0.1; done; wc -l </run/jumps")?;
    same("how often its clock jumped", "1", jumps.trim())?;
    // A server that was killed amid a pause leaves that to the next.
    fork.act("pause")?;
    linux.world.server.kill9()?;
    linux.world.server.start_again()?;
    std::thread::sleep(PAUSED);
    fork.act("resume")?;
    fork.wait("Running")?;
    fork.has_the_time()
}
