//! `readonce check`: consistency, as qemu-img tells it. Exit status 0 clean, 1 not checked, 2 corrupt, 3 leaks, 63 not supported.

use std::{collections::BTreeSet, process::ExitCode, sync::Arc};

use readonce_disk::chain::driver_of;
use readonce_format::{
    Driver, Finding, FormatError,
    driver::{CheckReport, Repair},
};
use readonce_storage::{ImageLock, ReadAt};
use serde_json::{Map, Value};

use crate::{
    chain_args::OriginArgs,
    failure::{Failure, Outcome},
    json::text,
    look::{self, Output},
    report, stdout,
};

/// QEMU's cache modes.
const CACHE_MODES: [&str; 6] = ["none", "off", "directsync", "writeback", "writethrough", "unsafe"];
const EXIT_CORRUPT: u8 = 2;
const EXIT_LEAKS: u8 = 3;
const EXIT_UNSUPPORTED: u8 = 63;

/// Check an image for corruption and leaked clusters, and mend it
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "readonce check [OPTIONS] IMAGE",
    after_help = "Exit status: 0 no errors, 1 the check failed, 2 the image is corrupt, 3 it has leaked clusters only, 63 the \
                  format cannot be checked. With -r it is the status after the repair."
)]
pub struct Args {
    /// Format of IMAGE (qed, qcow2, raw); told from its first bytes where absent
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    format: Option<String>,
    /// Look without a lock, also while another process writes the image
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Mend: leaks frees clusters that nothing points to, all mends everything
    #[arg(short = 'r', long, value_name = "leaks|all")]
    repair: Option<String>,
    /// Taken for qemu-img's sake: a check goes through the page cache
    #[arg(short = 'T', value_name = "CACHE")]
    cache: Option<String>,
    /// human or json
    #[arg(long, value_name = "FORMAT", default_value = "human")]
    output: String,
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    #[command(flatten)]
    origin: OriginArgs,
    /// File or URL
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let repair = match args.repair.as_deref() {
        None => None,
        Some("leaks") => Some(Repair::Leaks),
        Some("all") => Some(Repair::All),
        Some(other) => {
            return Err(Failure::usage(
                "check",
                format!("--repair (-r) expects 'leaks' or 'all' not '{other}'"),
            ));
        }
    };
    if let Some(cache) = args.cache.as_deref().filter(|cache| !CACHE_MODES.contains(cache)) {
        return Err(Failure::new(format!("Invalid source cache option: {cache}")));
    }
    let output = look::output("check", &args.output)?;
    let image = look::one_image("check", &args.images)?;
    if repair.is_some() && args.force_share {
        return Err(look::cannot_open(image, "force-share=on can only be used with read-only images"));
    }
    let checked = match repair {
        Some(repair) => mend(image, &args, repair, output).await?,
        None => examine(image, &args).await?,
    };
    match output {
        Output::Json if !args.quiet => stdout::line(text(&checked.json())),
        Output::Human if !args.quiet => stdout::print(checked.human()),
        Output::Json | Output::Human => {}
    }
    checked.outcome()
}

/// Findings that are told one by one; of those beyond, how many there are.
const FINDINGS_MAX: usize = 1000;

/// What a check found, as far as it is told.
#[derive(Default)]
struct Findings {
    first: Vec<Finding>,
    more: u64,
}

impl Findings {
    fn add(&mut self, finding: Finding) {
        if self.first.len() < FINDINGS_MAX {
            self.first.push(finding);
        } else {
            self.more += 1;
        }
    }

    /// On standard error whatever else is asked for, as qemu-img has them.
    fn tell(&self) {
        let mut lines: String = self.first.iter().map(|finding| format!("{finding}\n")).collect();
        if self.more > 0 {
            lines += &format!("{} more findings are not told one by one\n", self.more);
        }
        report::lines(&lines);
    }

    /// Those that a repair saw and a check after it did not. Where that check found more than is kept, nobody knows which.
    fn tell_repaired(&self, after: &Self) {
        if after.more > 0 {
            return;
        }
        let left: BTreeSet<&Finding> = after.first.iter().collect();
        let gone = self.first.iter().filter(|finding| !left.contains(finding));
        let line = |finding: &Finding| {
            let text = finding.to_string();
            let kinds = ["ERROR: ", "ERROR ", "Leaked "];
            Some(format!("Repairing {}\n", kinds.iter().find_map(|kind| text.strip_prefix(kind))?))
        };
        report::lines(&gone.filter_map(line).collect::<String>());
    }
}

struct Checked {
    filename: String,
    format: &'static str,
    report: CheckReport,
}

