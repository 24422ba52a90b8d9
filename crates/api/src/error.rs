//! The one place where an error becomes a status, a code, a message and details; the code of a refusal is the rules' own.
//!
//! What is the client's doing is told in full. What is the host's (500) is told without any path of the host; the
//! whole chain of causes goes to the log, within the span of its request.

use std::borrow::Cow;
use std::error::Error;
use std::io::{self, ErrorKind};

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use stencil_core::rules::Refusal;
use stencil_core::{InstanceId, InstanceName, StoreError, error_chain};
use stencil_engine::{EngineError, ExecError, Shortage};
use stencil_vmm::VmmError;

/// The body of every reply that is an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// A word for programs, such as `invalid_state`.
    pub code: Cow<'static, str>,
    /// What was wrong and what would be right, for people.
    pub message: String,
    /// What belongs to the code, such as the `forks` of `template_in_use`; often empty.
    #[serde(default)]
    pub details: Map<String, Value>,
}

/// A request that was not done.
#[derive(Clone, Debug)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    /// Boxed, for most results carry none.
    pub(crate) body: Box<ErrorBody>,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let body = Box::new(ErrorBody {
            code: Cow::Borrowed(code),
            message: message.into(),
            details: Map::new(),
        });
        Self { status, body }
    }

    fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.body.details.insert(key.to_owned(), value.into());
        self
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    pub(crate) fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    pub(crate) fn shutting_down() -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "shutting_down",
            "the server is shutting down; its VMs go on running: ask again when it is back",
        )
    }

    fn conflict(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(*self.body)).into_response()
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        let told = told(&error);
        if told.status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(error = error_chain(&error), code = %told.body.code, "a request failed");
        }
        told
    }
}

/// What the client is told of an engine's error.
fn told(error: &EngineError) -> ApiError {
    if let Some(told) = disk_trouble(error) {
        return told;
    }
    let message = error.to_string();
    match error {
        EngineError::Invalid(_) => ApiError::invalid(message),
        EngineError::NotFound(_) => ApiError::not_found(message),
        EngineError::Ambiguous { candidates, .. } => {
            ApiError::conflict("ambiguous", message).with("candidates", texts(candidates))
        }
        EngineError::NameConflict { name, .. } => {
            ApiError::conflict("name_conflict", message).with("name", name.as_str())
        }
        EngineError::Refused(refusal) => refused(refusal),
        EngineError::NoRoom(shortage) => no_room(shortage, message),
        EngineError::DiskLost(_) => ApiError::internal(message),
        EngineError::NoConsole(_) | EngineError::NoSnapshot(_) => {
            ApiError::conflict("invalid_state", message)
        }
        EngineError::NoAgent { .. } => ApiError::conflict("no_agent", message),
        EngineError::AgentNotReady { .. } => ApiError::conflict("invalid_state", message),
        EngineError::AgentLost { .. } => ApiError::conflict("agent_lost", message),
        EngineError::NotExecuted { error, .. } => not_executed(*error, message),
        EngineError::OtherVersion { made_by, here, .. } => ApiError::conflict("invalid_state", message)
            .with("made_by", made_by.as_str())
            .with("here", here.as_str()),
        EngineError::OtherCpu { made_on, here, .. } => ApiError::conflict("invalid_state", message)
            .with("made_on", made_on.as_str())
            .with("here", here.as_str()),
        EngineError::Store(error) => store(error),
        EngineError::Vmm {
            source: full @ VmmError::ConsoleFull { .. },
            ..
        } => ApiError::conflict("console_full", full.to_string()),
        EngineError::Vmm {
            id,
            source: cannot @ VmmError::NestedState { .. },
        } => ApiError::conflict("cannot_snapshot", format!("{cannot}; instance {id} is as it was")),
        EngineError::Vmm { id, source } => ApiError::internal(vmm(id, source)),
        EngineError::SourceNotRestored { forks, source, .. } => {
            let cause = told(source);
            ApiError::internal(format!("{message}: {}", cause.body.message)).with("forks", texts(forks))
        }
        EngineError::Io { what, .. } => ApiError::internal(format!(
            "the server could not {what} a file of the instance; the server's log says which and why"
        )),
    }
}

/// The one place that knows a disk that is full or read-only, whoever met it: the server, or a VMM that told so in its own words.
fn disk_trouble(error: &EngineError) -> Option<ApiError> {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(told) = error.downcast_ref::<io::Error>().and_then(of_disk) {
            return Some(told);
        }
        if let Some(VmmError::Rejected { body, .. }) = error.downcast_ref() {
            return body.0.iter().find_map(|reason| said_of_disk(reason));
        }
        if let Some(VmmError::Refused { reason, .. }) = error.downcast_ref() {
            return said_of_disk(reason);
        }
        next = error.source();
    }
    None
}

