//! `readonce demo`: the main job, from end to end, on this machine alone.
//!
//! - A built-in origin serves a generated disk behind a slow link. An image is made over it and served; a client uses it as a
//!   guest does, then reads all of it; the origin is shut, and all of it is read again.
//! - Every byte that is read is compared with a model (`demo/model`), and the image is checked. Any difference fails the demo.
//! - `demo/guest` is the client.
//!
//! Not here: a benchmark against other programs.

mod guest;
mod model;

use std::{
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use readonce_disk::chain::{self, ChainOptions};
use readonce_export::nbd::Listener;
use readonce_format::driver::{BackingRef, CreateSpec, Pin};
use readonce_origin::{Locator, OriginOptions, Proxies};
use readonce_storage::{LocalFile, ReadAt, local::OpenMode, runtime::TokioRuntime};
use readonce_testkit::{Content, FaultyOrigin, LinkSpec, OriginSpec};

use self::{guest::Guest, model::Model};
use crate::{
    failure::{Failure, Outcome},
    folders, human,
    new_image::Keeper,
    report::ToldArgs,
    session::{EndArgs, Names, Session},
    signals::{Signals, until_signal},
    stdout,
};

/// Bytes of the disk.
const DISK_BYTES: u64 = 256 << 20;
/// Room for the image: the disk, and what its tables and the guest's own writes take at most.
const ROOM_BYTES: u64 = DISK_BYTES + (16 << 20);
/// One in so many blocks of 64 KiB is all zeros.
const ZERO_EVERY: u64 = 6;
/// The link: Mbit/s, and milliseconds from a request to its answer.
const LINK: (u64, u64) = (100, 40);
/// How long the origin is asked for once it is shut.
const AWAY: Duration = Duration::from_millis(500);

/// Show it all on this machine: a slow origin, an image over it, a guest
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Needs no network and no other program; takes about half a minute and 300 MiB in $TMPDIR or /var/tmp. Exit \
                        status 1 if any byte is wrong."
)]
pub struct Args {
    /// Another number is another disk and other requests
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Format of the image: qed or qcow2
    #[arg(long, value_name = "FMT", default_value = "qed")]
    format: String,
}

/// Runs it. A signal ends it, and what it made is deleted then too.
pub async fn run(args: Args) -> Outcome {
    until_signal(&mut Signals::catch()?, show(args)).await
}

async fn show(args: Args) -> Outcome {
    let keeper = Keeper::named(Some(&args.format))?;
    let folder = folders::roomy()?;
    folders::check_room(folder.path(), ROOM_BYTES)?;
    let image = folder.path().join("cached.img");
    let content = Content::seeded_with_zeros(args.seed, DISK_BYTES, ZERO_EVERY);
    let origin = FaultyOrigin::start(OriginSpec {
        link: Some(LinkSpec::new(LINK.0, LINK.1)),
        ..OriginSpec::new(content.clone())
    })
    .await
    .map_err(|error| failed("the origin", error))?;
    let model = Arc::new(Model::new(content, args.seed));
    stdout::line(format_args!(
        "A disk of {} behind a link of {} Mbit/s and {} ms; an image over it with copy-on-read; a guest.\n",
        human::size(DISK_BYTES),
        LINK.0,
        LINK.1
    ));
    let mut table = Table::new(&origin);

    let began = Instant::now();
    make(&image, keeper, &origin).await?;
    table.row("create the image", began, "one version of the disk is pinned".to_owned());

    let session = serve(&image, keeper, folder.path()).await?;
    let guest = Guest::connect(&folder.path().join("nbd"), Arc::clone(&model), args.seed).await?;
    let began = Instant::now();
    let booted = guest.boot().await?;
    table.row(
        "start a guest",
        began,
        format!(
            "{} reads, {} writes into clusters on their way (slowest write {} ms)",
            booted.reads,
            booted.writes,
            booted.slowest_write.as_millis()
        ),
    );
    let began = Instant::now();
    let read = guest.read_everything().await?;
    table.row("read everything", began, format!("all {} right", human::size(read)));
    let began = Instant::now();
    guest.flush().await?;
    table.row("flush", began, "the guest's writes are on the disk".to_owned());
    guest.leave().await;
    session.end(None).await?;

    let asked = origin.body_bytes();
    origin.vanish().await;
    let session = serve(&image, keeper, folder.path()).await?;
    let guest = Guest::connect(&folder.path().join("nbd"), Arc::clone(&model), args.seed).await?;
    let began = Instant::now();
    let read = guest.read_everything().await?;
    table.row("shut the origin, read all again", began, format!("all {} right", human::size(read)));
    guest.leave().await;
    session.end(None).await?;

    let began = Instant::now();
    check(&image, keeper).await?;
    table.row("check the image", began, "no errors, no leaks".to_owned());

    // The probe asks for one byte more.
    if asked > DISK_BYTES + 1 {
        return Err(Failure::new(format!(
            "the origin was asked for {asked} bytes, it has only {DISK_BYTES}"
        )));
    }
    stdout::line(format_args!(
        "\nEvery byte was right, and none was fetched twice: {:.2} of the disk's bytes crossed the link. With a real URL:\n\n    \
         readonce run http://HOST/Fedora.iso -- qemu-system-x86_64 -m 2G -cdrom {{uri}} -boot d\n",
        asked as f64 / DISK_BYTES as f64
    ));
    Ok(ExitCode::SUCCESS)
}

