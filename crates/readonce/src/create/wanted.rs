//! What `create` is asked for: `-o` options with their kinds, the line that says them all, and the help that lists them.
//!
//! - Numbers, sizes and switches are refused here, before anything is said; words are refused by the driver, after the line. Both
//!   as in qemu-img.

use std::{collections::BTreeMap, fmt::Write as _};

use readonce_format::{Driver, driver::CreateSpec};
use readonce_words::options::{self, Pair};

use crate::failure::Failure;

/// What the value of an option is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Text,
    Number,
    Size,
    Switch,
}

fn kind(name: &str) -> Kind {
    match name {
        "cluster_size" | "table_size" | "size" => Kind::Size,
        "refcount_bits" => Kind::Number,
        "copy_on_read" | "data_file_raw" | "extended_l2" | "lazy_refcounts" | "nocow" => Kind::Switch,
        _ => Kind::Text,
    }
}

/// Options that are not the driver's, and their help.
const COMMON: [(&str, &str); 5] = [
    ("backing_file", "File name of a base image"),
    ("backing_fmt", "Image format of the base image"),
    ("data_file", "File name of an external data file"),
    ("nocow", "Turn off copy-on-write (valid only on btrfs)"),
    ("size", "Virtual disk size"),
];

fn common(driver: &dyn Driver) -> impl Iterator<Item = (&'static str, &'static str)> {
    let own = |name: &str| driver.create_options().iter().any(|option| option.name == name);
    let (backing, data_file) = (own("copy_on_read"), own("data_file_raw"));
    COMMON.into_iter().filter(move |(name, _)| match *name {
        "data_file" => data_file,
        "size" | "nocow" => true,
        _ => backing,
    })
}

/// What the options of the command line come to.
pub struct Wanted {
    /// Bytes.
    pub size: Option<u64>,
    /// As typed.
    pub backing: Option<String>,
    /// As typed.
    pub backing_format: Option<String>,
    /// As typed.
    pub data_file: Option<String>,
    /// `on` or `off`, where given: of the file system that the image lies on.
    pub nocow: Option<String>,
    /// The format's own options; sizes and numbers in plain digits.
    pub options: Vec<Pair>,
}

impl Wanted {
    /// Takes the pairs of all `-o` apart; later ones win.
    pub fn read(driver: &dyn Driver, pairs: Vec<Pair>) -> Result<Self, Failure> {
        let mut named: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in pairs {
            let known = driver.create_options().iter().any(|option| option.name == name)
                || common(driver).any(|(common, _)| common == name);
            if !known && driver.name() == "qcow2" && (name == "encryption" || name.starts_with("encrypt.")) {
                return Err(Failure::new(format!(
                    "The option '{name}' is not supported: images with LUKS or AES encryption cannot be made or used"
                )));
            }
            if !known {
                return Err(Failure::new(format!("Invalid parameter '{name}'")));
            }
            let value = value.unwrap_or_else(|| "on".to_owned());
            let value = match kind(&name) {
                Kind::Text => value,
                Kind::Number => options::parameter_number(&name, &value)?.to_string(),
                Kind::Size => options::parameter_size(&name, &value)?.to_string(),
                Kind::Switch => {
                    options::switch(&name, Some(&value))?;
                    value
                }
            };
            named.insert(name, value);
        }
        let size = named.remove("size").and_then(|text| text.parse().ok());
        let (backing, backing_format) = (named.remove("backing_file"), named.remove("backing_fmt"));
        let (data_file, nocow) = (named.remove("data_file"), named.remove("nocow"));
        let options = named.into_iter().map(|(name, value)| (name, Some(value))).collect();
        Ok(Self { size, backing, backing_format, data_file, nocow, options })
    }
}

/// The line that QEMU's tool prints before it makes an image: what was asked and what is the default, in the order in which its
/// driver of that format has them. What only readonce has comes last.
pub fn announcement(
    image: &str,
    driver: &dyn Driver,
    spec: &CreateSpec,
    backing_format: Option<&str>,
    nocow: Option<&str>,
) -> String {
    let order: &[&str] = match driver.name() {
        "qcow2" => &[
            "cluster_size",
            "extended_l2",
            "preallocation",
            "compression_type",
            "size",
            "compat",
            "backing_file",
            "backing_fmt",
            "data_file",
            "data_file_raw",
            "lazy_refcounts",
            "refcount_bits",
            "nocow",
            "copy_on_read",
        ],
        _ => &["size", "backing_file", "backing_fmt", "cluster_size", "table_size", "nocow", "copy_on_read"],
    };
    let has = |name: &str| driver.create_options().iter().any(|option| option.name == name);
    let mut line = format!("Formatting '{image}', fmt={}", driver.name());
    for &name in order {
        let given = spec.options.iter().find(|(given, _)| given == name).and_then(|(_, value)| value.clone());
        let value = match name {
            "size" => Some(spec.size.to_string()),
            "backing_file" => spec.backing.as_ref().map(|backing| backing.name.clone()),
            "backing_fmt" => backing_format.map(str::to_owned),
            "data_file" => spec.data_file.clone(),
            "nocow" => nocow.map(str::to_owned),
            name if has(name) => given.or_else(|| default(name).map(str::to_owned)),
            _ => None,
        };
        if let Some(value) = value {
            let value = if kind(name) == Kind::Text { value.replace(',', ",,") } else { value };
            let _ = write!(line, " {name}={value}");
        }
    }
    line
}

/// What is said of an option that was not given.
fn default(name: &str) -> Option<&'static str> {
    match name {
        "cluster_size" => Some("65536"),
        "extended_l2" | "lazy_refcounts" => Some("off"),
        "compression_type" => Some("zlib"),
        "refcount_bits" => Some("16"),
        _ => None,
    }
}

/// What `-o help` prints. Options of the file system are there where an image is named, as in qemu-img.
pub fn help(driver: &dyn Driver, is_named: bool) -> String {
    let own = driver.create_options().iter().map(|option| (option.name, option.help));
    let all: BTreeMap<&str, &str> =
        own.chain(common(driver)).filter(|&(name, _)| is_named || name != "nocow").collect();
    let mut text = match is_named {
        true => "Supported options:\n".to_owned(),
        false => format!("Supported {} options:\n", driver.name()),
    };
    for (name, help) in all {
        let _ = writeln!(text, "  {}", help_line(name, help));
    }
    if !is_named {
        text += "\nThe protocol level may support further options.\nSpecify the target filename to include those options.\n";
    }
    text
}

/// An option, the kind of its value, and what it is for.
pub fn help_line(name: &str, help: &str) -> String {
    let kind = match kind(name) {
        Kind::Text => "<str>",
        Kind::Number => "<num>",
        Kind::Size => "<size>",
        Kind::Switch => "<bool (on/off)>",
    };
    format!("{:<22} - {help}", format!("{name}={kind}"))
}
