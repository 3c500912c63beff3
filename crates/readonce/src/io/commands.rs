//! What the commands of `readonce io` do.

use std::{
    io::Read,
    time::{Duration, Instant},
};

use bytes::Bytes;
use readonce_disk::{BlockDevice, DeviceError, Disk, ZeroMode, chain::driver_of};
use readonce_words::command::{Refused, SPECS, Words};

use super::device::Device;
use crate::{chain_args::OriginArgs, failure::Failure, human, info, look, report, stdout};

/// Bytes of one request to the disk; larger ones are parted, to bound memory.
const PIECE_BYTES_MAX: u64 = 32 << 20;
/// What is written without `-P`, as in qemu-io.
const PATTERN_DEFAULT: u8 = 0xcd;
/// A shorter pattern is repeated beforehand.
const PATTERN_BYTES_MIN: usize = 64 << 10;
/// Extents asked for at a time.
const EXTENTS_MAX: usize = 1024;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// As it should.
    Well,
    /// It failed, and said so.
    Badly,
    /// No further command is wanted.
    Quit,
}

/// Runs commands on the disk that is open.
pub struct Machine {
    /// What they work on.
    pub device: Device,
}

impl Machine {
    /// Runs one line.
    pub async fn run(&mut self, line: &str) -> Done {
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { return Done::Well };
        let arguments: Vec<&str> = words.collect();
        let Some(spec) = SPECS.iter().find(|spec| spec.names.contains(&name)) else {
            eprintln!("command \"{name}\" not found");
            return Done::Badly;
        };
        if !self.device.is_open() && !matches!(spec.names[0], "open" | "help" | "quit" | "sleep" | "abort") {
            eprintln!("no file open, try 'help open'");
            return Done::Badly;
        }
        let is_one_range = matches!(spec.names[0], "read" | "write" | "discard");
        let ran = match Words::parse(spec, &arguments) {
            Ok(words) if is_one_range && words.rest.len() > 2 => Err(Refused::Out(spec.usage())),
            Ok(words) => match spec.names[0] {
                "quit" => return Done::Quit,
                "abort" => {
                    stdout::flush();
                    std::process::abort()
                }
                "open" => self.device.open_typed(&words).await,
                "close" => Ok(self.device.close().await),
                "reopen" if !words.rest.is_empty() => Err(Refused::Out(spec.usage())),
                "reopen" => Ok(self.device.reopen(&words).await),
                "truncate" => self.device.truncate(&words).await,
                "read" | "readv" | "aio_read" => self.read(&words).await,
                "write" | "writev" | "aio_write" => self.write(&words, is_one_range).await,
                "discard" => self.discard(&words).await,
                "flush" => Ok(self.told(self.disk().flush().await, "flush")),
                "length" => {
                    stdout::line(human::amount(self.disk().size()));
                    Ok(Done::Well)
                }
                "info" => self.info().await,
                "alloc" => self.alloc(&words).await,
                "map" => self.map().await,
                "sleep" => match words.rest[0].parse() {
                    Ok(milliseconds) => {
                        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
                        Ok(Done::Well)
                    }
                    Err(_) => {
                        Err(Refused::Out(format!("{} is not a valid argument to sleep", words.rest[0])))
                    }
                },
                "help" => help(words.rest.first().map(String::as_str)),
                // aio_flush: nothing is ever left under way.
                _ => Ok(Done::Well),
            },
            Err(refused) => Err(refused),
        };
        match ran {
            Ok(done) => done,
            Err(Refused::Out(text)) => {
                stdout::line(text);
                Done::Badly
            }
            Err(Refused::Err(text)) => {
                eprintln!("{text}");
                Done::Badly
            }
            Err(Refused::Both { err, out }) => {
                eprintln!("{err}");
                stdout::line(out);
                Done::Badly
            }
        }
    }

    fn disk(&self) -> &Disk {
        self.device.disk().expect("a command that needs an image is not run without one")
    }

