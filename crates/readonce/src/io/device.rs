//! The image that `readonce io` has open: opened, closed, opened again, made larger.
//!
//! - An image that is opened again, or grows, is closed clean first. Where that or the open fails none is open any more.
//!
//! Not here: what is read and written (`commands`).

use std::time::Duration;

use readonce_disk::{
    Disk,
    chain::{self, Chain, ChainOptions, CopyOnRead, Locks, OpenError, Reporter},
};
use readonce_origin::Locator;
use readonce_storage::{LocalFile, local::OpenMode, runtime::TokioRuntime};
use readonce_words::command::{Refused, Words};

use super::commands::Done;
use crate::{
    chain_args::UseArgs,
    failure::Failure,
    look, report,
    report::ToldArgs,
    resize::{self, Growing},
};

/// How long the end may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// The image that is open, if one is.
pub struct Device {
    args: UseArgs,
    /// Also an image that is in use.
    force_share: bool,
    told: ToldArgs,
    reporter: Reporter,
    open: Option<Open>,
}

struct Open {
    chain: Chain,
    image: String,
}

impl Device {
    /// None is open yet. `args` say how images are opened.
    pub fn new(args: UseArgs, force_share: bool, told: ToldArgs) -> Self {
        // As qemu-io: which files are opened is not told, unless it is asked for.
        let reporter = if told.verbose > 0 { told.reporter() } else { told.warnings() };
        Self { args, force_share, told, reporter, open: None }
    }

    /// Opens `image`.
    pub async fn open(&mut self, image: &str) -> Result<(), Failure> {
        let mut options = self.args.chain_options(image)?;
        if self.force_share {
            share(image, &mut options)?;
        }
        let chain = chain::open(image, options, TokioRuntime::current(), self.reporter.clone()).await;
        let chain = chain.map_err(|error| not_opened(image, self.args.read_only, error))?;
        self.open = Some(Open { chain, image: image.to_owned() });
        Ok(())
    }

    /// Closes it clean, if one is open.
    pub async fn end(&mut self) -> Result<(), Failure> {
        let Some(Open { chain, image }) = self.open.take() else { return Ok(()) };
        chain.close(CLOSE_TIMEOUT).await.map_err(|error| Failure::new(format!("{image}: {error}")))
    }

    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    pub fn disk(&self) -> Option<&Disk> {
        Some(&*self.open.as_ref()?.chain.disk)
    }

    /// Its name, and its format where that was said.
    pub fn image(&self) -> Option<(&str, Option<&str>)> {
        Some((&self.open.as_ref()?.image, self.args.format.as_deref()))
    }

    /// `open`: the flags of the command line hold for the image that it named alone.
    pub async fn open_typed(&mut self, words: &Words) -> Result<Done, Refused> {
        if self.is_open() {
            report::tell("file open already, try 'help close'");
            return Ok(Done::Badly);
        }
        if let Some(letter) = ['s', 'n', 'k', 't', 'd', 'i'].into_iter().find(|&letter| words.has(letter)) {
            report::tell(format_args!("open -{letter} is not supported"));
            return Ok(Done::Badly);
        }
        let format = match words.value('o').map(|option| (option, option.strip_prefix("driver="))) {
            None => None,
            Some((_, Some(format))) => Some(format.to_owned()),
            Some((option, None)) => {
                report::tell(format_args!("open -o {option} is not supported: driver=FMT alone is"));
                return Ok(Done::Badly);
            }
        };
        let [image] = &words.rest[..] else {
            return Err(Refused::Out("open takes one path".to_owned()));
        };
        self.args.format = format;
        self.args.read_only = words.has('r');
        self.force_share = words.has('U');
        self.args.copy_on_read = if words.has('C') { CopyOnRead::On } else { CopyOnRead::Auto };
        Ok(done(self.open(image).await))
    }

    /// `close`.
    pub async fn close(&mut self) -> Done {
        done(self.end().await)
    }

    /// `reopen`.
    pub async fn reopen(&mut self, words: &Words) -> Done {
        if let Some(letter) = ['c', 'o'].into_iter().find(|&letter| words.has(letter)) {
            report::tell(format_args!("reopen -{letter} is not supported"));
            return Done::Badly;
        }
        match (words.has('r'), words.has('w')) {
            (true, true) => {
                report::tell("Only one -r/-w option may be given");
                return Done::Badly;
            }
            (false, false) => return Done::Well,
            (read_only, _) => self.args.read_only = read_only,
        }
        let Some(image) = self.image().map(|(image, _)| image.to_owned()) else { return Done::Badly };
        let closed = self.end().await;
        match closed {
            Ok(()) => done(self.open(&image).await),
            failed => done(failed),
        }
    }

    /// `truncate`: an image can grow.
    pub async fn truncate(&mut self, words: &Words) -> Result<Done, Refused> {
        if let Err(failure) = resize::check_preallocation(words.value('m').unwrap_or("off")) {
            return Ok(done(Err(failure)));
        }
        let size = words.bytes(0)?;
        let Some(image) = self.image().map(|(image, _)| image.to_owned()) else { return Ok(Done::Badly) };
        if self.args.read_only {
            report::tell("Block node is read-only");
            return Ok(Done::Badly);
        }
        // The header is changed of closed images alone.
        let closed = self.end().await;
        if closed.is_err() {
            return Ok(done(closed));
        }
        let growing =
            Growing { image: &image, policy: &self.args.policy, origin: &self.args.origin, told: self.told };
        let grown = match look::hold(&image, self.args.format.as_deref()).await {
            Ok(held) => resize::grow(held, size, &growing).await,
            Err(failure) => Err(failure),
        };
        let opened = self.open(&image).await;
        Ok(done(grown.and(opened)))
    }
}

fn done(result: Result<(), Failure>) -> Done {
    match result {
        Ok(()) => Done::Well,
        Err(failure) => {
            failure.tell();
            Done::Badly
        }
    }
}

/// Has an image opened that another program may write: without a lock, and so without a write of ours, copy-on-read included.
fn share(image: &str, options: &mut ChainOptions) -> Result<(), Failure> {
    if !options.read_only || options.copy_on_read == CopyOnRead::On {
        let cause = "force-share=on can only be used with read-only images";
        return Err(Failure::new(format!("can't open device {image}: {cause}")));
    }
    options.locks = Locks::Share;
    options.copy_on_read = CopyOnRead::Off;
    Ok(())
}

/// In qemu-io's words: the file is named twice only where it is the file that cannot be opened.
fn not_opened(image: &str, read_only: bool, error: OpenError) -> Failure {
    let mode = if read_only { OpenMode::Read } else { OpenMode::ReadWrite };
    let told = match Locator::parse(image, None) {
        Ok(place @ Locator::File(_)) if place.printable() != error.name => look::told(error).text,
        Ok(Locator::File(path)) if LocalFile::open(&path, mode).is_ok() => look::in_qemu_words(&error.cause),
        _ => look::told(error).text,
    };
    Failure::new(format!("can't open device {image}: {told}"))
}