fn failed(what: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(format!("demo: {what}: {error}"))
}

/// Asks the origin on the loopback directly, whatever proxies there are.
fn origin_options() -> OriginOptions {
    OriginOptions {
        proxies: Proxies::None,
        probe_for: AWAY,
        retry_for: Duration::from_secs(10),
        ..OriginOptions::default()
    }
}

async fn make(image: &Path, keeper: Keeper, origin: &FaultyOrigin) -> Result<(), Failure> {
    let place = Locator::parse(&origin.url(), None).map_err(|error| failed("the origin", error))?;
    let options = OriginOptions { probe_for: Duration::from_secs(10), ..origin_options() };
    let opened = readonce_origin::open(&place, &options, &TokioRuntime::current())
        .await
        .map_err(|error| failed("the origin", error))?;
    let spec = CreateSpec {
        size: opened.len(),
        backing: Some(BackingRef { name: place.stored_name(), format: Some("raw".to_owned()) }),
        options: vec![("copy_on_read".to_owned(), None)],
        pin: Some(Pin { validator: opened.validator(), len: opened.len() }),
        data_file: None,
    };
    keeper.create(image, spec).await
}

async fn serve(image: &Path, keeper: Keeper, folder: &Path) -> Result<Session, Failure> {
    let told = ToldArgs { verbose: 0, quiet: true };
    let options = ChainOptions {
        format: Some(keeper.name().to_owned()),
        origin: origin_options(),
        ..ChainOptions::default()
    };
    let image = image.display().to_string();
    let chain = chain::open(&image, options, TokioRuntime::current(), told.reporter()).await?;
    let listener = Listener::unix(folder.join("nbd")).map_err(|error| failed("the socket", error))?;
    let end = EndArgs { shutdown_timeout: Duration::from_secs(30) };
    Session::start(chain, listener, Names { export: "", image: &image }, &end, told)
}

async fn check(image: &Path, keeper: Keeper) -> Result<(), Failure> {
    let file = LocalFile::open(image, OpenMode::Read).map_err(|error| failed("the image", error))?;
    let file: Arc<dyn ReadAt> = Arc::new(file);
    let report = keeper.driver().check(&file).await.map_err(|error| failed("check", error))?;
    match report.check_errors + report.corruptions + report.leaks {
        0 => Ok(()),
        _ => Err(failed("check", format!("{report:?}"))),
    }
}

/// The table of steps, with what each asked of the origin.
struct Table<'a> {
    origin: &'a FaultyOrigin,
    bytes: u64,
    requests: usize,
}

impl<'a> Table<'a> {
    fn new(origin: &'a FaultyOrigin) -> Self {
        stdout::line(format_args!("{:<32}{:>9}{:>12}{:>10}  result", "step", "time", "fetched", "requests"));
        Self { origin, bytes: 0, requests: 0 }
    }

    fn row(&mut self, step: &str, began: Instant, result: String) {
        let (bytes, requests) = (self.origin.body_bytes(), self.origin.log().len());
        stdout::line(format_args!(
            "{step:<32}{:>9}{:>12}{:>10}  {result}",
            human::seconds(began.elapsed()),
            human::size(bytes - self.bytes),
            requests - self.requests,
        ));
        (self.bytes, self.requests) = (bytes, requests);
    }
}
