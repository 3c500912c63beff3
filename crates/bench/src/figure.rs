//! Figures: what a row finds, as a table and as JSON.
//!
//! - The ratio is ours divided by the peer's, whichever way is better.

use std::fmt::Write as _;

use serde_json::{Value as Json, json};

use crate::bench::Bench;

/// What came of a measurement.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// In the figure's unit.
    Number(f64),
    /// It could not be measured, or something else happened.
    Words(String),
}

impl Value {
    fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Words(_) => None,
        }
    }

    fn text(&self, unit: &str) -> String {
        match self {
            Self::Number(number) => {
                let digits = match number.abs() {
                    0.0 => 0,
                    size if size >= 1000.0 || (number.fract() == 0.0 && size >= 1.0 && unit != "×") => 0,
                    size if size >= 100.0 => 1,
                    _ => 2,
                };
                format!("{number:.digits$} {unit}").trim_end().to_owned()
            }
            Self::Words(words) => words.clone(),
        }
    }

    fn json(&self) -> Json {
        match self {
            Self::Number(number) => json!(number),
            Self::Words(words) => json!(words),
        }
    }
}

impl From<Result<f64, String>> for Value {
    fn from(result: Result<f64, String>) -> Self {
        match result {
            Ok(number) => Self::Number(number),
            Err(words) => Self::Words(words),
        }
    }
}

/// What ours is to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// At most this, in the figure's unit.
    AtMost(f64),
    /// Less than this.
    Below(f64),
    /// At least this many times the peer's.
    Times(f64),
    /// Nothing: reported.
    Report,
}

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Figure {
    /// The row that it belongs to.
    pub row: &'static str,
    /// What was measured.
    pub what: String,
    /// Unit of all its numbers.
    pub unit: &'static str,
    /// Ours.
    pub ours: Value,
    /// Peers by name, the one to compare with first.
    pub peers: Vec<(&'static str, Value)>,
    /// To reach.
    pub target: Target,
    /// How it was measured, where that is not plain.
    pub note: String,
}

impl Figure {
    /// A row that could not be run.
    pub fn failed(row: &'static str, what: &str, error: &anyhow::Error) -> Self {
        Self {
            row,
            what: what.to_owned(),
            unit: "",
            ours: Value::Words(format!("failed: {error:#}")),
            peers: Vec::new(),
            target: Target::Report,
            note: String::new(),
        }
    }

    fn ratio(&self, peer: &Value) -> Option<f64> {
        let ratio = self.ours.number()? / peer.number()?;
        ratio.is_finite().then_some(ratio)
    }

    /// `None`: nothing was to be reached, or there was nothing to compare with.
    fn is_met(&self) -> Option<bool> {
        match self.target {
            Target::AtMost(limit) => Some(self.ours.number().is_some_and(|ours| ours <= limit)),
            Target::Below(limit) => Some(self.ours.number().is_some_and(|ours| ours < limit)),
            Target::Times(times) => {
                self.peers.first().and_then(|(_, peer)| self.ratio(peer)).map(|ratio| ratio >= times)
            }
            Target::Report => None,
        }
    }

    fn target_text(&self) -> String {
        match self.target {
            Target::AtMost(limit) => format!("≤ {}", Value::Number(limit).text(self.unit)),
            Target::Below(limit) => format!("< {}", Value::Number(limit).text(self.unit)),
            Target::Times(times) => format!("{times} × the peer"),
            Target::Report => "reported".to_owned(),
        }
    }

    fn lines(&self) -> Vec<[String; 6]> {
        let met = match self.is_met() {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "",
        };
        let peer = |at: usize| match self.peers.get(at) {
            None => (String::new(), String::new()),
            Some((name, value)) => (
                format!("{name}: {}", value.text(self.unit)),
                self.ratio(value).map_or(String::new(), |ratio| format!("{ratio:.2}")),
            ),
        };
        let (first, ratio) = peer(0);
        let mut lines = vec![[
            self.what.clone(),
            self.ours.text(self.unit),
            first,
            ratio,
            self.target_text(),
            met.into(),
        ]];
        for at in 1..self.peers.len() {
            let (text, ratio) = peer(at);
            lines.push([String::new(), String::new(), text, ratio, String::new(), String::new()]);
        }
        if !self.note.is_empty() {
            lines[0][0] += &format!(" ({})", self.note);
        }
        lines
    }
}

/// The figures as a table.
pub fn table(figures: &[Figure]) -> String {
    let head = ["what", "ours", "peer", "ratio", "target", "met"].map(str::to_owned);
    let lines: Vec<[String; 6]> =
        std::iter::once(head).chain(figures.iter().flat_map(Figure::lines)).collect();
    let mut widths = [0; 6];
    for line in &lines {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for (at, line) in lines.iter().enumerate() {
        let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        let _ = writeln!(text, "| {} |", cells.collect::<Vec<_>>().join(" | "));
        if at == 0 {
            let rule = widths.map(|width| "-".repeat(width + 2)).join("|");
            let _ = writeln!(text, "|{rule}|");
        }
    }
    text
}

/// The figures as JSON.
pub fn json(bench: &Bench, figures: &[Figure]) -> Json {
    let figures: Vec<Json> = figures
        .iter()
        .map(|figure| {
            let peers: Vec<Json> = figure
                .peers
                .iter()
                .map(|(name, value)| json!({"name": name, "value": value.json(), "ratio": figure.ratio(value)}))
                .collect();
            json!({
                "row": figure.row, "what": figure.what, "unit": figure.unit, "ours": figure.ours.json(),
                "peers": peers, "target": figure.target_text(), "met": figure.is_met(), "note": figure.note,
            })
        })
        .collect();
    json!({"machine": bench.machine(), "repeat": bench.repeat, "quick": bench.quick, "figures": figures})
}

/// The middle of `values`; of an even number the lower one. `values` is not empty.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(ours: f64, peer: Value, target: Target) -> Figure {
        Figure {
            row: "row",
            what: "what".into(),
            unit: "ms",
            ours: Value::Number(ours),
            peers: vec![("peer", peer)],
            target,
            note: String::new(),
        }
    }

    #[test]
    fn a_target_is_met_missed_or_cannot_be_told() {
        let missing = || Value::Words("missing".into());
        assert_eq!(figure(4.0, missing(), Target::AtMost(4.0)).is_met(), Some(true));
        assert_eq!(figure(4.0, missing(), Target::Below(4.0)).is_met(), Some(false));
        assert_eq!(figure(6.0, Value::Number(2.0), Target::Times(3.0)).is_met(), Some(true));
        assert_eq!(figure(5.0, Value::Number(2.0), Target::Times(3.0)).is_met(), Some(false));
        assert_eq!(figure(5.0, missing(), Target::Times(3.0)).is_met(), None);
        let failed = Figure { ours: missing(), ..figure(0.0, missing(), Target::AtMost(1.0)) };
        assert_eq!(failed.is_met(), Some(false));
    }

    #[test]
    fn the_table_has_a_line_for_each_peer() {
        let mut two = figure(5.0, Value::Number(2.0), Target::Report);
        two.peers.push(("other", Value::Words("missing: other".into())));
        let table = table(&[two]);
        assert_eq!(table.lines().count(), 4, "{table}");
        assert!(table.contains("| peer: 2 ms") && table.contains("2.50"), "{table}");
        assert!(table.contains("| other: missing: other |"), "{table}");
    }

    #[test]
    fn the_median_is_one_of_the_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[2.0, 1.0]), 1.0);
    }
}
