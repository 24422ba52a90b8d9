//! `stencil exec`: a command in a guest, with this program's input, output and terminal.

use std::convert::Infallible;
use std::env;
use std::io::{self, IsTerminal, Write};

use stencil_api::client::{Client, CommandEvent, CommandInput, CommandOutput};
use stencil_api::exec::{CommandEnd, RunCommand, StreamCommand, ToCommand};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::Exec;
use crate::failure::Failure;
use crate::input::standard_input;
use crate::output::{self, Reader};
use crate::terminal::{self, Raw};

pub(super) async fn exec(asked: Exec, client: &Client, reader: Reader) -> Result<(), Failure> {
    let end = match reader {
        Reader::Person => stream(asked, client).await?,
        Reader::Program => {
            let command = RunCommand {
                env: asked.env.into_iter().collect(),
                cwd: asked.cwd,
                timeout: asked.timeout,
                ..RunCommand::new(asked.cmd)
            };
            let result = client.exec(&asked.id, &command).await?;
            reader.print(&result, |_| String::new())?;
            result.end
        }
    };
    match end.code() {
        0 => Ok(()),
        code => Err(Failure::Ended { code }),
    }
}

async fn stream(asked: Exec, client: &Client) -> Result<CommandEnd, Failure> {
    let passes_input = asked.interactive || !io::stdin().is_terminal();
    let mut command = StreamCommand {
        cmd: asked.cmd,
        env: asked.env.into_iter().collect(),
        cwd: asked.cwd,
        timeout: asked.timeout,
        tty: asked.tty.then(terminal::size),
        stdin: passes_input,
    };
    if let (true, Ok(term)) = (asked.tty, env::var("TERM")) {
        command.env.entry("TERM".to_owned()).or_insert(term);
    }
    let (input, output) = client.exec_stream(&asked.id, &command).await?;
    if !asked.tty {
        return tokio::select! {
            end = pass_output(output) => end,
            failure = pass_input(input, passes_input, None) => Err(failure),
        };
    }
    let resizes = signal(SignalKind::window_change()).map_err(Failure::Runtime)?;
    let mut ends = Ends::new().map_err(Failure::Runtime)?;
    // Left before anything is said about how this ended.
    let _raw = if asked.interactive {
        Raw::enter().map_err(Failure::Terminal)?
    } else {
        None
    };
    tokio::select! {
        end = pass_output(output) => end,
        failure = pass_input(input, passes_input, Some(resizes)) => Err(failure),
        signal = ends.any() => Err(Failure::Ended { code: 128 + signal }),
    }
}

async fn pass_output(mut command: CommandOutput) -> Result<CommandEnd, Failure> {
    loop {
        match command.next().await? {
            CommandEvent::Stdout(bytes) => output::write(&bytes)?,
            CommandEvent::Stderr(bytes) => io::stderr().write_all(&bytes).map_err(Failure::Output)?,
            CommandEvent::Exited(end) => return Ok(end),
        }
    }
}

/// Goes on until this program's input cannot be read: that the command is gone, its output tells. The size of the terminal does
/// not wait behind input that the command does not read.
async fn pass_input(command: CommandInput, passes: bool, resizes: Option<Signal>) -> Failure {
    tokio::select! {
        failure = feed(&command, passes) => failure,
        never = pass_sizes(&command, resizes) => match never {},
    }
}

async fn feed(command: &CommandInput, passes: bool) -> Failure {
    let mut input = passes.then(standard_input);
    while let Some(chunks) = &mut input {
        let sent = match chunks.recv().await {
            Some(Ok(bytes)) => command.write(&bytes).await,
            Some(Err(error)) => return Failure::Input(error),
            None => {
                input = None;
                command.tell(ToCommand::StdinClosed).await
            }
        };
        if sent.is_err() {
            break;
        }
    }
    std::future::pending().await
}

async fn pass_sizes(command: &CommandInput, resizes: Option<Signal>) -> Infallible {
    if let Some(mut resizes) = resizes {
        while resizes.recv().await.is_some()
            && command.tell(ToCommand::Resize(terminal::size())).await.is_ok()
        {}
    }
    std::future::pending().await
}

/// The signals that would end this program with its terminal still raw.
struct Ends {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Ends {
    fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The number of the one that came.
    async fn any(&mut self) -> u8 {
        tokio::select! {
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
            _ = self.hang_up.recv() => 1,
        }
    }
}
