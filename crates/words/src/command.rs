//! A command of `readonce io`: its options, offset, lengths. Refused in qemu-io's words.

use crate::options::{self, NoSize};

/// Bytes of one request at most, as in QEMU.
const REQUEST_BYTES_MAX: u64 = 2_147_483_136;

/// Options that a command takes, as in C's getopt: a letter, and `:` after one with a value.
pub struct Spec {
    /// First is the name that is printed.
    pub names: &'static [&'static str],
    /// Letters.
    pub letters: &'static str,
    /// Arguments at least, options included, as in qemu-io.
    pub arguments_min: usize,
    /// Arguments at most, where there is a limit.
    pub arguments_max: Option<usize>,
    /// Arguments as help prints them.
    pub arguments: &'static str,
    /// What it does, for help.
    pub help: &'static str,
}

/// The commands.
pub const SPECS: &[Spec] = &[
    Spec {
        names: &["abort"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "simulate a program crash using abort(3)",
    },
    Spec {
        names: &["aio_flush"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "completes all outstanding aio requests",
    },
    Spec {
        names: &["aio_read"],
        letters: "CqrvP:",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cqrv] [-P pattern] off len [len..]",
        help: "reads a number of bytes at a specified offset",
    },
    Spec {
        names: &["aio_write"],
        letters: "CfqruzP:",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cfqruz] [-P pattern] off len [len..]",
        help: "writes a number of bytes at a specified offset",
    },
    Spec {
        names: &["alloc"],
        letters: "",
        arguments_min: 1,
        arguments_max: Some(2),
        arguments: "offset [count]",
        help: "checks if offset is allocated in the file",
    },
    Spec {
        names: &["close", "c"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "close the current open file",
    },
    Spec {
        names: &["discard", "d"],
        letters: "Cq",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cq] off len",
        help: "discards a number of bytes at a specified offset",
    },
    Spec {
        names: &["flush", "f"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "flush all in-core file state to disk",
    },
    Spec {
        names: &["help", "?"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(1),
        arguments: "[command]",
        help: "help for one or all commands",
    },
    Spec {
        names: &["info", "i"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "prints information about the current file",
    },
    Spec {
        names: &["length", "l"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "gets the length of the current file",
    },
    Spec {
        names: &["map"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(1),
        arguments: "",
        help: "prints the allocated areas of a file",
    },
    Spec {
        names: &["open", "o"],
        letters: "rCsnkUt:d:i:o:",
        arguments_min: 1,
        arguments_max: None,
        arguments: "[-rCU] [-o driver=FMT] path",
        help: "open the file specified by path",
    },
    Spec {
        names: &["quit", "q"],
        letters: "",
        arguments_min: 0,
        arguments_max: Some(0),
        arguments: "",
        help: "exit the program",
    },
    Spec {
        names: &["read", "r"],
        letters: "Cqrvl:s:P:",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cqrv] [-P pattern [-s off] [-l len]] off len",
        help: "reads a number of bytes at a specified offset",
    },
    Spec {
        names: &["readv", "rv"],
        letters: "CqrvP:",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cqrv] [-P pattern] off len [len..]",
        help: "reads a number of bytes at a specified offset",
    },
    Spec {
        names: &["reopen"],
        letters: "rwc:o:",
        arguments_min: 0,
        arguments_max: None,
        arguments: "[(-r|-w)]",
        help: "reopens an image with new options",
    },
    Spec {
        names: &["sleep"],
        letters: "",
        arguments_min: 1,
        arguments_max: Some(1),
        arguments: "",
        help: "waits for the given value in milliseconds",
    },
    Spec {
        names: &["truncate", "t"],
        letters: "m:",
        arguments_min: 1,
        arguments_max: Some(3),
        arguments: "[-m prealloc_mode] off",
        help: "truncates the current file at the given offset",
    },
    Spec {
        names: &["write", "w"],
        letters: "cCfnqruzP:s:",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cfnqruz] [-P pattern | -s source_file] off len",
        help: "writes a number of bytes at a specified offset",
    },
    Spec {
        names: &["writev", "wv"],
        letters: "CfqrP:",
        arguments_min: 2,
        arguments_max: None,
        arguments: "[-Cfqr] [-P pattern] off len [len..]",
        help: "writes a number of bytes at a specified offset",
    },
];

/// A line taken apart.
pub struct Words {
    /// Options, in order, each with its value.
    options: Vec<(char, Option<String>)>,
    /// What follows them.
    pub rest: Vec<String>,
}

/// What is wrong with a line, and where qemu-io says it.
pub enum Refused {
    /// On standard output.
    Out(String),
    /// On standard error.
    Err(String),
    /// On both.
    Both {
        /// On standard error.
        err: String,
        /// On standard output.
        out: String,
    },
}

impl Words {
    /// Takes the arguments of a command apart.
    pub fn parse(spec: &Spec, arguments: &[&str]) -> Result<Self, Refused> {
        let name = spec.names[0];
        let (count, min) = (arguments.len(), spec.arguments_min);
        if count < min || spec.arguments_max.is_some_and(|max| count > max) {
            let wanted = match spec.arguments_max {
                None => format!("at least {min}"),
                Some(max) if max == min => min.to_string(),
                Some(max) => format!("between {min} and {max}"),
            };
            return Err(Refused::Err(format!(
                "bad argument count {count} to {name}, expected {wanted} arguments"
            )));
        }
        let mut words = Self { options: Vec::new(), rest: Vec::new() };
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            let Some(letters) = argument.strip_prefix('-').filter(|letters| !letters.is_empty()) else {
                words.rest.push((*argument).to_owned());
                continue;
            };
            let mut letters = letters.chars();
            while let Some(letter) = letters.next() {
                let at = spec.letters.find(letter).filter(|_| letter != ':');
                let Some(at) = at else {
                    let what = format!("{name}: invalid option -- '{letter}'");
                    return Err(Refused::Both { err: what, out: spec.usage() });
                };
                let value = match spec.letters[at + 1..].starts_with(':') {
                    false => None,
                    true => match letters.as_str() {
                        "" => arguments.next().map(|value| (*value).to_owned()),
                        rest => {
                            let rest = rest.to_owned();
                            letters = "".chars();
                            Some(rest)
                        }
                    },
                };
                words.options.push((letter, value));
            }
        }
        if words.rest.len() < spec.arguments_min {
            return Err(Refused::Out(spec.usage()));
        }
        Ok(words)
    }

    /// Whether an option was given.
    pub fn has(&self, letter: char) -> bool {
        self.options.iter().any(|(given, _)| *given == letter)
    }

    /// The value of an option.
    pub fn value(&self, letter: char) -> Option<&str> {
        self.options.iter().rev().find(|(given, _)| *given == letter)?.1.as_deref()
    }

    /// `-P`.
    pub fn pattern(&self) -> Result<Option<u8>, Refused> {
        let Some(text) = self.value('P') else { return Ok(None) };
        let number = match text.strip_prefix("0x") {
            Some(hex) => u8::from_str_radix(hex, 16),
            None => text.parse(),
        };
        number.map(Some).map_err(|_| Refused::Out(format!("{text} is not a valid pattern byte")))
    }

    /// A number of bytes given to an option.
    pub fn bytes_of(&self, letter: char) -> Result<Option<u64>, Refused> {
        self.value(letter).map(bytes).transpose()
    }

    /// The number of bytes at a place after the options.
    pub fn bytes(&self, index: usize) -> Result<u64, Refused> {
        bytes(self.rest.get(index).map_or("", String::as_str))
    }

    /// The length at a place after the options, of one request; `but` says in which other case it might be larger.
    pub fn len_of_request(&self, index: usize, but: &str) -> Result<u64, Refused> {
        let len = self.bytes(index)?;
        match len > REQUEST_BYTES_MAX {
            true => Err(Refused::Out(format!(
                "length cannot exceed {REQUEST_BYTES_MAX}{but}, given {}",
                self.rest[index]
            ))),
            false => Ok(len),
        }
    }

    /// All lengths from a place on, together.
    pub fn len_from(&self, index: usize) -> Result<u64, Refused> {
        let mut all = 0_u64;
        for text in self.rest.get(index..).unwrap_or_default() {
            all = all.saturating_add(bytes(text)?);
            if all > REQUEST_BYTES_MAX {
                return Err(Refused::Out(format!("length cannot exceed {REQUEST_BYTES_MAX}, given {text}")));
            }
        }
        Ok(all)
    }
}

impl Spec {
    /// The line that help prints.
    pub fn usage(&self) -> String {
        self.usage_as(self.names[0])
    }

    /// The same under another of its names.
    pub fn usage_as(&self, name: &str) -> String {
        let between = if self.arguments.is_empty() { "" } else { " " };
        format!("{name}{between}{} -- {}", self.arguments, self.help)
    }

    /// What each of its options means, a line each.
    pub fn options_help(&self) -> impl Iterator<Item = String> {
        self.letters.chars().filter_map(|letter| {
            let meaning = match letter {
                'C' if self.names[0] == "open" => "use copy-on-read",
                'r' if self.names[0] == "open" => "open file read-only",
                'U' => "with -r: also a file that is in use",
                'r' if self.names[0] == "reopen" => "reopen the image read-only",
                'o' if self.names[0] == "open" => "driver=FMT: its format",
                'w' => "reopen the image to read and write",
                'm' => "off: space for the new part is taken when it is written; nothing else is supported",
                'C' => "print one line of figures, for programs",
                'P' if self.names[0].ends_with("read") || self.names[0] == "readv" => {
                    "compare what was read with this byte"
                }
                'P' => "write this byte in place of 0xcd",
                'f' => "end with the bytes on disk",
                'l' => "with -P: compare so many bytes",
                'n' => "with -z: fail rather than write zeros out",
                'q' => "print no figures",
                'r' => "nothing: buffers need no registration here",
                's' if self.names[0] == "read" => "with -P: skip so many bytes first",
                's' => "write what this file holds, again and again",
                'u' => "with -z: space may be given back",
                'v' => "print the bytes",
                'z' => "write zeros, without data where the format can",
                _ => return None,
            };
            Some(format!(" -{letter}, -- {meaning}"))
        })
    }
}

fn bytes(text: &str) -> Result<u64, Refused> {
    options::size(text).map_err(|error| {
        Refused::Out(match error {
            NoSize::Malformed => {
                format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}")
            }
            NoSize::OutOfRange => format!("Parsing error: argument too large -- {text}"),
        })
    })
}
