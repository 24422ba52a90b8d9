//! Who may ask: pages in browsers may not, and over TCP only those who know a token and call the server by a name of its own.

use std::fs;
use std::net::SocketAddr;

use hyper::Method;
use stencil_api::client::{Client, ClientError};
use stencil_api::exec::StreamCommand;
use stencil_api::server::{Listen, ServeError, Server, Tokens};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::world::{World, open, refusal};

const TOKEN: &str = "a-token-of-this-test";

struct Tcp {
    dir: TempDir,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

fn tokens(dir: &TempDir) -> Tokens {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.path().join("tokens");
    fs::write(&path, format!("another-token-of-it\n{TOKEN}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    Tokens::load(&path).unwrap()
}

impl Tcp {
    async fn new(has_tokens: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let engine = open(&data).await.unwrap();
        let listen = Listen {
            address: "127.0.0.1:0".parse().unwrap(),
            tokens: has_tokens.then(|| tokens(&dir)),
            allow_hosts: vec!["stencil.example".to_owned()],
        };
        let server = Server::bind(engine, &data.join("stencil.sock"), Some(listen))
            .await
            .unwrap()
            .allow_origins(vec!["https://panel.example".to_owned()]);
        let address = server.tcp_address().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(server.run(async move {
            let _ = stopped.await;
        }));
        Self {
            dir,
            address,
            stop,
            served,
        }
    }

    fn client(&self, token: Option<&str>) -> Client {
        Client::over_tcp(&format!("http://{}", self.address), token).unwrap()
    }

    /// The status of the reply to a request with these headers, each with its line end.
    async fn status(&self, headers: &str) -> u16 {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET /health HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply.split(' ').nth(1).unwrap().parse().unwrap()
    }
}

#[tokio::test]
async fn a_web_page_may_not_ask_unless_its_origin_is_allowed() {
    let world = World::new().await;
    for path in ["/instances", "/instances/web/exec", "/health"] {
        for method in ["GET", "POST", "DELETE"] {
            let request = format!(
                "{method} {path} HTTP/1.1\r\nhost: localhost\r\norigin: https://evil.example\r\ncontent-length: 0\r\n\
                 connection: close\r\n\r\n"
            );
            let reply = world.say(request.as_bytes()).await;
            assert!(
                reply.starts_with("HTTP/1.1 403 ") && reply.contains("\"forbidden\""),
                "{reply}"
            );
        }
    }
    let tcp = Tcp::new(false).await;
    for (origin, status) in [
        ("https://evil.example", 403),
        ("null", 403),
        ("https://panel.example.evil.example", 403),
        ("https://panel.example", 200),
    ] {
        let headers = format!("host: localhost\r\norigin: {origin}\r\n");
        assert_eq!(tcp.status(&headers).await, status, "{origin}");
    }
}

#[tokio::test]
async fn over_tcp_a_name_that_is_not_the_servers_own_is_refused() {
    let tcp = Tcp::new(false).await;
    for (headers, status) in [
        ("host: evil.example\r\n", 403),
        ("host: evil.example:8080\r\n", 403),
        ("host: localhost.evil.example\r\n", 403),
        ("", 403),
        ("host: localhost\r\nhost: evil.example\r\n", 403),
        ("host: localhost:80\r\n", 200),
        ("host: LOCALHOST\r\n", 200),
        ("host: 127.0.0.1\r\n", 200),
        ("host: [::1]:8080\r\n", 200),
        ("host: Stencil.Example:443\r\n", 200),
    ] {
        let answered = tcp.status(headers).await;
        // HTTP itself refuses a request of HTTP/1.1 without the header, or with two of them.
        assert!(
            answered == status || (status == 403 && answered == 400),
            "{headers}: {answered}"
        );
    }
    let mut stream = TcpStream::connect(tcp.address).await.unwrap();
    let absolute = "GET http://evil.example/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(absolute.as_bytes()).await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 403 "), "{reply}");
}

#[tokio::test]
async fn over_tcp_a_token_is_asked_for_and_either_header_takes_it() {
    let tcp = Tcp::new(true).await;
    for (headers, status) in [
        (String::new(), 401),
        (format!("authorization: Basic {TOKEN}\r\n"), 401),
        (format!("authorization: Bearer {TOKEN}x\r\n"), 401),
        (format!("authorization: Bearer {}\r\n", &TOKEN[1..]), 401),
        ("authorization: Bearer \r\n".to_owned(), 401),
        ("x-api-key: \r\n".to_owned(), 401),
        (format!("authorization: Bearer {TOKEN}\r\n"), 200),
        (format!("authorization: bearer {TOKEN}\r\n"), 200),
        (format!("x-api-key: {TOKEN}\r\n"), 200),
        ("x-api-key: another-token-of-it\r\n".to_owned(), 200),
    ] {
        let status_is = tcp.status(&format!("host: localhost\r\n{headers}")).await;
        assert_eq!(status_is, status, "{headers}");
    }
    let stranger = tcp.client(None);
    assert_eq!(
        refusal(stranger.list(&Default::default()).await),
        (401, "unauthorized".to_owned())
    );
    let command = StreamCommand::default();
    assert_eq!(
        refusal(stranger.exec_stream("web", &command).await.map(|_| ())),
        (401, "unauthorized".to_owned())
    );
    let known = tcp.client(Some(TOKEN));
    assert_eq!(known.list(&Default::default()).await.unwrap().len(), 0);
    // The Unix socket has its mode instead.
    let local = Client::new(tcp.dir.path().join("data/stencil.sock"));
    assert_eq!(local.health().await.unwrap().status, "ok");
    tcp.stop.send(()).unwrap();
    tcp.served.await.unwrap();
    assert!(matches!(known.health().await, Err(ClientError::NoServer { .. })));
}

#[tokio::test]
async fn an_address_that_others_can_reach_takes_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let engine = open(&data).await.unwrap();
    let listen = Listen {
        address: "0.0.0.0:0".parse().unwrap(),
        tokens: None,
        allow_hosts: Vec::new(),
    };
    let refused = Server::bind(engine, &data.join("stencil.sock"), Some(listen)).await;
    assert!(matches!(refused, Err(ServeError::Open { .. })), "{refused:?}");
    assert!(!data.join("stencil.sock").exists());
}

