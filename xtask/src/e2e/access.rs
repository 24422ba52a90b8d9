//! Who may ask over TCP.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;

use super::Scenario;
use super::failure::{Failure, answered, holds, same};
use super::world::World;
use crate::server::Server;

pub(super) const SCENARIOS: &[Scenario] = &[(
    "over TCP a VM is not told of or stopped by strangers and web pages, and a thousand silent connections cost nobody his turn",
    strangers,
)];

/// Connections that say nothing or half of something.
const SILENT: usize = 1000;

fn strangers(world: &mut World) -> Result<(), Failure> {
    let scratch = tempfile::tempdir().map_err(Failure::file(std::env::temp_dir()))?;
    let tokens = scratch.path().join("tokens");
    let mut options = world.hypervisor.serve_options.clone();
    options.extend(["--listen", "127.0.0.1:0", "--token-file"].map(Into::into));
    options.push(tokens.clone().into_os_string());
    let server = Server::start_with(&world.stencil, options)?;
    let token = fs::read_to_string(&tokens).map_err(Failure::file(&tokens))?;
    let token = token.trim_end();
    let log = server.log_tail();
    let address = log
        .rsplit_once("http://")
        .and_then(|(_, rest)| rest.lines().next());
    let address = address.unwrap_or_default();

    let client = server.client();
    answered(201, client.post("/instances", world.request("web"))?)?;
    let (host, known) = (
        "host: localhost\r\n",
        format!("authorization: Bearer {token}\r\n"),
    );
    let page = "origin: https://evil.example\r\n";
    let rebound = "host: evil.example\r\n";
    for (headers, status) in [
        (host.to_owned(), "401"),
        (
            format!("{host}authorization: Bearer {}\r\n", "x".repeat(64)),
            "401",
        ),
        (format!("{host}{known}{page}"), "403"),
        (format!("{rebound}{known}"), "403"),
    ] {
        for request in [
            "GET /instances",
            "POST /instances/web/stop",
            "DELETE /instances/web",
        ] {
            let reply = ask(address, request, &headers)?;
            same(
                format!("the answer to {request} with {headers:?}"),
                Some(status),
                reply.split(' ').nth(1),
            )?;
            holds(
                !reply.contains("\"state\""),
                request,
                "nothing told of the VM",
                &reply,
            )?;
        }
    }
    let reply = ask(address, "GET /instances/web", &format!("{host}{known}"))?;
    holds(
        reply.contains("\"name\":\"web\""),
        "with its token",
        "the VM",
        &reply,
    )?;

    let mut silent = Vec::new();
    for number in 0..SILENT {
        let mut stream = TcpStream::connect(address).map_err(Failure::file(address))?;
        if number % 2 == 0 {
            stream
                .write_all(b"GET /instances HTTP/1.1\r\n")
                .map_err(Failure::file(address))?;
        }
        silent.push(stream);
    }
    answered(200, client.get("/instances/web")?)?;
    let reply = ask(address, "GET /instances/web", &format!("{host}{known}"))?;
    holds(
        reply.contains("\"name\":\"web\""),
        "among silent connections",
        "the VM",
        &reply,
    )?;
    drop(silent);
    answered(204, client.delete("/instances/web")?)?;
    server.finish()?;
    Ok(())
}

/// The reply to a request with these headers.
fn ask(address: &str, request: &str, headers: &str) -> Result<String, Failure> {
    let request = format!("{request} HTTP/1.1\r\n{headers}content-length: 0\r\nconnection: close\r\n\r\n");
    let mut reply = String::new();
    TcpStream::connect(address)
        .and_then(|mut stream| {
            stream.write_all(request.as_bytes())?;
            stream.read_to_string(&mut reply)
        })
        .map_err(Failure::file(address))?;
    Ok(reply)
}
