//! JSON as QEMU's tools print it: four spaces, and empty lists and objects over two lines.

use std::fmt::Write as _;

use serde_json::Value;

/// The text of `value`, without a newline at its end.
pub fn text(value: &Value) -> String {
    let mut out = String::new();
    write(&mut out, value, 0);
    out
}

fn write(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                line(out, index > 0, depth + 1);
                write(out, item, depth + 1);
            }
            line(out, false, depth);
            out.push(']');
        }
        Value::Object(members) => {
            out.push('{');
            for (index, (name, member)) in members.iter().enumerate() {
                line(out, index > 0, depth + 1);
                let _ = write!(out, "{}: ", Value::from(name.as_str()));
                write(out, member, depth + 1);
            }
            line(out, false, depth);
            out.push('}');
        }
        plain => {
            let _ = write!(out, "{plain}");
        }
    }
}

fn line(out: &mut String, comma: bool, depth: usize) {
    let _ = write!(out, "{}\n{:width$}", if comma { "," } else { "" }, "", width = depth * 4);
}
