//! Talks to the test guest over an instance's console: a command line in, its answer line out. The guest's protocol is
//! in fixtures/guest.

use std::time::{Duration, Instant};

use hyper::Method;

use crate::client::{Body, Client, ClientError, Lines, Next};

/// How long a guest may take to answer; its ring 0 may be emulated, and many guests share few cores.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A guest did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    #[error("could not reach the guest")]
    Client(#[from] ClientError),
    #[error("the console of {instance} answered {call} with {status}: {body}")]
    Refused {
        instance: String,
        call: &'static str,
        status: u16,
        body: String,
    },
    #[error("guest {instance} did not answer `{command}` in {} s", ANSWER_LIMIT.as_secs())]
    Silent { instance: String, command: String },
    #[error("the console of {instance} ended before `{command}` was answered")]
    Ended { instance: String, command: String },
    #[error("guest {instance} answered `{command}` with `{answer}`")]
    Answer {
        instance: String,
        command: String,
        answer: String,
    },
}

/// A guest's console, followed from now on.
#[derive(Debug)]
pub(crate) struct GuestConsole {
    client: Client,
    instance: String,
    lines: Lines,
}

impl GuestConsole {
    /// Follows the console; what the guest printed before is left out.
    pub(crate) fn open(client: &Client, instance: &str) -> Result<Self, GuestError> {
        let lines = client.open(&format!("/instances/{instance}/console?tail=0&follow=true"))?;
        if lines.status != 200 {
            return Err(GuestError::Refused {
                instance: instance.to_owned(),
                call: "GET console",
                status: lines.status,
                body: String::new(),
            });
        }
        Ok(Self {
            client: client.clone(),
            instance: instance.to_owned(),
            lines,
        })
    }

    /// Gives the guest bytes to read.
    pub(crate) fn write(&self, bytes: &[u8]) -> Result<(), GuestError> {
        let path = format!("/instances/{}/console", self.instance);
        let reply = self
            .client
            .call(Method::POST, &path, Body::Bytes(bytes.to_vec()))?;
        if reply.status == 204 {
            return Ok(());
        }
        Err(GuestError::Refused {
            instance: self.instance.clone(),
            call: "POST console",
            status: reply.status,
            body: reply.body.to_string(),
        })
    }

    /// Gives the guest a command and waits for its answer, `ok ...` or `err ...`.
    pub(crate) fn ask(&mut self, command: &str) -> Result<String, GuestError> {
        self.write(format!("{command}\n").as_bytes())?;
        self.line_that(command, |line| line.starts_with("ok") || line.starts_with("err"))
    }

    /// Waits for a line; `awaited` says which one, for the error.
    pub(crate) fn line_that(
        &mut self,
        awaited: &str,
        fits: impl Fn(&str) -> bool,
    ) -> Result<String, GuestError> {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let (instance, command) = (self.instance.clone(), awaited.to_owned());
        loop {
            match self.lines.next_by(deadline)? {
                Next::Line(line) if fits(&line) => return Ok(line),
                Next::Line(_) => {}
                Next::Over => return Err(GuestError::Ended { instance, command }),
                Next::Late => return Err(GuestError::Silent { instance, command }),
            }
        }
    }
}

/// Gives a guest one command and waits for its answer.
pub(crate) fn ask(client: &Client, instance: &str, command: &str) -> Result<String, GuestError> {
    GuestConsole::open(client, instance)?.ask(command)
}

/// Gives a guest one command and waits for the value of `field` in its answer: of `ok counter=3`, `counter` is `3`.
pub(crate) fn ask_for(
    client: &Client,
    instance: &str,
    command: &str,
    field: &str,
) -> Result<String, GuestError> {
    let answer = ask(client, instance, command)?;
    match value_of(&answer, field) {
        Some(value) => Ok(value.to_owned()),
        None => Err(GuestError::Answer {
            instance: instance.to_owned(),
            command: command.to_owned(),
            answer,
        }),
    }
}

/// The value of a field in an answer that begins with `ok`.
pub(crate) fn value_of<'a>(answer: &'a str, field: &str) -> Option<&'a str> {
    let mut words = answer.split_whitespace();
    if words.next() != Some("ok") {
        return None;
    }
    words.find_map(|word| word.strip_prefix(field)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_whole_name() {
        assert_eq!(value_of("ok generation=ab vmgen=2 time=1.5", "vmgen"), Some("2"));
        assert_eq!(value_of("ok generation=ab", "gen"), None);
        assert_eq!(value_of("err counter=2", "counter"), None);
    }
}