fn of_disk(error: &io::Error) -> Option<ApiError> {
    match error.kind() {
        ErrorKind::StorageFull => Some(full(
            "a file system that the server writes to is full, most likely that of its data directory; delete instances or \
             images, or make room on it",
        )),
        ErrorKind::QuotaExceeded => Some(full(
            "the disk quota of the server's user is used up; delete instances or images, or raise the quota",
        )),
        ErrorKind::ReadOnlyFilesystem => Some(ApiError::conflict(
            "read_only",
            "the file system of the data directory is read-only, so that nothing can be recorded and nothing was begun; the \
             kernel's log says why, often an I/O error",
        )),
        _ => None,
    }
}

/// What a VMM says that met the same: the C library's words for the error.
fn said_of_disk(words: &str) -> Option<ApiError> {
    [
        ("No space left on device", ErrorKind::StorageFull),
        ("Disk quota exceeded", ErrorKind::QuotaExceeded),
        ("Read-only file system", ErrorKind::ReadOnlyFilesystem),
    ]
    .into_iter()
    .find_map(|(said, kind)| words.contains(said).then_some(kind))
    .and_then(|kind| of_disk(&kind.into()))
}

fn full(message: &str) -> ApiError {
    ApiError::new(
        StatusCode::INSUFFICIENT_STORAGE,
        "insufficient_resources",
        message,
    )
    .with("resource", "disk")
}

fn refused(refusal: &Refusal) -> ApiError {
    let (code, message) = (refusal.code(), refusal.to_string());
    match refusal {
        Refusal::InvalidState { operation, state, .. } => ApiError::conflict(code, message)
            .with("operation", operation.to_string())
            .with("state", state.to_string()),
        Refusal::TemplateInUse { forks, .. } => {
            let forks = forks.iter().map(|fork| (&fork.id, &fork.name));
            ApiError::conflict(code, message).with("forks", named(forks))
        }
        Refusal::InvalidTarget { target, allowed, .. } => {
            ApiError::new(StatusCode::BAD_REQUEST, code, message)
                .with("target_state", target.to_string())
                .with("allowed", texts(allowed))
        }
        Refusal::NotFrozen { operation, .. } => {
            ApiError::conflict(code, message).with("operation", operation.to_string())
        }
    }
}

/// The host is sound and the request is, too: only there is not enough left for it.
fn no_room(shortage: &Shortage, message: String) -> ApiError {
    ApiError::new(
        StatusCode::INSUFFICIENT_STORAGE,
        "insufficient_resources",
        message,
    )
    .with("resource", shortage.resource.as_str())
    .with("limit", shortage.limit)
    .with("needed", shortage.needed)
    .with("available", shortage.available)
    .with("room_for", shortage.room_for)
    .with("armed", shortage.armed)
}

/// 400 where another request would be right.
fn not_executed(error: ExecError, message: String) -> ApiError {
    let (status, reason) = match error {
        ExecError::NotFound => (StatusCode::BAD_REQUEST, "not_found"),
        ExecError::NotExecutable => (StatusCode::BAD_REQUEST, "not_executable"),
        ExecError::BadDirectory => (StatusCode::BAD_REQUEST, "bad_directory"),
        ExecError::BadRequest => (StatusCode::BAD_REQUEST, "bad_request"),
        ExecError::NoEpoch => (StatusCode::CONFLICT, "no_epoch"),
        ExecError::TooManySessions => (StatusCode::CONFLICT, "too_many_sessions"),
        ExecError::Failed => (StatusCode::CONFLICT, "failed"),
    };
    ApiError::new(status, "not_executed", message).with("reason", reason)
}

fn store(error: &StoreError) -> ApiError {
    match error {
        StoreError::NotFound { .. } | StoreError::NoImage { .. } => ApiError::not_found(error.to_string()),
        StoreError::ImageExists { name } => {
            ApiError::conflict("name_conflict", error.to_string()).with("name", name.as_str())
        }
        StoreError::ImageInUse { users, .. } => {
            let users = users.iter().map(|user| (&user.id, &user.name));
            ApiError::conflict("image_in_use", error.to_string()).with("instances", named(users))
        }
        StoreError::BrokenImage { .. } => ApiError::conflict("broken_image", error.to_string()),
        StoreError::Unreadable { id, source, .. } => ApiError::conflict(
            "unreadable_metadata",
            format!(
                "the metadata of instance {id} cannot be read: {}; repair them, or delete the instance by its id",
                error_chain(source)
            ),
        )
        .with("instances", texts(&[id])),
        StoreError::Uncounted {
            unreadable,
            strangers,
        } => uncounted(unreadable, strangers.len()),
        StoreError::BrokenSnapshot { reason, .. } => {
            ApiError::conflict("invalid_state", format!("the snapshot cannot be used: {reason}"))
        }
        _ => ApiError::internal("the data directory could not be used; the server's log says why"),
    }
}