async fn examine(image: &str, args: &Args) -> Result<Checked, Failure> {
    let (file, _lock) = look::readable(image, args.force_share, &args.origin).await?;
    let driver =
        driver_of(&*file, args.format.as_deref()).await.map_err(|error| look::cannot_open(image, error))?;
    let mut findings = Findings::default();
    let report = driver.check_telling(&file, &mut |finding| findings.add(finding)).await;
    findings.tell();
    let report = report.map_err(|error| refused(image, error))?;
    Ok(Checked { filename: look::locator(image)?.printable(), format: driver.name(), report })
}

async fn mend(image: &str, args: &Args, repair: Repair, output: Output) -> Result<Checked, Failure> {
    let format = args.format.as_deref();
    let (file, driver, _lock): (_, &dyn Driver, Option<ImageLock>) = look::hold_file(image, format).await?;
    let readable: Arc<dyn ReadAt> = file.clone();
    let mut before = Findings::default();
    let report = driver.repair_telling(&file, repair, &mut |finding| before.add(finding)).await;
    before.tell();
    let mut report = report.map_err(|error| refused(image, error))?;
    if before.first.contains(&Finding::NeedsRebuild) {
        return Err(Failure::new("Check failed: Input/output error"));
    }
    if report.corruptions_fixed > 0 || report.leaks_fixed > 0 {
        if output == Output::Human && !args.quiet {
            stdout::line(format_args!(
                "The following inconsistencies were found and repaired:\n\n    {} leaked clusters\n    {} corruptions\n\n\
                 Double checking the fixed image now...",
                report.leaks_fixed, report.corruptions_fixed
            ));
        }
        let fixed = report;
        let mut after = Findings::default();
        let again = driver.check_telling(&readable, &mut |finding| after.add(finding)).await;
        before.tell_repaired(&after);
        after.tell();
        report = again.map_err(|error| refused(image, error))?;
        report.corruptions_fixed = fixed.corruptions_fixed;
        report.leaks_fixed = fixed.leaks_fixed;
    }
    let filename = look::locator(image)?.printable();
    Ok(Checked { filename, format: driver.name(), report })
}

fn refused(image: &str, error: FormatError) -> Failure {
    match error {
        FormatError::Unsupported(text) if text == UNSUPPORTED => Failure::with_exit(EXIT_UNSUPPORTED, text),
        error => look::cannot_open(image, error),
    }
}

/// What a format without checks says.
const UNSUPPORTED: &str = "This image format does not support checks";

impl Checked {
    fn outcome(&self) -> Outcome {
        let report = &self.report;
        match () {
            () if report.check_errors > 0 => Err(Failure::new("Check failed")),
            () if report.corruptions > 0 => Ok(ExitCode::from(EXIT_CORRUPT)),
            () if report.leaks > 0 => Ok(ExitCode::from(EXIT_LEAKS)),
            () => Ok(ExitCode::SUCCESS),
        }
    }

    fn json(&self) -> Value {
        let report = &self.report;
        let mut all = Map::new();
        let mut tell = |name: &str, count: u64| {
            all.insert(name.into(), count.into());
        };
        if let Some(offset) = report.image_end_offset {
            tell("image-end-offset", offset);
        }
        let counts = [
            ("compressed-clusters", report.compressed_clusters),
            ("total-clusters", report.total_clusters),
            ("corruptions", report.corruptions),
            ("corruptions-fixed", report.corruptions_fixed),
            ("check-errors", report.check_errors),
            ("leaks", report.leaks),
            ("leaks-fixed", report.leaks_fixed),
            ("allocated-clusters", report.allocated_clusters),
        ];
        for (name, count) in counts {
            // Zeros are left out, but for the one figure that is always there.
            if count > 0 || name == "check-errors" {
                tell(name, count);
            }
        }
        all.insert("filename".into(), self.filename.as_str().into());
        all.insert("format".into(), self.format.into());
        if report.fragmented_clusters > 0 {
            all.insert("fragmented-clusters".into(), report.fragmented_clusters.into());
        }
        Value::Object(all)
    }

    fn human(&self) -> String {
        let report = &self.report;
        let mut out = String::new();
        if report.corruptions > 0 {
            out += &format!(
                "\n{} errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.\n",
                report.corruptions
            );
        }
        if report.leaks > 0 {
            out += &format!(
                "\n{} leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.\n",
                report.leaks
            );
        }
        if report.check_errors > 0 {
            out += &format!("\n{} internal errors have occurred during the check.\n", report.check_errors);
        }
        if out.is_empty() {
            out += "No errors were found on the image.\n";
        }
        if report.total_clusters > 0 && report.allocated_clusters > 0 {
            let percent = |part: u64, of: u64| part as f64 * 100.0 / of as f64;
            out += &format!(
                "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters\n",
                report.allocated_clusters,
                report.total_clusters,
                percent(report.allocated_clusters, report.total_clusters),
                percent(report.fragmented_clusters, report.allocated_clusters),
                percent(report.compressed_clusters, report.allocated_clusters),
            );
        }
        if let Some(offset) = report.image_end_offset {
            out += &format!("Image end offset: {offset}\n");
        }
        out
    }
}
