//! The log: events as lines on standard error.
//!
//! A subscriber of its own, as `tracing_subscriber`'s keep a registry of spans, which nobody makes here: 32 KiB of
//! memory in each fork, and time at the start of its process.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// Writes what `filter` lets through.
pub(crate) struct Log {
    filter: Targets,
}

impl Log {
    pub(crate) fn new(filter: Targets) -> Self {
        Self { filter }
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && self.filter.would_enable(metadata.target(), metadata.level())
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        let levels = self.filter.iter().map(|(_, level)| level);
        levels.chain(self.filter.default_level()).max()
    }

    fn event(&self, event: &Event<'_>) {
        // One write for the line, so that those of several threads do not mix. Where it fails there is nowhere to tell.
        let _ = io::stderr().write_all(line(event).as_bytes());
    }

    // There are no spans.
    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

fn line(event: &Event<'_>) -> String {
    let mut line = String::new();
    // Writing to a string cannot fail, and what an event gives may at worst be left out.
    let _ = SystemTime.format_time(&mut Writer::new(&mut line));
    let metadata = event.metadata();
    let _ = write!(line, " {:>5} {}:", metadata.level(), metadata.target());
    event.record(&mut Fields(&mut line));
    line.push('\n');
    line
}

/// Adds the message, and fields as `name=value`.
struct Fields<'a>(&'a mut String);

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::{Arc, Mutex};

    /// Keeps the lines.
    struct Kept(Log, Arc<Mutex<Vec<String>>>);

    impl Subscriber for Kept {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            self.0.enabled(metadata)
        }
        fn event(&self, event: &Event<'_>) {
            self.1.lock().unwrap().push(line(event));
        }
        fn new_span(&self, span: &Attributes<'_>) -> Id {
            self.0.new_span(span)
        }
        fn record(&self, _: &Id, _: &Record<'_>) {}
        fn record_follows_from(&self, _: &Id, _: &Id) {}
        fn enter(&self, _: &Id) {}
        fn exit(&self, _: &Id) {}
    }

    #[test]
    fn a_line_has_the_time_the_level_the_target_the_message_and_the_fields() {
        let lines = Arc::default();
        let log = Log::new("info,quiet=error".parse().unwrap());
        assert_eq!(log.max_level_hint(), Some(LevelFilter::INFO));
        tracing::subscriber::with_default(Kept(log, Arc::clone(&lines)), || {
            tracing::warn!(target: "there", error = %"no room", pages = 3, path = "a b", "not {}", "done");
            tracing::info!(target: "quiet", "nobody hears this");
            tracing::debug!("nor this");
        });
        let lines = lines.lock().unwrap();
        let [line] = &lines[..] else { panic!("{lines:?}") };
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(
            time.ends_with('Z') && time.len() == "2026-11-22T17:46:43.303654Z".len(),
            "{time}"
        );
        assert_eq!(rest, " WARN there: not done error=no room pages=3 path=\"a b\"\n");
    }
}
