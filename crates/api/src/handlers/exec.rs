//! Commands in a guest: run to their end, or with their input and output on a WebSocket.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{FromRequestParts, State};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use stencil_engine::{Agent, Engine, ExecEvent, ExecEvents, ExecInput, ExecSession, Output};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::body::{Json, Reference};
use crate::closing::Closing;
use crate::error::ApiError;
use crate::exec::{
    CommandResult, FromCommand, MESSAGE_LIMIT, RunCommand, STDERR, STDIN, STDIN_WINDOW, STDOUT,
    StreamCommand, ToCommand,
};

/// How long a client may take to say what is to be run.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// How long a client that has heard the end may take to hang up.
const LINGER: Duration = Duration::from_secs(5);
/// How often a client is asked whether it is there: one that has gone is noticed even while its command takes no input.
const PING: Duration = Duration::from_secs(5);
/// How many bytes of input the command is given at a time.
const FEED: usize = 32 << 10;
/// So many bytes of input are taken before more is granted: a grant is a message of its own. What is left of the window is more
/// than a message can have.
const GRANT: u32 = STDIN_WINDOW / 4;

pub(crate) async fn run(
    State(engine): State<Engine>,
    State(closing): State<Closing>,
    Reference(id): Reference,
    Json(asked): Json<RunCommand>,
) -> Result<axum::Json<CommandResult>, ApiError> {
    let request = asked.request()?;
    tokio::select! {
        output = engine.exec(&id, request) => Ok(axum::Json(output?.into())),
        () = closing.begun() => Err(ApiError::shutting_down()),
    }
}

/// A request that is to become a WebSocket.
pub(crate) struct Upgrade(WebSocketUpgrade);

impl<S: Send + Sync> FromRequestParts<S> for Upgrade {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, ApiError> {
        // Browsers let any page open a WebSocket to any server, and say whose page it is.
        let upgrade = WebSocketUpgrade::from_request_parts(parts, state).await;
        upgrade.map(Self).map_err(|rejection: WebSocketUpgradeRejection| {
            ApiError::invalid(format!(
                "{}; this is a WebSocket, and POST runs a command to its end",
                rejection.body_text()
            ))
        })
    }
}

pub(crate) async fn stream(
    State(engine): State<Engine>,
    State(closing): State<Closing>,
    Reference(id): Reference,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, ApiError> {
    // Asked now, so that a refusal is a reply with a status.
    let agent = engine.agent(&id).await?;
    let upgrade = upgrade
        .max_message_size(MESSAGE_LIMIT)
        .max_frame_size(MESSAGE_LIMIT);
    Ok(upgrade.on_upgrade(move |socket| converse(socket, agent, closing)))
}

type Sink = SplitSink<WebSocket, Message>;
type Source = SplitStream<WebSocket>;

/// The client has gone: there is nobody to tell anything.
struct Gone;

/// Why a conversation ends early.
enum Cut {
    Gone,
    Error(ApiError),
}

impl From<Gone> for Cut {
    fn from(_: Gone) -> Self {
        Self::Gone
    }
}

impl<E: Into<ApiError>> From<E> for Cut {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

async fn converse(socket: WebSocket, agent: Agent, closing: Closing) {
    let (mut sink, mut source) = socket.split();
    let ended = tokio::select! {
        ended = serve(&mut sink, &mut source, &agent) => ended,
        () = closing.begun() => Err(Cut::Error(ApiError::shutting_down())),
    };
    let farewell = async {
        match ended {
            Ok(()) => {}
            Err(Cut::Gone) => return,
            Err(Cut::Error(error)) => {
                if tell(&mut sink, &error.into()).await.is_err() {
                    return;
                }
            }
        }
        // Who has hung up meanwhile has heard everything. Who still writes hears it only if what he writes is taken.
        let _ = sink.close().await;
        while let Some(Ok(_)) = source.next().await {}
    };
    // Who does not read is not waited for.
    let _ = timeout(LINGER, farewell).await;
}

/// Runs what the client asks for until its end. Dropped, or ended early, it kills the command.
async fn serve(sink: &mut Sink, source: &mut Source, agent: &Agent) -> Result<(), Cut> {
    let asked = match timeout(FIRST_MESSAGE, next(source)).await {
        Ok(message) => message?,
        Err(_elapsed) => {
            return Err(Cut::Error(ApiError::invalid(format!(
                "the first message did not arrive within {FIRST_MESSAGE:?}"
            ))));
        }
    };
    let Message::Text(asked) = asked else {
        return Err(Cut::Error(ApiError::invalid(
            "the first message is binary; it takes a text that says what to run",
        )));
    };
    let asked: StreamCommand = parse(&asked)?;
    let ExecSession {
        pid,
        mut events,
        input,
    } = agent.exec(asked.into()).await?;
    tell(sink, &FromCommand::Started { pid }).await?;
    // What the client sends lies here until the command takes it, so that what follows it is heard.
    let (waiting, mut taken) = tokio::io::duplex(STDIN_WINDOW as usize);
    let credit = Credit::default();
    tokio::select! {
        ended = pass_output(sink, &mut events, &credit, agent) => ended,
        cut = hear(source, waiting, &input) => Err(cut),
        never = feed(&mut taken, &input, &credit) => match never {},
    }
}

/// How much more input the client may send, which it was not told yet.
#[derive(Default)]
struct Credit {
    bytes: AtomicU32,
    is_worth_telling: Notify,
}

impl Credit {
    fn add(&self, bytes: u32) {
        if self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes >= GRANT {
            self.is_worth_telling.notify_one();
        }
    }

    async fn next(&self) -> u32 {
        self.is_worth_telling.notified().await;
        self.bytes.swap(0, Ordering::Relaxed)
    }
}

async fn pass_output(
    sink: &mut Sink,
    events: &mut ExecEvents,
    credit: &Credit,
    agent: &Agent,
) -> Result<(), Cut> {
    let mut pings = interval(PING);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            bytes = credit.next() => {
                tell(sink, &FromCommand::StdinCredit(bytes)).await?;
                continue;
            }
            _ = pings.tick() => {
                send(sink, Message::Ping(Bytes::new())).await?;
                continue;
            }
        };
        match event {
            Some(Ok(ExecEvent::Output(stream, bytes))) => {
                let mut message = BytesMut::with_capacity(1 + bytes.len());
                message.put_u8(match stream {
                    Output::Stdout => STDOUT,
                    Output::Stderr => STDERR,
                });
                message.put(bytes);
                send(sink, Message::Binary(message.freeze())).await?;
            }
            Some(Ok(ExecEvent::Exited(exited))) => tell(sink, &FromCommand::Exited(exited.into())).await?,
            Some(Err(why)) => return Err(agent.lost(why).into()),
            None => return Ok(()),
        }
    }
}

