//! The password's prompt, on a terminal: `script` of util-linux gives the program one.
//! Guarantee: what is typed is read from the terminal and not shown on it, and the terminal is left as it was found.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::support::broker::SOON;
use crate::support::world::{PASSWORD, World};

/// A program on a terminal of its own, and all that the terminal has shown.
struct Terminal {
    child: Child,
    shown: String,
}

impl Terminal {
    /// Runs a line of shell with this world's settings; `$SENDOFF` is the program.
    fn run(world: &World, line: &str) -> Self {
        let program = world.command(&[]);
        let mut command = Command::new("script");
        command.args(["--quiet", "--return", "--command", line, "/dev/null"]);
        command.env_clear().envs(program.as_std().get_envs().filter_map(|(key, value)| Some((key, value?))));
        command.env("SENDOFF", program.as_std().get_program()).env("SHELL", "/bin/sh");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        Self { child: command.spawn().expect("util-linux has script"), shown: String::new() }
    }

    /// Waits until the terminal has shown a text.
    async fn shows(&mut self, text: &str) {
        let output = self.child.stdout.as_mut().expect("piped");
        let mut bytes = [0; 1024];
        while !self.shown.contains(text) {
            let read = tokio::time::timeout(SOON, output.read(&mut bytes)).await;
            let read = read.unwrap_or_else(|_| panic!("no {text:?} in time: {}", self.shown)).expect("read");
            assert!(read > 0, "no {text:?}: {}", self.shown);
            self.shown.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }

    async fn types(&mut self, keys: &str) {
        let keyboard = self.child.stdin.as_mut().expect("piped");
        keyboard.write_all(keys.as_bytes()).await.expect("typed");
        keyboard.flush().await.expect("typed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_is_typed_is_taken_and_not_shown() {
    let world = World::new().await;
    let worker = world.worker().await;
    world.organization_at("42", json!({"password": "not the password"})).await;
    let line = "$SENDOFF org smtp update 42 --ask-password; echo \"it ended with $?\"; stty -a";
    let mut terminal = Terminal::run(&world, line);
    terminal.shows("SMTP password: ").await;
    terminal.types(&format!("{PASSWORD}\n")).await;
    terminal.shows("it ended with 0").await;
    terminal.shows(" echo ").await;
    assert!(!terminal.shown.contains(PASSWORD.trim()), "{}", terminal.shown);
    assert_eq!(world.commanded("smtp_config.test", "42", json!({})).await["ok"], true);
    worker.stop().await;
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_at_the_prompt_changes_nothing_and_the_terminal_echoes_again() {
    let world = World::new().await;
    let line = "trap : INT; $SENDOFF org smtp update 42 --ask-password; echo \"it ended with $?\"; stty -a";
    let mut terminal = Terminal::run(&world, line);
    terminal.shows("SMTP password: ").await;
    terminal.types("half a passw\u{3}").await;
    terminal.shows("it ended with 130").await;
    terminal.shows(" echo ").await;
    assert!(!terminal.shown.contains("half"), "{}", terminal.shown);
    world.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ctrl_c_after_the_prompt_ends_the_wait_for_an_answer() {
    let world = World::new().await;
    world.broker.declare().await;
    let line = "trap : INT; $SENDOFF org smtp update 42 --ask-password; echo \"it ended with $?\"";
    let mut terminal = Terminal::run(&world, line);
    terminal.shows("SMTP password: ").await;
    terminal.types("a password\n").await;
    // Nobody is there to answer. While the prompt is not over yet, Ctrl-C is no signal but a key.
    let mut keys = terminal.child.stdin.take().expect("piped");
    let pressing = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            keys.write_all(b"\x03").await.expect("typed");
        }
    };
    tokio::select! {
        () = terminal.shows("it ended with 130") => {}
        () = pressing => unreachable!("it never ends"),
    }
    world.end().await;
}
