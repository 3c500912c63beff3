//! Words of the command line: `-o` lists, sizes and times.
//!
//! - In a list a `,` parts options and `,,` is a comma in a value, as in QEMU.
//! - A size has one of the suffixes B, k, M, G, T, P, E (either case, powers of 1024), and may be a fraction of one.

use std::time::Duration;

use crate::Refused;

/// One `-o` option; a bare one has no value.
pub type Pair = (String, Option<String>);

/// The options of all `-o` of a command line, in order.
pub fn pairs<'a>(lists: impl IntoIterator<Item = &'a str>) -> Vec<Pair> {
    let mut pairs = Vec::new();
    for list in lists {
        for option in split(list) {
            pairs.push(match option.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                // As in QEMU: `nolazy_refcounts`.
                None => match option.strip_prefix("no") {
                    Some(name) if !name.is_empty() => (name.to_owned(), Some("off".to_owned())),
                    _ => (option, None),
                },
            });
        }
    }
    pairs
}

/// Refuses a list that is empty, or begins or ends with a comma that parts nothing.
pub fn check_lists<'a>(lists: impl IntoIterator<Item = &'a str>) -> Result<(), Refused> {
    for list in lists {
        let commas_behind = list.len() - list.trim_end_matches(',').len();
        if list.is_empty() || list.starts_with(',') || commas_behind % 2 == 1 {
            return Err(Refused(format!("Invalid option list: {list}")));
        }
    }
    Ok(())
}

fn split(list: &str) -> Vec<String> {
    let mut options = Vec::new();
    let mut option = String::new();
    let mut letters = list.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            ',' if letters.next_if_eq(&',').is_some() => option.push(','),
            ',' => options.push(std::mem::take(&mut option)),
            letter => option.push(letter),
        }
    }
    options.push(option);
    options.retain(|option| !option.is_empty());
    options
}

/// Why a text is no size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoSize {
    /// Not a number, or an unknown suffix.
    Malformed,
    /// Negative, or more than 2^64 - 1.
    OutOfRange,
}

/// A size in bytes.
pub fn size(text: &str) -> Result<u64, NoSize> {
    let (text, negative) = match text.strip_prefix('-') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_digit()) => (rest, true),
        _ => (text, false),
    };
    let value = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) if hex.bytes().all(|digit| digit.is_ascii_hexdigit()) && !hex.is_empty() => {
            u64::from_str_radix(hex, 16).map_err(|_| NoSize::OutOfRange)
        }
        Some(_) => Err(NoSize::Malformed),
        None => decimal(text),
    }?;
    if negative && value > 0 { Err(NoSize::OutOfRange) } else { Ok(value) }
}

fn decimal(text: &str) -> Result<u64, NoSize> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, rest) = text.split_at(digits_end);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => {
            let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (fraction, suffix) = rest.split_at(end);
            (Some(fraction), suffix)
        }
        None => (None, rest),
    };
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(NoSize::Malformed),
    };
    if digits.is_empty()
        || (fraction.is_some_and(|digits| digits.bytes().any(|digit| digit != b'0')) && shift == 0)
    {
        return Err(NoSize::Malformed);
    }
    let whole: u128 = digits.parse().map_err(|_| NoSize::OutOfRange)?;
    let whole = whole.checked_mul(1 << shift).ok_or(NoSize::OutOfRange)?;
    let part = match fraction {
        Some(digits) if !digits.is_empty() => {
            // More digits than these change no byte.
            let digits: String = digits.chars().take(18).collect();
            let number: u128 = digits.parse().map_err(|_| NoSize::Malformed)?;
            (number << shift) / 10_u128.pow(u32::try_from(digits.len()).map_err(|_| NoSize::Malformed)?)
        }
        _ => 0,
    };
    u64::try_from(whole + part).map_err(|_| NoSize::OutOfRange)
}

/// A size given for the parameter `name`, refused in QEMU's words.
pub fn parameter_size(name: &str, text: &str) -> Result<u64, Refused> {
    size(text).map_err(|error| {
        Refused::new(match error {
            NoSize::Malformed => format!(
                "Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
                 kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
            ),
            NoSize::OutOfRange => format!("Value '{text}' is out of range for parameter '{name}'"),
        })
    })
}

/// A number given for the parameter `name`, refused in QEMU's words.
pub fn parameter_number(name: &str, text: &str) -> Result<u64, Refused> {
    let number = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map_err(|_| Refused::new(format!("Parameter '{name}' expects a number")))
}

/// A size of an image, refused in QEMU's words.
pub fn image_size(text: &str) -> Result<u64, Refused> {
    match size(text) {
        Ok(size) if i64::try_from(size).is_ok() => Ok(size),
        Err(NoSize::Malformed) => Err(Refused::new(format!("Invalid image size specified: '{text}'."))),
        _ => Err(Refused::new(format!("Invalid image size specified. Must be between 0 and {}.", i64::MAX))),
    }
}

/// `on` or `off`, or another word that QEMU takes for them; a bare option means on.
pub fn switch(name: &str, value: Option<&str>) -> Result<bool, Refused> {
    match value {
        None | Some("on" | "yes" | "true" | "y") => Ok(true),
        Some("off" | "no" | "false" | "n") => Ok(false),
        Some(_) => Err(Refused::new(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

/// A time: a number with `ms`, `s`, `m` or `h`; bare, it is seconds. For clap.
pub fn time(text: &str) -> Result<Duration, String> {
    let digits_end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let refused = || format!("'{text}' is not a time: say 500ms, 30s, 10m or 2h");
    let number: u64 = digits.parse().map_err(|_| refused())?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "" | "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(refused()),
    };
    number.checked_mul(unit_ms).map(Duration::from_millis).ok_or_else(refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_parted_at_single_commas() {
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(
            pairs(["a=1,b,,c=x,,y", "copy_on_read"]),
            [("a".into(), some("1")), ("b,c".into(), some("x,y")), ("copy_on_read".into(), None)]
        );
        assert_eq!(pairs(["nocopy_on_read,no"]), [("copy_on_read".into(), some("off")), ("no".into(), None)]);
        assert_eq!(pairs([""]), []);
    }

    #[test]
    fn sizes_are_read_as_qemu_reads_them() {
        for (text, wanted) in [
            ("0", Ok(0)),
            ("1000", Ok(1000)),
            ("64k", Ok(65_536)),
            ("64K", Ok(65_536)),
            ("1.5M", Ok(1_572_864)),
            ("0x10", Ok(16)),
            ("12b", Ok(12)),
            ("16E", Err(NoSize::OutOfRange)),
            ("-5", Err(NoSize::OutOfRange)),
            ("1.5", Err(NoSize::Malformed)),
            ("10Q", Err(NoSize::Malformed)),
            ("", Err(NoSize::Malformed)),
            ("k", Err(NoSize::Malformed)),
            ("0x", Err(NoSize::Malformed)),
            ("99999999999999999999999999999999999999999999", Err(NoSize::OutOfRange)),
        ] {
            assert_eq!(size(text), wanted, "{text}");
        }
    }

    #[test]
    fn times_have_a_unit_or_are_seconds() {
        assert_eq!(time("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(time("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(time("1h"), Ok(Duration::from_secs(3600)));
        assert_eq!(time("5"), Ok(Duration::from_secs(5)));
        assert!(time("1d").is_err());
        assert!(time("").is_err());
    }
}