/// Gives the command what waits, as it takes it.
async fn feed(taken: &mut DuplexStream, input: &ExecInput, credit: &Credit) -> Infallible {
    let mut chunk = vec![0; FEED];
    loop {
        // What comes after the end of the command has nobody to read it. In memory nothing breaks.
        match taken.read(&mut chunk).await {
            Ok(0) | Err(_) => {
                let _ = input.close().await;
                return std::future::pending().await;
            }
            Ok(read) => {
                let _ = input.write(&chunk[..read]).await;
                // It is at most a chunk.
                credit.add(u32::try_from(read).unwrap_or(u32::MAX));
            }
        }
    }
}

/// Ends only when the client has gone or is not understood: its command may end without having read everything.
async fn hear(source: &mut Source, waiting: DuplexStream, input: &ExecInput) -> Cut {
    // Until the input's end.
    let mut waiting = Some(waiting);
    loop {
        let message = match next(source).await {
            Ok(message) => message,
            Err(gone) => return gone.into(),
        };
        // What comes after the end of the command has nobody to read it.
        match &message {
            Message::Binary(bytes) => match bytes.split_first() {
                Some((&STDIN, bytes)) => {
                    if let Some(waiting) = &mut waiting {
                        // Its other end goes with this one.
                        let _ = waiting.write_all(bytes).await;
                    }
                }
                _ => {
                    return Cut::Error(ApiError::invalid(
                        "a binary message begins with 0, for standard input",
                    ));
                }
            },
            Message::Text(text) => match parse(text) {
                Ok(ToCommand::Resize(size)) => drop(input.resize(size.into()).await),
                Ok(ToCommand::Signal(signal)) => drop(input.signal(signal).await),
                Ok(ToCommand::StdinClosed) => waiting = None,
                Err(error) => return Cut::Error(error),
            },
            Message::Ping(_) | Message::Pong(_) | Message::Close(_) => {}
        }
    }
}

/// The next message of the client that says something.
async fn next(source: &mut Source) -> Result<Message, Gone> {
    loop {
        match source.next().await {
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
            Some(Ok(message)) => return Ok(message),
        }
    }
}

fn parse<'a, T: serde::Deserialize<'a>>(text: &'a str) -> Result<T, ApiError> {
    serde_json::from_str(text)
        .map_err(|error| ApiError::invalid(format!("the message is not as expected: {error}")))
}

async fn tell(sink: &mut Sink, said: &FromCommand) -> Result<(), Gone> {
    // It has no maps with keys that are no text.
    let text = serde_json::to_string(said).map_err(|_| Gone)?;
    send(sink, Message::Text(text.into())).await
}

async fn send(sink: &mut Sink, message: Message) -> Result<(), Gone> {
    sink.send(message).await.map_err(|_broken| Gone)
}
