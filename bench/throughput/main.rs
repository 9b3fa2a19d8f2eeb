//! `./dev bench`: how fast, how lean and how fair the worker is, beside what one would write instead.
//! Guarantee: contestants of a comparison take turns within one run; what is measured is the built program, a process of
//! its own, seen from outside. bench/README.md says what each scenario measures.

mod broker;
mod contestants;
mod context;
mod installation;
mod jobs;
mod machine;
mod options;
mod process;
mod report;
mod scenarios;
mod serve;
mod sink;
mod stats;

use anyhow::{Context as _, bail};
use clap::Parser;
use clap::ValueEnum;
use sendoff::clock::Clock;

use context::Context;
use installation::Installation;
use options::Options;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == "serve") {
        return serve::run(&arguments[1..]).await;
    }
    let options = Options::parse();
    if options.list_needs {
        options.needs().iter().for_each(|need| println!("{need}"));
        return Ok(());
    }
    let bench = Context::of_environment(options)?;
    Installation::clear_leftovers(&bench).await.context("clearing what an earlier run has left")?;
    let head = machine::describe(&bench).await;
    let asked: Vec<&String> = arguments.iter().filter(|argument| *argument != "--bench").collect();
    let asked = asked.iter().fold("./dev bench".to_owned(), |text, argument| format!("{text} {argument}"));
    let mut failed = Vec::new();
    for scenario in bench.options.chosen() {
        let name = scenario.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
        eprintln!("bench: {name}");
        let origin =
            format!("{}, `{asked}`, repetitions: {}.", Clock::system().now().date(), bench.options.reps());
        match scenarios::run(scenario, &bench, origin).await {
            Ok(section) => {
                let text = section.markdown();
                println!("{text}");
                write(&bench, &head, &section.title, &text)?;
            }
            // The others are worth their hour all the same.
            Err(error) => {
                eprintln!("bench: {name} failed: {error:#}");
                failed.push(name);
            }
        }
    }
    println!("Written to {}", bench.results().display());
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn write(bench: &Context, head: &str, title: &str, section: &str) -> anyhow::Result<()> {
    let path = bench.results();
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let sections = old.find("\n## ").map_or("", |at| &old[at..]);
    let report = report::with_section(&format!("{head}{sections}"), title, section);
    std::fs::write(&path, report).with_context(|| path.display().to_string())
}
