//! Many forks at once: asked for by one request, and watched while they arrive; of new processes, and of armed ones.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use serde_json::{Value, json};

use super::{DemoError, WARM, expect};
use crate::armed::was_armed;
use crate::arrivals::{Arrival, Arrivals};
use crate::client::{ClientError, Reply};
use crate::server::Server;
use crate::{guest_console, report};

/// A rule above, below and under the header.
pub(super) const RULED: TableStyle = TableStyle::new()
    .top_border(LineStyle::none().fill('─').junction('─'))
    .header_separator(LineStyle::none().fill('─').junction('─'))
    .bottom_border(LineStyle::none().fill('─').junction('─'));

/// How long forks may take to be armed; on a host that is short of memory none are.
const ARM_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether the reply has come while no fork is heard of.
const TICK: Duration = Duration::from_millis(50);

/// The forks of one request or more.
#[derive(Debug)]
pub(super) struct Batch {
    pub(super) forks: Vec<Fork>,
}

#[derive(Debug)]
pub(super) struct Fork {
    pub(super) id: String,
    name: String,
    was_armed: bool,
    /// From the request to its reply, which comes when every guest of the request is ready.
    reply: Duration,
    pub(super) generation: String,
    /// From the request until the guest's first line was in its console; `None` if it was not seen.
    first_line: Option<Duration>,
    /// What the guest answered to `counter`.
    pub(super) counter: u64,
    private_bytes: u64,
    shared_bytes: u64,
    /// What the server says of where the time went.
    timings: Value,
}

/// Lets the template keep `count` forks prepared.
pub(super) fn arm(server: &Server, count: u32) -> Result<(), DemoError> {
    let client = server.client();
    let path = format!("/instances/{WARM}");
    expect(200, client.patch(&path, json!({"armed": count}))?)?;
    let deadline = Instant::now() + ARM_LIMIT;
    while expect(200, client.get(&path)?)?["armed"]["ready"] != count {
        if Instant::now() > deadline {
            return Err(DemoError::NotArmed);
        }
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// Asks for `count` forks of the template by one request.
pub(super) fn fork(server: &Server, count: u32, what: &str) -> Result<Batch, DemoError> {
    let client = server.client();
    let mut arrivals = Arrivals::watch(&server.instances())?;
    let bar = report::bar("forks whose guest has spoken", count.into());
    let (asked, heard, reply) = std::thread::scope(|scope| {
        let asked = Instant::now();
        let client = &client;
        let request = scope.spawn(move || {
            let reply = client.post(&format!("/instances/{WARM}/forks"), json!({"count": count}));
            (reply, asked.elapsed())
        });
        let mut heard = HashMap::new();
        while heard.len() < count as usize {
            let over = request.is_finished();
            match arrivals.next_by(Instant::now() + TICK)? {
                Some((at, Arrival::Awake(id))) => {
                    heard.insert(id, at);
                    bar.inc(1);
                }
                Some((_, Arrival::Named(_))) => {}
                // Every guest that is ready has spoken before the reply.
                None if over => break,
                None => {}
            }
        }
        let reply = request
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok::<
            (
                Instant,
                HashMap<String, Instant>,
                (Result<Reply, ClientError>, Duration),
            ),
            DemoError,
        >((asked, heard, reply))
    })?;
    bar.finish_and_clear();
    let (answer, reply) = reply;
    let made = expect(201, answer?)?;
    println!(
        "{} {:<58} {:>8}",
        report::mark(true),
        format!("{count} {what} asked for at once, by one request"),
        report::duration(reply)
    );
    let mut forks = Vec::new();
    for entry in made["forks"].as_array().into_iter().flatten() {
        let text = |field: &str| entry["instance"][field].as_str().unwrap_or_default().to_owned();
        let id = text("id");
        // Before anything is asked of the guest: what a fork costs that has just begun.
        let shown = expect(200, client.get(&format!("/instances/{id}"))?)?;
        let bytes = |field: &str| shown["memory_use"][field].as_u64().unwrap_or_default();
        forks.push(Fork {
            name: text("name"),
            was_armed: was_armed(&shown),
            reply,
            generation: text("generation"),
            first_line: heard.get(&id).map(|at| *at - asked),
            counter: 0,
            private_bytes: bytes("private"),
            shared_bytes: bytes("shared"),
            timings: shown["timings"].clone(),
            id,
        });
    }
    for fork in &mut forks {
        let counter = guest_console::ask_for(&client, &fork.id, "counter", "counter")?;
        fork.counter = counter.parse().unwrap_or_default();
    }
    Ok(Batch { forks })
}

impl Batch {
    pub(super) fn print(&self) {
        let mut table = Table::new();
        table.load_style(RULED);
        table.set_header([
            "fork",
            "of",
            "guest's first line",
            "reply",
            "private",
            "shared",
            "counter",
            "generation",
        ]);
        for column in table.column_iter_mut().skip(2).take(5) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        for fork in &self.forks {
            table.add_row([
                fork.name.clone(),
                if fork.was_armed { "armed" } else { "new process" }.to_owned(),
                fork.first_line
                    .map_or_else(|| "not seen".to_owned(), report::duration),
                report::duration(fork.reply),
                report::bytes(fork.private_bytes),
                report::bytes(fork.shared_bytes),
                fork.counter.to_string(),
                // The whole of it is in the JSON; so much tells them apart.
                fork.generation.chars().take(8).collect(),
            ]);
        }
        println!("\n{table}");
        println!(
            "first line: from the request until the guest, awake in its fork, had printed to its console."
        );
        println!("reply: to the one request for so many; it comes when every guest is ready.");
        println!("armed: prepared before it was asked for.\n");
    }

    pub(super) fn json(&self) -> Vec<Value> {
        let milliseconds = |duration: Duration| duration.as_secs_f64() * 1e3;
        let forks = self.forks.iter().map(|fork| {
            json!({
                "name": fork.name, "id": fork.id, "generation": fork.generation, "counter": fork.counter,
                "first_line_ms": fork.first_line.map(milliseconds), "reply_ms": milliseconds(fork.reply), "armed": fork.was_armed,
                "private_bytes": fork.private_bytes, "shared_bytes": fork.shared_bytes, "timings": fork.timings,
            })
        });
        forks.collect()
    }
}
