//! Figures for people, written as QEMU's tools write them.

use std::time::Duration;

/// A size: three significant digits and a binary unit (`64 KiB`, `1.5 GiB`).
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // QEMU goes to the next unit at 1000 of the smaller one, so that three digits are enough.
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// As C's `%.3g`, for what `size` gives it.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        value if value >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.as_str() {
        "1000" => "1e+03".to_owned(),
        text if text.contains('.') => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        text => text.to_owned(),
    }
}

/// Bytes in qemu-io's way: three decimals, or none.
pub fn amount(bytes: u64) -> String {
    scaled(bytes as f64)
}

/// The same of any figure.
pub fn scaled(value: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    for (index, unit) in UNITS.iter().enumerate() {
        let scale = 2_f64.powi(60 - 10 * i32::try_from(index).expect("it is small"));
        if value >= scale {
            let text = format!("{:.3}", value / scale);
            return format!("{} {unit}", text.strip_suffix(".000").unwrap_or(&text));
        }
    }
    let text = format!("{value:.6}");
    format!("{} bytes", text.strip_suffix(".000000").unwrap_or(&text))
}

/// `1 request`, `2 requests`.
pub fn counted(count: u64, of: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {of}{plural}")
}

/// A time in seconds with one decimal.
pub fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

/// A time, seconds since 1970, at the clock on the wall here.
pub fn local_time(seconds: u32) -> String {
    let seconds = libc::time_t::from(seconds);
    // SAFETY: all zeros is a valid `tm`, which has no pointer that is read.
    let mut parts: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to values that live through the call.
    if unsafe { libc::localtime_r(&raw const seconds, &raw mut parts) }.is_null() {
        return seconds.to_string();
    }
    format!(
        "{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        i64::from(parts.tm_year) + 1900,
        parts.tm_mon + 1,
        parts.tm_mday,
        parts.tm_hour,
        parts.tm_min,
        parts.tm_sec
    )
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_written_as_qemu_writes_them() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1024, "1 KiB"),
            (65_536, "64 KiB"),
            (593_920, "580 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1_572_864, "1.5 MiB"),
            (107_374_182_400, "100 GiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }
}
