//! Numbers of a plan's elements, as they stand on a command line: `3,7-9`.

use std::{collections::BTreeSet, fmt, str::FromStr};

use readonce_sim::plan::Id;

/// A set of numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ids(pub BTreeSet<Id>);

impl FromStr for Ids {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |word: &str| word.parse::<Id>().map_err(|error| format!("'{word}': {error}"));
        let mut ids = BTreeSet::new();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            match word.split_once('-') {
                Some((from, to)) => ids.extend(number(from)?..=number(to)?),
                None => ids.extend([number(word)?]),
            }
        }
        Ok(Self(ids))
    }
}

impl fmt::Display for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut ids = self.0.iter().copied().peekable();
        let mut comma = "";
        while let Some(from) = ids.next() {
            let mut to = from;
            while ids.next_if_eq(&(to + 1)).is_some() {
                to += 1;
            }
            if from == to {
                write!(f, "{comma}{from}")?
            } else {
                write!(f, "{comma}{from}-{to}")?
            }
            comma = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for text in ["", "3", "3,7-9", "0-4,6,8-9"] {
            assert_eq!(text.parse::<Ids>().expect("numbers").to_string(), text);
        }
        assert!("x".parse::<Ids>().is_err());
    }
}