#[tokio::test]
async fn a_body_of_a_kind_that_any_page_can_send_is_refused() {
    let world = World::new().await;
    for (path, body) in [
        ("/instances", "{}"),
        ("/instances/web/start", "{}"),
        ("/instances/web/exec", "{\"cmd\": [\"true\"]}"),
        ("/instances/web/console", "reboot\n"),
    ] {
        for content_type in [
            None,
            Some("text/plain"),
            Some("application/x-www-form-urlencoded"),
        ] {
            let reply = world.ask(Method::POST, path, content_type, body).await;
            assert_eq!(reply.status, 400, "{path} {content_type:?}: {reply:?}");
            let message = reply.body["message"].as_str().unwrap();
            assert!(message.starts_with("the content-type is "), "{message}");
        }
    }
}

#[tokio::test]
async fn a_thousand_silent_connections_over_tcp_take_nothing_from_anybody() {
    let tcp = Tcp::new(true).await;
    let mut silent = Vec::new();
    for number in 0..1000 {
        let mut stream = TcpStream::connect(tcp.address).await.unwrap();
        // Half a head, or nothing.
        if number % 2 == 0 {
            stream
                .write_all(b"GET /health HTTP/1.1\r\nhost: loc")
                .await
                .unwrap();
        }
        silent.push(stream);
    }
    let local = Client::new(tcp.dir.path().join("data/stencil.sock"));
    for _ in 0..20 {
        local.health().await.unwrap();
    }
    // They are hung up on, and whoever has something to say has his turn.
    assert_eq!(tcp.client(Some(TOKEN)).health().await.unwrap().status, "ok");
    let mut said = Vec::new();
    // It ends, whether with a word or by a reset.
    let _ = silent[0].read_to_end(&mut said).await;
    assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 408 "), "{said:?}");
}

#[tokio::test]
async fn addresses_and_tokens_that_cannot_be_are_told() {
    for (url, expected) in [
        ("localhost:8080", "it does not begin with http:// and a host"),
        ("https://stencil.example", "let a proxy on this host do that"),
        ("http://host/path", "something follows the host"),
        ("http:// host", "it is no URL"),
    ] {
        let said = Client::over_tcp(url, None).unwrap_err().to_string();
        assert!(
            said.contains(expected) && said.contains("http://10.0.0.7:8080"),
            "{said}"
        );
    }
    assert!(matches!(
        Client::over_tcp("http://localhost:1", Some("with\nline")),
        Err(ClientError::BadToken)
    ));
}
