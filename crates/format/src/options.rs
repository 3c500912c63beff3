//! Values of `-o` options, as QEMU reads them and in its words.
//!
//! Not here: which options there are, and their limits.

use crate::FormatError;

/// A switch. One without a value is on.
pub(crate) fn switch(name: &str, value: Option<&str>) -> Result<bool, FormatError> {
    match value {
        None | Some("on" | "yes" | "true" | "y") => Ok(true),
        Some("off" | "no" | "false" | "n") => Ok(false),
        Some(_) => Err(FormatError::Invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
    }
}

/// A number of bytes with one of QEMU's suffixes.
pub(crate) fn size(name: &str, value: Option<&str>) -> Result<u64, FormatError> {
    let value = value.unwrap_or("on");
    let refused = || {
        FormatError::Invalid(format!(
            "Parameter '{name}' expects a non-negative number below 2^64\nOptional suffix k, M, G, T, P or E means \
             kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively."
        ))
    };
    let out_of_range =
        || FormatError::Invalid(format!("Value '{value}' is out of range for parameter '{name}'"));
    if value.strip_prefix('-').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) {
        return Err(out_of_range());
    }
    if let Some(hex) = value.strip_prefix("0x") {
        return u64::from_str_radix(hex, 16).map_err(|_| refused());
    }
    let (digits, shift) = match value.strip_suffix(|c: char| "bBkKmMgGtTpPeE".contains(c)) {
        None => (value, 0),
        Some(digits) => {
            let shift = match value.chars().last().map(|c| c.to_ascii_lowercase()) {
                Some('k') => 10,
                Some('m') => 20,
                Some('g') => 30,
                Some('t') => 40,
                Some('p') => 50,
                Some('e') => 60,
                _ => 0,
            };
            (digits, shift)
        }
    };
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(refused());
    }
    let number: u64 = digits.parse().map_err(|_| out_of_range())?;
    number.checked_mul(1 << shift).ok_or_else(out_of_range)
}

/// A number.
pub(crate) fn number(name: &str, value: Option<&str>) -> Result<u64, FormatError> {
    let value = value.unwrap_or("on");
    let parsed = match value.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => value.parse(),
    };
    parsed.map_err(|_| FormatError::Invalid(format!("Parameter '{name}' expects a number")))
}

/// One of several words; `shown` is the name that QEMU uses when it refuses.
pub(crate) fn word<T: Copy>(shown: &str, value: Option<&str>, words: &[(&str, T)]) -> Result<T, FormatError> {
    let value = value.unwrap_or("on");
    words
        .iter()
        .find(|(word, _)| *word == value)
        .map(|&(_, meaning)| meaning)
        .ok_or_else(|| FormatError::Invalid(format!("Parameter '{shown}' does not accept value '{value}'")))
}