    fn told(&self, result: Result<(), DeviceError>, what: &str) -> Done {
        let Err(error) = result else { return Done::Well };
        let errno = match &error {
            DeviceError::Io(_) => "Input/output error",
            DeviceError::NoSpace(_) => "No space left on device",
            DeviceError::ReadOnly => "Operation not permitted",
            DeviceError::NotFast => "Operation not supported",
        };
        stdout::line(format_args!("{what} failed: {errno}"));
        report::tell(error);
        Done::Badly
    }

    /// Whether the range lies inside the disk; what qemu-io says if not.
    fn inside(&self, offset: u64, len: u64, what: &str) -> bool {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.disk().size());
        if !inside {
            stdout::line(format_args!("{what} failed: Input/output error"));
        }
        inside
    }

    fn is_read_only(&self) -> bool {
        if self.disk().read_only() {
            report::tell("Block node is read-only");
        }
        self.disk().read_only()
    }

    async fn read(&self, words: &Words) -> Result<Done, Refused> {
        let pattern = words.pattern()?;
        let (skip, check_max) = (words.bytes_of('s')?.unwrap_or(0), words.bytes_of('l')?);
        let offset = words.bytes(0)?;
        let len = words.len_from(1)?;
        let check_len = check_max.unwrap_or(len.saturating_sub(skip));
        if skip.checked_add(check_len).is_none_or(|end| end > len) {
            return Err(Refused::Out("pattern verification range exceeds end of read data".to_owned()));
        }
        if !self.inside(offset, len, "read") {
            return Ok(Done::Badly);
        }
        let began = Instant::now();
        let mut dump = String::new();
        let mut differs = false;
        let check = offset + skip..offset + skip + check_len;
        let mut at = offset;
        while at < offset + len {
            let piece = (offset + len - at).min(PIECE_BYTES_MAX);
            let data = match self.disk().read(at, usize::try_from(piece).expect("it is small")).await {
                Ok(data) => data,
                Err(error) => return Ok(self.told(Err(error), "read")),
            };
            if let Some(pattern) = pattern {
                let checked = (at..).zip(data.iter()).filter(|(place, _)| check.contains(place));
                differs |= checked.into_iter().any(|(_, byte)| *byte != pattern);
            }
            if words.has('v') {
                dump_bytes(&mut dump, at, &data);
            }
            at += piece;
        }
        let time = began.elapsed();
        if differs {
            stdout::line(format_args!(
                "Pattern verification failed at offset {}, {check_len} bytes",
                offset + skip
            ));
        }
        if !words.has('q') {
            stdout::print(dump);
            print_report("read", words, offset, len, time);
        }
        Ok(if differs { Done::Badly } else { Done::Well })
    }

    async fn write(&self, words: &Words, is_one_range: bool) -> Result<Done, Refused> {
        if self.is_read_only() {
            return Ok(Done::Badly);
        }
        if ['z', 'P', 's'].into_iter().filter(|&letter| words.has(letter)).count() > 1 {
            return Err(Refused::Out(
                "Only one of -z, -P, and -s can be specified at the same time".to_owned(),
            ));
        }
        if words.has('c') {
            report::tell("compressed clusters are read, and not written: write -c is not supported");
            return Ok(Done::Badly);
        }
        for letter in ['n', 'u'] {
            if words.has(letter) && !words.has('z') {
                return Err(Refused::Out(format!("-{letter} requires -z to be specified")));
            }
        }
        let pattern = words.pattern()?.unwrap_or(PATTERN_DEFAULT);
        let offset = words.bytes(0)?;
        let len = match (words.has('z'), words.has('n')) {
            (true, true) => words.bytes(1)?,
            (true, false) => words.len_of_request(1, " without -n")?,
            (false, _) if is_one_range => words.len_of_request(1, " without -n")?,
            (false, _) => words.len_from(1)?,
        };
        let pattern = match words.value('s') {
            Some(path) => source(path, len)?,
            None => vec![pattern],
        };
        if !self.inside(offset, len, "write") {
            return Ok(Done::Badly);
        }
        let began = Instant::now();
        let result = match words.has('z') {
            true => {
                let mode = ZeroMode { keep_space: false, only_if_fast: words.has('n') };
                match len {
                    0 => Ok(()),
                    len => self.disk().write_zeroes(offset, len, mode).await,
                }
            }
            false => self.write_pattern(offset, len, &pattern).await,
        };
        let result = match (result, words.has('f')) {
            (Ok(()), true) => self.disk().flush().await,
            (result, _) => result,
        };
        let time = began.elapsed();
        let done = self.told(result, "write");
        if done == Done::Well && !words.has('q') {
            print_report("wrote", words, offset, len, time);
        }
        Ok(done)
    }

    /// Writes `pattern`, again and again.
    async fn write_pattern(&self, offset: u64, len: u64, pattern: &[u8]) -> Result<(), DeviceError> {
        let pattern = pattern.repeat(PATTERN_BYTES_MIN.div_ceil(pattern.len().max(1)));
        let (mut at, mut next) = (offset, 0);
        while at < offset + len {
            let piece = (offset + len - at).min(PIECE_BYTES_MAX);
            let piece_len = usize::try_from(piece).expect("it is small");
            let mut data = Vec::with_capacity(piece_len);
            while data.len() < piece_len {
                let run = (pattern.len() - next).min(piece_len - data.len());
                data.extend_from_slice(&pattern[next..next + run]);
                next = (next + run) % pattern.len();
            }
            self.disk().write(at, Bytes::from(data)).await?;
            at += piece;
        }
        Ok(())
    }

    async fn discard(&self, words: &Words) -> Result<Done, Refused> {
        if self.is_read_only() {
            return Ok(Done::Badly);
        }
        let (offset, len) = (words.bytes(0)?, words.len_of_request(1, "")?);
        if !self.inside(offset, len, "discard") {
            return Ok(Done::Badly);
        }
        let began = Instant::now();
        let result = if len > 0 { self.disk().trim(offset, len).await } else { Ok(()) };
        let done = self.told(result, "discard");
        if done == Done::Well && !words.has('q') {
            print_report("discard", words, offset, len, began.elapsed());
        }
        Ok(done)
    }

    async fn info(&self) -> Result<Done, Refused> {
        let (image, format) =
            self.device.image().expect("a command that needs an image is not run without one");
        // Our own lock is on it; what its header says does not change while it is open.
        let described = async {
            let (file, _) = look::readable(image, true, &OriginArgs::NONE).await?;
            let driver = driver_of(&*file, format).await.map_err(Failure::new)?;
            driver.describe(&file).await.map_err(|error| Failure::new(error.to_string()))
        };
        let description = match described.await {
            Ok(description) => description,
            Err(failure) => {
                failure.tell();
                return Ok(Done::Badly);
            }
        };
        stdout::print(info::of_open(&description));
        Ok(Done::Well)
    }

    /// Runs of bytes from `offset`, each with whether the top image holds it.
    async fn runs(&self, offset: u64, len: u64) -> Result<Vec<(u64, bool)>, DeviceError> {
        let mut runs: Vec<(u64, bool)> = Vec::new();
        let mut at = offset;
        while at < offset + len {
            for extent in self.disk().status(at, offset + len - at, EXTENTS_MAX).await? {
                at += extent.len;
                match runs.last_mut() {
                    Some((len, top)) if *top == (extent.depth == 1) => *len += extent.len,
                    _ => runs.push((extent.len, extent.depth == 1)),
                }
            }
        }
        Ok(runs)
    }

    async fn alloc(&self, words: &Words) -> Result<Done, Refused> {
        let offset = words.bytes(0)?;
        let len = if words.rest.len() > 1 { words.bytes(1)? } else { 512 };
        if !self.inside(offset, len, "alloc") {
            return Ok(Done::Badly);
        }
        match self.runs(offset, len).await {
            Ok(runs) => {
                let held: u64 = runs.iter().filter(|(_, top)| *top).map(|(len, _)| len).sum();
                stdout::line(format_args!(
                    "{held}/{len} bytes allocated at offset {}",
                    human::amount(offset)
                ));
                Ok(Done::Well)
            }
            Err(error) => Ok(self.told(Err(error), "alloc")),
        }
    }

    async fn map(&self) -> Result<Done, Refused> {
        let runs = match self.runs(0, self.disk().size()).await {
            Ok(runs) => runs,
            Err(error) => return Ok(self.told(Err(error), "map")),
        };
        let mut at = 0;
        for (len, top) in runs {
            let state = if top { "    allocated" } else { "not allocated" };
            stdout::line(format_args!(
                "{} ({len:#x}) bytes {state} at offset {} ({at:#x})",
                human::amount(len),
                human::amount(at)
            ));
            at += len;
        }
        Ok(Done::Well)
    }
}