/// What cannot be read could depend on what was to go. The paths of what is no instance are the host's.
fn uncounted(unreadable: &[InstanceId], strangers: usize) -> ApiError {
    let mut message = "it cannot be told whether anything depends on it".to_owned();
    if !unreadable.is_empty() {
        let ids = texts(unreadable).join(", ");
        message += &format!(
            ": the metadata of these instances cannot be read, repair them or delete each by its id: {ids}"
        );
    }
    if strangers > 0 {
        message +=
            ": something in the directory of instances is none, move it away; the server's log names it";
    }
    ApiError::conflict("unreadable_metadata", message)
        .with("instances", texts(unreadable))
        .with("strangers", strangers)
}

/// What a VMM's failure means to the client: typed facts, and of a VMM's own words only those that hold no path.
fn vmm(id: &InstanceId, error: &VmmError) -> String {
    let why = match error {
        VmmError::Rejected { call, body, .. } => {
            // The first line of Cloud Hypervisor's errors says only that it is one.
            let says_something = |line: &&str| !line.contains('/') && *line != "Error from API";
            let reasons: Vec<&str> = body.0.iter().map(String::as_str).filter(says_something).collect();
            format!("refused {call}: {}", reasons.join(": "))
        }
        VmmError::Refused { call, reason } if !reason.contains('/') => format!("refused {call}: {reason}"),
        VmmError::Timeout { call, after } => format!("did not answer {call} within {after:?}"),
        VmmError::Ended { exit, source } => match source.as_ref() {
            VmmError::Pager { said, .. } => format!("was ended, because its pager failed: {said}"),
            _ => format!("ended ({exit}) instead of answering"),
        },
        VmmError::Pager { said, .. } => format!("was not given its memory: {said}"),
        VmmError::Snapshot { source, .. } => format!("cannot use the snapshot: {source}"),
        _ => "failed".to_owned(),
    };
    format!("the VMM of instance {id} {why}; the server's log says more")
}

fn named<'a>(instances: impl Iterator<Item = (&'a InstanceId, &'a InstanceName)>) -> Vec<Value> {
    instances
        .map(|(id, name)| json!({ "id": id.to_string(), "name": name.as_str() }))
        .collect()
}

