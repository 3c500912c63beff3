//! Words of the command line: `-o` lists, `--drive`, sizes, numbers and times, lines of `readonce io`.
//!
//! - What is put together from known parts is taken apart into the same parts, and worth what the parts are worth.
//! - What is refused is refused with words.

use readonce_words::{
    Refused,
    command::{self, SPECS, Words},
    drive::Drive,
    options,
};

use crate::draw::Draw;

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    match draw.below(6) {
        0 => any_text(&text(&mut draw)),
        1 => list(&mut draw),
        2 => size(&mut draw),
        3 => drive(&mut draw),
        _ => line(&mut draw),
    }
}

fn text(draw: &mut Draw<'_>) -> String {
    const PIECES: &[&str] = &[
        "file",
        "format",
        "cor",
        "no",
        "nocor",
        "readonly",
        "if",
        "=",
        ",",
        ",,",
        "on",
        "off",
        "0",
        "9",
        "1",
        "x",
        "0x",
        "18446744073709551616",
        ".",
        "5",
        "-",
        "+",
        "k",
        "M",
        "E",
        "ms",
        "h",
        "\0",
        " ",
        "\u{e9}",
        "\u{ff10}",
    ];
    if draw.once_in(2) {
        String::from_utf8_lossy(draw.rest()).into_owned()
    } else {
        (0..draw.below(16)).map(|_| draw.of(PIECES)).collect()
    }
}

/// Anything at all, wherever a word may stand.
fn any_text(text: &str) {
    let said = |refused: Option<Refused>| {
        if let Some(Refused(words)) = refused {
            assert!(!words.is_empty() && words.len() < 512 + 4 * text.len(), "{text:?}: {words:?}");
        }
    };
    let pairs = options::pairs([text]);
    assert!(
        pairs.iter().map(|(name, value)| name.len() + value.as_ref().map_or(0, String::len)).sum::<usize>()
            <= 3 * text.len()
    );
    for (name, value) in &pairs {
        said(options::switch(name, value.as_deref()).err());
    }
    said(Drive::parse(text).err());
    said(options::image_size(text).err());
    said(options::parameter_size("p", text).err());
    said(options::parameter_number("p", text).err());
    let image_size = options::image_size(text).ok();
    assert_eq!(image_size, options::size(text).ok().filter(|size| i64::try_from(*size).is_ok()), "{text:?}");
    if let Err(words) = options::time(text) {
        assert!(!words.is_empty());
    }
}

/// A list of drawn pairs.
fn list(draw: &mut Draw<'_>) {
    let word = |draw: &mut Draw<'_>| -> String {
        let letter = |draw: &mut Draw<'_>| draw.of(&["a", "b", ",", "=", " ", "\u{e9}", "no"]);
        (0..draw.below(6)).map(|_| letter(draw)).collect()
    };
    let mut wanted = Vec::new();
    let mut lists: Vec<String> = vec![String::new()];
    for _ in 0..draw.below(8) {
        let name = word(draw).replace('=', "");
        let value = draw.once_in(2).then(|| word(draw));
        let typed = match &value {
            Some(value) => format!("{name}={value}"),
            None => name.clone(),
        };
        if typed.is_empty() {
            continue;
        }
        let list = lists.last_mut().expect("there is one");
        if !list.is_empty() {
            list.push(',');
        }
        list.push_str(&typed.replace(',', ",,"));
        if draw.once_in(4) {
            lists.push(String::new());
        }
        wanted.push(match (name.strip_prefix("no"), value) {
            (Some(rest), None) if !rest.is_empty() => (rest.to_owned(), Some("off".to_owned())),
            (_, value) => (name, value),
        });
    }
    // Where a list of several begins or ends with a comma of its own, it cannot be told from the one between two.
    let told = lists.iter().all(|list| !list.contains(",,,"));
    let found = options::pairs(lists.iter().map(String::as_str));
    if told {
        assert_eq!(found, wanted, "{lists:?}");
    }
}