/// What help says, of one command or of all.
fn help(name: Option<&str>) -> Result<Done, Refused> {
    let Some(name) = name else {
        for spec in SPECS {
            stdout::line(spec.usage());
        }
        stdout::line("\nUse 'help commandname' for extended help.");
        return Ok(Done::Well);
    };
    let Some(spec) = SPECS.iter().find(|spec| spec.names.contains(&name)) else {
        return Err(Refused::Out(format!("command {name} not found")));
    };
    stdout::line(spec.usage_as(name));
    for line in spec.options_help() {
        stdout::line(line);
    }
    Ok(Done::Well)
}

/// The first bytes of a file, `len` of them at most.
fn source(path: &str, len: u64) -> Result<Vec<u8>, Refused> {
    let failed = |error: std::io::Error| Refused::Err(format!("{path}: {}", look::without_number(&error)));
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|file| file.take(len).read_to_end(&mut bytes)).map_err(failed)?;
    match bytes.is_empty() && len > 0 {
        true => Err(Refused::Err(format!("{path}: file is empty"))),
        false => Ok(bytes),
    }
}

fn print_report(what: &str, words: &Words, offset: u64, len: u64, time: Duration) {
    let seconds = time.as_secs_f64().max(1e-9);
    let (bytes_rate, ops_rate) = (len as f64 / seconds, 1.0 / seconds);
    let (whole, hundredths) = (time.as_secs(), time.subsec_millis() / 10);
    if words.has('C') {
        let (hours, minutes, rest) = (whole / 3600, whole / 60 % 60, whole % 60);
        stdout::line(format_args!(
            "{len},1,{hours}:{minutes:02}:{rest:02}.{hundredths:02},{bytes_rate:.3},{ops_rate:.3}"
        ));
        return;
    }
    let time = match whole {
        0..60 => format!("{whole:02}.{hundredths:02} sec"),
        60..3600 => format!("{:02}:{:02}.{hundredths:02}", whole / 60, whole % 60),
        _ => format!("{}:{:02}:{:02}.{hundredths:02}", whole / 3600, whole / 60 % 60, whole % 60),
    };
    stdout::line(format_args!("{what} {len}/{len} bytes at offset {offset}"));
    stdout::line(format_args!(
        "{}, 1 ops; {time} ({}/sec and {ops_rate:.4} ops/sec)",
        human::amount(len),
        human::scaled(bytes_rate)
    ));
}

fn dump_bytes(out: &mut String, offset: u64, data: &[u8]) {
    use std::fmt::Write as _;
    for (index, line) in data.chunks(16).enumerate() {
        let _ = write!(out, "{:08x}:  ", offset + index as u64 * 16);
        for byte in line {
            let _ = write!(out, "{byte:02x} ");
        }
        out.push(' ');
        out.extend(
            line.iter()
                .map(|&byte| if byte.is_ascii_graphic() || byte == b' ' { char::from(byte) } else { '.' }),
        );
        out.push('\n');
    }
}
