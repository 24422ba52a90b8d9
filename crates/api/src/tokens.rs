//! The words by which the server knows who may ask over TCP: a file of its owner's, one token a line.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// The fewest characters of a token.
pub const SHORTEST_TOKEN: usize = 16;
/// The most bytes of a file of tokens.
const MOST_BYTES: u64 = 1 << 20;

/// Why there are no tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read, or made.
    #[error("cannot use the token file {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others than its owner can read it.
    #[error(
        "the token file {} can be read by others (mode {mode:04o}); let only its owner read it: chmod 600 {}",
        path.display(), path.display()
    )]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// A line is no token. The line itself is not told.
    #[error(
        "line {line} of the token file {} is no token; one has {SHORTEST_TOKEN} or more printable characters of ASCII \
         without spaces",
        path.display()
    )]
    Line {
        /// The file.
        path: PathBuf,
        /// Which line, counted from 1.
        line: usize,
    },
    /// There is no line with a token in it.
    #[error("the token file {} is empty; put a token on a line, or remove it to have one made", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Tokens, of which only digests are kept.
#[derive(Clone)]
pub struct Tokens(Vec<[u8; 32]>);

impl Tokens {
    /// Reads the tokens of a file. If it is not there, it is made (0600) with one random token of 256 bits.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn load(path: &Path) -> Result<Self, TokenError> {
        let failed = |source| TokenError::Io {
            path: path.to_owned(),
            source,
        };
        match File::open(path) {
            Ok(file) => Self::read(path, &file),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let mut random = [0; 32];
                rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                    .map_err(|error| failed(error.into()))?;
                let token = hex::encode(random);
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(path)
                    .map_err(failed)?;
                file.write_all(format!("{token}\n").as_bytes())
                    .and_then(|()| file.sync_all())
                    .inspect_err(|_| drop(fs::remove_file(path)))
                    .map_err(failed)?;
                Ok(Self(vec![digest(token.as_bytes())]))
            }
            Err(error) => Err(failed(error)),
        }
    }

    fn read(path: &Path, file: &File) -> Result<Self, TokenError> {
        let failed = |source| TokenError::Io {
            path: path.to_owned(),
            source,
        };
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(failed(io::Error::new(ErrorKind::InvalidInput, "it is no file")));
        }
        let mode = found.mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(TokenError::Open {
                path: path.to_owned(),
                mode,
            });
        }
        let mut text = String::new();
        file.take(MOST_BYTES).read_to_string(&mut text).map_err(failed)?;
        let mut tokens = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let token = line.trim();
            if token.is_empty() {
                continue;
            }
            if token.len() < SHORTEST_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(TokenError::Line {
                    path: path.to_owned(),
                    line: number + 1,
                });
            }
            tokens.push(digest(token.as_bytes()));
        }
        if tokens.is_empty() {
            return Err(TokenError::Empty {
                path: path.to_owned(),
            });
        }
        Ok(Self(tokens))
    }

    /// Whether this is one of them. It takes as long for any text: digests are compared, all of them, and in constant time.
    pub(crate) fn have(&self, text: &[u8]) -> bool {
        let asked = digest(text);
        let found = self.0.iter().fold(Choice::from(0), |found, token| {
            found | token.as_slice().ct_eq(asked.as_slice())
        });
        found.into()
    }
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.0.len())
    }
}

fn digest(text: &[u8]) -> [u8; 32] {
    Sha256::digest(text).into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(content: &str, mode: u32) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (dir, path)
    }

    #[test]
    fn a_missing_file_is_made_for_its_owner_alone_with_a_token_that_is_then_known() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens");
        let made = Tokens::load(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        let token = fs::read_to_string(&path).unwrap();
        assert_eq!(token.trim_end().len(), 64);
        for tokens in [made, Tokens::load(&path).unwrap()] {
            assert!(tokens.have(token.trim_end().as_bytes()));
            for other in ["", "x", &token[..63], &token] {
                assert!(!tokens.have(other.as_bytes()), "{other:?}");
            }
        }
    }

    #[test]
    fn each_line_is_a_token_of_any_printable_characters() {
        let (_dir, path) = file("sixteen-letters!\n\n  p@ss{w}\"ord'#0123~ \n", 0o400);
        let tokens = Tokens::load(&path).unwrap();
        assert!(tokens.have(b"sixteen-letters!") && tokens.have(b"p@ss{w}\"ord'#0123~"));
        assert!(!tokens.have(b"sixteen-letters") && !tokens.have(b""));
        assert_eq!(format!("{tokens:?}"), "Tokens(2)");
    }

    #[test]
    fn a_file_that_is_open_to_others_empty_or_of_short_words_is_refused() {
        for (content, mode, expected) in [
            ("sixteen-letters!\n", 0o640, "chmod 600"),
            ("sixteen-letters!\n", 0o604, "can be read by others (mode 0604)"),
            ("\n \n", 0o600, "is empty"),
            (
                "sixteen-letters!\nfifteen-letters\n",
                0o600,
                "line 2 of the token file",
            ),
            ("two words of a line\n", 0o600, "line 1 of the token file"),
        ] {
            let (_dir, path) = file(content, mode);
            let said = Tokens::load(&path).unwrap_err().to_string();
            assert!(said.contains(expected) && !said.contains("letters"), "{said}");
        }
    }
}