/// A size of known parts.
fn size(draw: &mut Draw<'_>) {
    const SUFFIXES: [(&str, u32); 13] = [
        ("", 0),
        ("b", 0),
        ("B", 0),
        ("k", 10),
        ("K", 10),
        ("m", 20),
        ("M", 20),
        ("g", 30),
        ("G", 30),
        ("t", 40),
        ("P", 50),
        ("e", 60),
        ("E", 60),
    ];
    let (suffix, shift) = draw.of(&SUFFIXES);
    let number = draw.number() >> draw.below(64);
    // Eighths are exact in both number systems.
    let eighths = if shift == 0 { 0 } else { draw.below(8) };
    let typed = match eighths {
        0 => format!("{number}{suffix}"),
        eighths => format!("{number}.{:03}{suffix}", eighths * 125),
    };
    let worth = (u128::from(number) << shift) + ((u128::from(eighths) << shift) >> 3);
    let wanted = u64::try_from(worth).map_err(|_| options::NoSize::OutOfRange);
    assert_eq!(options::size(&typed), wanted, "{typed}");
    assert_eq!(options::size(&format!("{number:#x}")), Ok(number));
    let negative = options::size(&format!("-{typed}"));
    assert_eq!(negative, if worth == 0 { Ok(0) } else { Err(options::NoSize::OutOfRange) }, "-{typed}");
}

/// A `--drive` of known parts.
fn drive(draw: &mut Draw<'_>) {
    let mut wanted = Drive::default();
    let mut typed = vec!["if=ide".to_owned()];
    for _ in 0..draw.below(8) {
        let name = String::from_utf8_lossy(draw.bytes(8)).into_owned();
        let on = draw.once_in(2);
        let word = if on {
            draw.of(&["=on", "=yes", "=true", "=y", ""])
        } else {
            draw.of(&["=off", "=no", "=false", "=n"])
        };
        // Beside another comma one in a value would be told otherwise.
        let name = name.replace(',', ";");
        match draw.below(4) {
            0 => {
                typed.push(format!("file={name}"));
                wanted.file = Some(name);
            }
            1 => {
                typed.push(format!("{}={name}", draw.of(&["format", "driver"])));
                wanted.format = Some(name);
            }
            2 => {
                typed.push(format!("{}{word}", draw.of(&["cor", "copy-on-read"])));
                wanted.copy_on_read = Some(on);
            }
            _ => {
                typed.push(format!("{}{word}", draw.of(&["readonly", "read-only"])));
                wanted.read_only = Some(on);
            }
        }
    }
    let typed = typed.join(",");
    assert_eq!(Drive::parse(&typed), Ok(wanted), "{typed:?}");
}

/// A line of `readonce io`.
fn line(draw: &mut Draw<'_>) {
    const PIECES: &[&str] = &[
        "-C",
        "-q",
        "-P",
        "-z",
        "-s",
        "-l",
        "-v",
        "-n",
        "-u",
        "-Cq",
        "-qP7",
        "-P0xff",
        "-",
        "--",
        "-:",
        "-\u{e9}",
        "-P\u{e9}",
        "0",
        "4k",
        "64k",
        "1M",
        "0x200",
        "2147483136",
        "2147483137",
        "2G",
        "16E",
        "-1",
        "1.5k",
        "x",
        "\u{e9}",
    ];
    let spec = &SPECS[draw.index(SPECS.len())];
    let any = String::from_utf8_lossy(draw.bytes(12)).into_owned();
    let arguments: Vec<&str> =
        (0..draw.below(9)).map(|_| if draw.once_in(8) { any.as_str() } else { draw.of(PIECES) }).collect();
    let refused = |refused: command::Refused| {
        let (command::Refused::Out(words)
        | command::Refused::Err(words)
        | command::Refused::Both { err: words, .. }) = refused;
        assert!(!words.is_empty());
    };
    match Words::parse(spec, &arguments) {
        Err(error) => refused(error),
        Ok(words) => {
            assert!(words.rest.len() >= spec.arguments_min);
            assert!(words.rest.len() <= arguments.len());
            let given = spec.letters.chars().filter(|letter| words.has(*letter)).count();
            assert!(given == 0 || words.rest.len() < arguments.len());
            words.pattern().map_err(refused).ok();
            for letter in spec.letters.chars() {
                words.bytes_of(letter).map_err(refused).ok();
            }
            for index in 0..words.rest.len() + 1 {
                let all = words.len_from(index).map_err(refused);
                assert!(all.is_err() || all.is_ok_and(|all| all <= 2_147_483_136));
                words.bytes(index).map_err(refused).ok();
            }
        }
    }
}
