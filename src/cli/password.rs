//! Passwords from where no other process can see them: a terminal without echo, a file, or standard input.
//! Guarantee: a password is never an argument and never shown, and a terminal echoes again after an answer, Ctrl-C and SIGTERM.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};
use secrecy::{ExposeSecret, SecretString};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::block_in_place;

/// Far above any password; a wrong file should not be read whole.
const PASSWORD_MAX: u64 = 4096;
/// Between a signal that the prompt itself raises and its end.
const LIBRARY_ENDS_WITHIN: Duration = Duration::from_millis(300);

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
            None if io::stdin().is_terminal() => ask(),
            None => read(io::stdin()).context(
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
                let file = File::open(path)
                    .with_context(|| format!("--password-file {} cannot be read", path.display()))?;
                read(file).with_context(|| format!("--password-file {}", path.display()))?
            }
            Some(_) => read(io::stdin()).context("the password on standard input")?,
            None if self.password_stdin => read(io::stdin()).context("the password on standard input")?,
            None => return Ok(None),
        };
        Ok(Some(password))
    }
}

/// Asks the terminal.
pub(super) fn ask() -> anyhow::Result<SecretString> {
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for signals")?;
    let terminal = Arc::new(Silenced::new().context("no terminal to ask for the password")?);
    let (answered, answer_came) = oneshot::channel::<()>();
    let watched = terminal.clone();
    // To the end of the program: once listened for, these signals do nothing by themselves any more.
    tokio::spawn(async move {
        let signal = tokio::select! {
            _ = interrupt.recv() => SignalKind::interrupt(),
            _ = terminate.recv() => SignalKind::terminate(),
        };
        // For Ctrl-C the library sends the signal first, and then restores the terminal as it found it: silent.
        let _ = tokio::time::timeout(LIBRARY_ENDS_WITHIN, answer_came).await;
        watched.end(signal);
    });
    let answer = block_in_place(|| rpassword::prompt_password("SMTP password: "));
    terminal.restore();
    drop(answered);
    if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Interrupted) {
        terminal.end(SignalKind::interrupt());
    }
    judged(answer.context("the terminal gave no password")?.into())
}

/// The terminal, showing nothing of what is typed from before the question is asked until it is restored.
struct Silenced {
    terminal: File,
    before: Termios,
}

impl Silenced {
    fn new() -> io::Result<Self> {
        let terminal = File::open("/dev/tty")?;
        let before = termios::tcgetattr(&terminal)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        termios::tcsetattr(&terminal, OptionalActions::Now, &silent)?;
        Ok(Self { terminal, before })
    }

    fn restore(&self) {
        // A terminal that is gone needs it no more.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }

    /// A signal ends the program in the middle of the question: the thread that waits for the answer cannot be ended
    /// otherwise.
    fn end(&self, signal: SignalKind) -> ! {
        self.restore();
        eprintln!();
        // As a shell tells of a program that a signal has ended.
        std::process::exit(128 + signal.as_raw_value());
    }
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
