//! Passwords from where no other process can see them: a terminal without echo, a file, or standard input.
//! Guarantee: a password is never an argument and never shown.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use secrecy::{ExposeSecret, SecretString};

/// Far above any password; a wrong file should not be read whole.
const PASSWORD_MAX: u64 = 4096;

/// Where the SMTP password comes from.
#[derive(Debug, Args)]
pub(super) struct PasswordArgs {
    /// Read the SMTP password from this file (`-`: standard input)
    #[arg(long, value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Read the SMTP password from standard input
    #[arg(long, conflicts_with = "password_file")]
    password_stdin: bool,
}

impl PasswordArgs {
    /// The password, where no argument says where it is from standard input: a terminal is asked, anything else read.
    ///
    /// # Errors
    /// When what was read is no password.
    pub(super) fn required(&self) -> anyhow::Result<SecretString> {
        match self.given()? {
            Some(password) => Ok(password),
            None if std::io::stdin().is_terminal() => ask(),
            None => read(std::io::stdin()).context(
                "the SMTP password is missing on standard input; put it there or give --password-file FILE",
            ),
        }
    }

    /// The password an argument points to; none without such an argument.
    ///
    /// # Errors
    /// When it cannot be read, or is no password.
    pub(super) fn given(&self) -> anyhow::Result<Option<SecretString>> {
        let password = match &self.password_file {
            Some(path) if path != Path::new("-") => {
                let file = std::fs::File::open(path)
                    .with_context(|| format!("--password-file {} cannot be read", path.display()))?;
                read(file).with_context(|| format!("--password-file {}", path.display()))?
            }
            Some(_) => read(std::io::stdin()).context("the password on standard input")?,
            None if self.password_stdin => {
                read(std::io::stdin()).context("the password on standard input")?
            }
            None => return Ok(None),
        };
        Ok(Some(password))
    }
}

/// Asks the terminal.
pub(super) fn ask() -> anyhow::Result<SecretString> {
    let password = rpassword::prompt_password("SMTP password: ").context("the terminal gave no password")?;
    judged(password.into())
}

fn read(source: impl Read) -> anyhow::Result<SecretString> {
    let mut text = String::new();
    source.take(PASSWORD_MAX + 1).read_to_string(&mut text).context("is not readable UTF-8")?;
    let length = text.trim_end_matches(['\r', '\n']).len();
    text.truncate(length);
    judged(text.into())
}

fn judged(password: SecretString) -> anyhow::Result<SecretString> {
    let length = u64::try_from(password.expose_secret().len()).unwrap_or(u64::MAX);
    if length == 0 {
        bail!("it is empty");
    }
    if length > PASSWORD_MAX {
        bail!("it is longer than {PASSWORD_MAX} bytes");
    }
    Ok(password)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_end_of_a_file_is_no_part_of_the_password() {
        assert_eq!(read(&b" s3cret \r\n"[..]).unwrap().expose_secret(), " s3cret ");
        assert!(read(&b"\n"[..]).is_err());
        assert!(read(&[b'x'; 5000][..]).is_err());
        assert!(read(&b"\xff"[..]).is_err());
    }
}
