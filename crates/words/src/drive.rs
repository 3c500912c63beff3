//! `--drive`: an image and how to use it, as one list of options.

use crate::{Refused, options};

/// What a list said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drive {
    /// The image's name.
    pub file: Option<String>,
    /// Its format.
    pub format: Option<String>,
    /// Whether what is read from the backing is kept.
    pub copy_on_read: Option<bool>,
    /// Whether the guest may not write.
    pub read_only: Option<bool>,
}

impl Drive {
    /// Reads a list. Of words for one thing the last wins.
    ///
    /// # Errors
    /// A parameter that is not known, or has no value where it needs one.
    pub fn parse(list: &str) -> Result<Self, Refused> {
        let mut drive = Self::default();
        let mut media_is_cdrom = false;
        for (name, value) in options::pairs([list]) {
            let value = value.as_deref();
            let needed = || {
                value.map(str::to_owned).ok_or_else(|| Refused::new(format!("Parameter '{name}' is missing")))
            };
            match name.as_str() {
                "file" => drive.file = Some(needed()?),
                "format" | "driver" => drive.format = Some(needed()?),
                "cor" | "copy-on-read" => drive.copy_on_read = Some(options::switch(&name, value)?),
                "readonly" | "read-only" => drive.read_only = Some(options::switch(&name, value)?),
                // Which bus a machine would put it on.
                "if" => {}
                "media" => match value {
                    Some("cdrom") => media_is_cdrom = true,
                    Some("disk") => media_is_cdrom = false,
                    _ => return Err(Refused::new("Parameter 'media' expects 'cdrom' or 'disk'")),
                },
                _ => return Err(Refused::new(format!("--drive: Invalid parameter '{name}'"))),
            }
        }
        if media_is_cdrom {
            if drive.read_only == Some(false) {
                return Err(Refused::new("--drive: media=cdrom and readonly=off exclude each other"));
            }
            drive.read_only = Some(true);
        }
        Ok(drive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Usual in drive lines of QEMU: `Invalid parameter 'media'` for who carried one over.
    #[test]
    fn a_cdrom_is_read_only() {
        let read_only = |list| Drive::parse(list).map(|drive| drive.read_only);
        assert_eq!(read_only("file=a,media=cdrom"), Ok(Some(true)));
        assert_eq!(read_only("media=cdrom,readonly=on"), Ok(Some(true)));
        assert_eq!(read_only("media=disk"), Ok(None));
        assert_eq!(read_only("media=disk,readonly=on"), Ok(Some(true)));
        for list in ["media=cdrom,readonly=off", "media=floppy", "media"] {
            assert!(read_only(list).is_err(), "{list}");
        }
    }

    #[test]
    fn the_last_word_wins() {
        let drive = Drive::parse("file=a,,b,cor,if=ide,driver=raw,format=qed,readonly=off,nocor")
            .expect("good words");
        let wanted = Drive {
            file: Some("a,b".into()),
            format: Some("qed".into()),
            copy_on_read: Some(false),
            read_only: Some(false),
        };
        assert_eq!(drive, wanted);
        assert_eq!(Drive::parse(""), Ok(Drive::default()));
        for (list, word) in [("file", "missing"), ("cor=x", "'on' or 'off'"), ("aio=native", "'aio'")] {
            let Refused(text) = Drive::parse(list).expect_err("bad words");
            assert!(text.contains(word), "{text}");
        }
    }
}
