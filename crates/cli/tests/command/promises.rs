//! What the specification says is enforced is enforced: the tests and scenarios that it names are there.

use std::fs;
use std::path::{Path, PathBuf};

/// All Rust sources of the workspace in one text.
fn sources(root: &Path) -> String {
    let mut open = vec![root.join("crates"), root.join("xtask/src")];
    let mut sources = String::new();
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    sources
}

/// What stands between pairs of `mark`.
fn marked(text: &str, mark: char) -> impl Iterator<Item = &str> {
    text.split(mark).skip(1).step_by(2)
}

#[test]
fn each_promise_of_the_specification_names_what_enforces_it() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let specification = fs::read_to_string(root.join("docs/specification.md")).unwrap();
    let sources = sources(&root);
    let rows: Vec<Vec<&str>> = specification
        .lines()
        .filter(|line| line.starts_with("| "))
        .map(|line| line.trim_matches('|').split(" | ").collect())
        .filter(|row: &Vec<&str>| row[0].trim() != "promise")
        .collect();
    assert!(rows.len() > 40, "only {} promises were found", rows.len());
    for row in rows {
        let [promise, enforced_by] = row[..] else {
            panic!("a promise has two columns: {row:?}");
        };
        let tests: Vec<&str> = marked(enforced_by, '`').collect();
        let scenarios: Vec<&str> = marked(enforced_by, '"').collect();
        assert!(tests.len() + scenarios.len() > 0, "nothing enforces: {promise}");
        for test in tests {
            assert!(
                sources.contains(&format!("fn {test}(")),
                "there is no test `{test}` for: {promise}"
            );
        }
        for scenario in scenarios {
            assert!(
                sources.contains(&format!("\"{scenario}\"")),
                "there is no scenario \"{scenario}\" for: {promise}"
            );
        }
    }
}
