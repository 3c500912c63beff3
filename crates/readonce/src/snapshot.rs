//! `readonce snapshot`: internal snapshots listed, made, applied and deleted, as qemu-img does it.

use std::{
    fmt::Write as _,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use readonce_disk::chain::TopOnly;
use readonce_format::driver::{Snapshot, SnapshotChange};
use readonce_storage::runtime::TokioRuntime;

use crate::{
    failure::{Failure, Outcome},
    human,
    look::{self, LookArgs},
    stdout,
};

/// List the internal snapshots of an image, make, apply or delete one
#[derive(Debug, clap::Args)]
#[command(override_usage = "readonce snapshot [OPTIONS] [-l | -c NAME | -a SNAPSHOT | -d NAME] IMAGE")]
pub struct Args {
    #[command(flatten)]
    look: LookArgs,
    /// List them, which is the default
    #[arg(short = 'l', long)]
    list: bool,
    /// Keep the disk as it is now under this name
    #[arg(short = 'c', long, value_name = "NAME")]
    create: Option<String>,
    /// Make the disk what it was in the snapshot of this number, or else name
    #[arg(short = 'a', long, value_name = "SNAPSHOT")]
    apply: Option<String>,
    /// Let the snapshot of this name go
    #[arg(short = 'd', long, value_name = "NAME")]
    delete: Option<String>,
    /// Print errors only
    #[arg(short = 'q', long)]
    quiet: bool,
    /// File; a URL can be listed
    #[arg(value_name = "IMAGE")]
    images: Vec<String>,
}

/// Runs it.
pub async fn run(args: Args) -> Outcome {
    let changes = [
        args.create.clone().map(|name| {
            let (date_sec, date_nsec) = now();
            SnapshotChange::Create { name, date_sec, date_nsec }
        }),
        args.apply.clone().map(SnapshotChange::Apply),
        args.delete.clone().map(SnapshotChange::Delete),
    ];
    let mut changes = changes.into_iter().flatten();
    let change = changes.next();
    if changes.next().is_some() || (args.list && change.is_some()) {
        return Err(Failure::usage("snapshot", "Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let image = look::one_image("snapshot", &args.images)?;
    match change {
        Some(change) => apply(image, &args, &change).await?,
        None => {
            let layers = look::layers(image, &args.look, TopOnly::Yes, &TokioRuntime::current()).await?;
            let found = layers.iter().flat_map(|layer| &layer.description.snapshots);
            let found: Vec<&Snapshot> = found.collect();
            stdout::print(table(&found));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds and nanoseconds since 1970. The format's seconds end in 2106.
fn now() -> (u32, u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos())
}

async fn apply(image: &str, args: &Args, change: &SnapshotChange) -> Result<(), Failure> {
    if args.look.force_share {
        return Err(look::cannot_open(image, "force-share=on can only be used with read-only images"));
    }
    let held = look::hold(image, args.look.format.as_deref()).await?;
    if held.description.format != "qcow2" {
        return Err(Failure::new(match change {
            SnapshotChange::Create { name, .. } => {
                format!("Could not create snapshot '{name}': Operation not supported")
            }
            SnapshotChange::Apply(name) => {
                format!("Could not apply snapshot '{name}': Block driver does not support snapshots")
            }
            SnapshotChange::Delete(name) => format!("Could not delete snapshot '{name}': snapshot not found"),
        }));
    }
    held.driver.snapshot(&held.file, change).await.map_err(|error| Failure::new(error.to_string()))
}

/// The list as qemu-img prints it; nothing where there is none.
pub fn table(snapshots: &[&Snapshot]) -> String {
    let mut out = String::new();
    if snapshots.is_empty() {
        return out;
    }
    let mut row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, icount] = cells;
        let _ = writeln!(out, "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}");
    };
    row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in snapshots {
        let (milliseconds, seconds) =
            (snapshot.vm_clock_nsec / 1_000_000 % 1000, snapshot.vm_clock_nsec / 1_000_000_000);
        let clock =
            format!("{:04}:{:02}:{:02}.{milliseconds:03}", seconds / 3600, seconds / 60 % 60, seconds % 60);
        let icount = snapshot.icount.map_or("--".to_owned(), |count| count.to_string());
        row([
            &snapshot.id,
            &snapshot.name,
            &human::size(snapshot.vm_state_size),
            &human::local_time(snapshot.date_sec),
            &clock,
            &icount,
        ]);
    }
    format!("Snapshot list:\n{out}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_widths_of_qemu_img() {
        let snapshot = Snapshot {
            id: "1".into(),
            name: "a".into(),
            vm_state_size: 300 << 20,
            date_sec: 0,
            date_nsec: 0,
            vm_clock_nsec: 3_723_456_789_000,
            icount: None,
            disk_size: 0,
        };
        let told = table(&[&snapshot]);
        let lines: Vec<&str> = told.lines().collect();
        assert_eq!(
            lines[1],
            "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
        );
        assert!(lines[2].starts_with("1       a                 300 MiB "), "{told}");
        assert!(lines[2].ends_with("  0001:02:03.456         --"), "{told}");
        assert_eq!(table(&[]), "");
    }
}
