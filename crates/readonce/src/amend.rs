//! `readonce amend`: the one option that may change later, copy-on-read.

use std::process::ExitCode;

use readonce_format::driver::{HeaderChange, driver, drivers};
use readonce_words::options;

use crate::{
    create::help_line,
    failure::{Failure, Outcome},
    look, stdout,
};

/// Change what an image does when it is used: copy_on_read
#[derive(Debug, clap::Args)]
#[command(override_usage = "readonce amend -o copy_on_read=on|off IMAGE")]
pub struct Args {
    /// Format of IMAGE; told from its first bytes where absent
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    format: Option<String>,
    /// copy_on_read[=on|off]
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    options: Vec<String>,
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    /// File
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
}

/// Options that images have, but drivers do not name.
const OTHERS: [&str; 4] = ["size", "backing_file", "backing_fmt", "data_file"];

/// Lists what can change in images of a format, which is told from the image where it is not said.
async fn help(args: &Args) -> Outcome {
    let format = match (&args.format, args.images.as_slice()) {
        (Some(format), _) => format.clone(),
        (None, []) => return Err(Failure::usage("amend", "Expecting one image file name")),
        (None, [image, ..]) => look::hold(image, None).await?.description.format.to_owned(),
    };
    let Some(driver) = driver(&format) else {
        return Err(Failure::new(format!("Unknown file format '{format}'")));
    };
    let Some(option) = driver.create_options().iter().find(|option| option.name == "copy_on_read") else {
        return Err(Failure::new(format!("Format driver '{format}' does not support option amendment")));
    };
    stdout::print(format_args!("Amend options for '{format}':\n  {}\n", help_line(option.name, option.help)));
    Ok(ExitCode::SUCCESS)
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    options::check_lists(args.options.iter().map(String::as_str))?;
    let pairs = options::pairs(args.options.iter().map(String::as_str));
    if pairs.is_empty() {
        return Err(Failure::usage("amend", "Must specify options (-o)"));
    }
    if pairs.iter().any(|(name, _)| name == "help" || name == "?") {
        return help(&args).await;
    }
    let image = look::one_image("amend", &args.images)?;
    let known: Vec<&str> =
        drivers().iter().flat_map(|driver| driver.create_options()).map(|option| option.name).collect();
    let mut on = None;
    for (name, value) in &pairs {
        match name.as_str() {
            "copy_on_read" => on = Some(options::switch(name, value.as_deref())?),
            name if known.contains(&name) || OTHERS.contains(&name) || name.starts_with("encrypt") => {
                let instead = match name {
                    "size" => " (readonce resize changes the size)",
                    "backing_file" | "backing_fmt" => " (readonce rebase -u changes the backing file)",
                    _ => "",
                };
                return Err(Failure::new(format!(
                    "Changing the option '{name}' is not supported: only copy_on_read can change{instead}"
                )));
            }
            _ => return Err(Failure::new(format!("Invalid parameter '{name}'"))),
        }
    }
    let held = look::hold(image, args.format.as_deref()).await?;
    if held.description.format == "raw" {
        return Err(Failure::new("Format driver 'raw' does not support option amendment"));
    }
    if let Some(on) = on {
        let change = HeaderChange::CopyOnRead(on);
        held.driver.change(&held.file, &change).await.map_err(|error| Failure::new(error.to_string()))?;
    }
    Ok(ExitCode::SUCCESS)
}