fn texts<T: ToString>(things: &[T]) -> Vec<String> {
    things.iter().map(ToString::to_string).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use stencil_core::rules::{LiveFork, Operation};
    use stencil_core::{ImageUser, State, UnreadableCause};
    use stencil_engine::Resource;
    use stencil_vmm::{Call, SnapshotError};
    use stencil_vmm_api::ErrorBody as VmmWords;

    use super::*;

    const SECRET: &str = "/srv/secret";

    fn id() -> InstanceId {
        "01k6h2v9d3e4f5g6h7j8k9m0n1".parse().unwrap()
    }

    fn denied() -> io::Error {
        io::ErrorKind::PermissionDenied.into()
    }

    fn disk(kind: ErrorKind) -> EngineError {
        StoreError::Io {
            what: "write",
            path: SECRET.into(),
            source: kind.into(),
        }
        .into()
    }

    fn vmm(source: VmmError) -> EngineError {
        EngineError::Vmm { id: id(), source }
    }

    /// One of each way to fail.
    fn all() -> Vec<EngineError> {
        vec![
            EngineError::Invalid("vcpus is 0; microvm takes 1 to 254".to_owned()),
            EngineError::NotFound("nobody".to_owned()),
            EngineError::Ambiguous {
                reference: "01k6".to_owned(),
                candidates: vec![id(), id()],
            },
            EngineError::NameConflict {
                name: "web".to_owned(),
                holder: Some(id()),
            },
            rules_error(stencil_core::rules::decide(
                Operation::Promote,
                State::Running,
                &[],
            )),
            rules_error(stencil_core::rules::decide(
                Operation::Delete,
                State::Template,
                &[LiveFork {
                    id: id(),
                    name: "web-1".parse().unwrap(),
                }],
            )),
            Refusal::InvalidTarget {
                source_state: State::Stopped,
                target: State::Paused,
                allowed: &[State::Stopped, State::Running],
            }
            .into(),
            Refusal::NotFrozen {
                operation: Operation::Promote,
                state: State::Standby,
            }
            .into(),
            Shortage {
                resource: Resource::OpenFiles,
                limit: "RLIMIT_NOFILE",
                count: 300,
                needed: 300,
                available: 12,
                room_for: 12,
                armed: 0,
            }
            .into(),
            EngineError::NoConsole(id()),
            EngineError::DiskLost(0),
            EngineError::NoSnapshot(id()),
            EngineError::NoAgent {
                id: id(),
                why:
                    "microvm gives its guests no port for one: create the instance on a hypervisor that does"
                        .to_owned(),
            },
            EngineError::AgentNotReady {
                id: id(),
                why: "it has not acknowledged the epoch yet; ask again in a moment".to_owned(),
            },
            EngineError::NotExecuted {
                id: id(),
                error: ExecError::NotFound,
                why: "there is no program `mak`".to_owned(),
            },
            EngineError::NotExecuted {
                id: id(),
                error: ExecError::TooManySessions,
                why: "256 sessions are running".to_owned(),
            },
            EngineError::AgentLost {
                id: id(),
                why: "its VM ended".to_owned(),
            },
            EngineError::OtherVersion {
                id: id(),
                made_by: "0.1.0".to_owned(),
                here: "0.2.0".to_owned(),
            },
            EngineError::OtherCpu {
                id: id(),
                made_on: "A CPU @ 3.00GHz".to_owned(),
                here: "Another CPU".to_owned(),
            },
            StoreError::NotFound { id: id() }.into(),
            StoreError::Unreadable {
                id: id(),
                path: SECRET.into(),
                source: UnreadableCause::Io(denied()),
            }
            .into(),
            StoreError::Uncounted {
                unreadable: vec![id()],
                strangers: vec![SECRET.into()],
            }
            .into(),
            StoreError::NoImage {
                name: "debian".parse().unwrap(),
            }
            .into(),
            StoreError::ImageExists {
                name: "debian".parse().unwrap(),
            }
            .into(),
            StoreError::ImageInUse {
                name: "debian".parse().unwrap(),
                users: vec![ImageUser {
                    id: id(),
                    name: "web-1".parse().unwrap(),
                }],
            }
            .into(),
            StoreError::BrokenImage {
                name: "debian".parse().unwrap(),
                reason: "kernel is missing".to_owned(),
            }
            .into(),
            StoreError::BrokenSnapshot {
                path: SECRET.into(),
                reason: "state.json is missing".to_owned(),
            }
            .into(),
            StoreError::Io {
                what: "write",
                path: SECRET.into(),
                source: denied(),
            }
            .into(),
            disk(ErrorKind::StorageFull),
            disk(ErrorKind::QuotaExceeded),
            disk(ErrorKind::ReadOnlyFilesystem),
            vmm(VmmError::Rejected {
                call: Call::Snapshot,
                status: 500,
                body: VmmWords(vec![
                    format!("cannot write {SECRET}"),
                    "No space left on device (os error 28)".to_owned(),
                ]),
            }),
            vmm(VmmError::Spawn {
                binary: SECRET.into(),
                source: denied(),
            }),
            vmm(VmmError::Timeout {
                call: Call::Boot,
                after: Duration::from_secs(60),
            }),
            vmm(VmmError::Rejected {
                call: Call::Boot,
                status: 500,
                body: VmmWords(vec![
                    "Error from API".to_owned(),
                    format!("cannot load {SECRET}"),
                    "it has no PVH note".to_owned(),
                ]),
            }),
            vmm(VmmError::Snapshot {
                path: SECRET.into(),
                source: SnapshotError::Truncated { has: 1, needs: 2 },
            }),
            vmm(VmmError::NestedState {
                source: Box::new(VmmError::Rejected {
                    call: Call::Snapshot,
                    status: 500,
                    body: VmmWords(vec!["Could not get vCPU state GetNestedState".to_owned()]),
                }),
            }),
            vmm(VmmError::ConsoleFull {
                taken: 4096,
                given: 8192,
                after: Duration::from_secs(5),
            }),
            EngineError::SourceNotRestored {
                id: id(),
                forks: vec!["web-1".parse().unwrap()],
                source: Box::new(vmm(VmmError::Timeout {
                    call: Call::Restore,
                    after: Duration::from_secs(60),
                })),
            },
            EngineError::Io {
                what: "read",
                path: SECRET.into(),
                source: denied(),
            },
        ]
    }

    fn rules_error<T: std::fmt::Debug>(refused: Result<T, Refusal>) -> EngineError {
        refused.unwrap_err().into()
    }

    #[test]
    fn each_way_to_fail_has_its_status_code_message_and_details() {
        let told: Vec<Value> = all()
            .into_iter()
            .map(|error| {
                let told = ApiError::from(error);
                json!({ "status": told.status.as_u16(), "body": told.body })
            })
            .collect();
        insta::assert_json_snapshot!(told);
    }

    #[test]
    fn no_path_of_the_host_is_told_and_all_of_them_are_in_the_chain() {
        for error in all() {
            let names_a_path = format!("{error:?}").contains(SECRET);
            assert_eq!(error_chain(&error).contains(SECRET), names_a_path, "{error:?}");
            let told = serde_json::to_string(&ApiError::from(error).body).unwrap();
            assert!(!told.contains("secret"), "{told}");
        }
    }
}
