//! Validators: from an image's bytes, and from a server's headers.

use http::HeaderValue;
use readonce_origin::{Pinned, Validator, Version, validator::ENCODED_BYTES_MAX};

use crate::draw::Draw;

/// The target.
pub fn run(data: &[u8]) {
    let mut draw = Draw::new(data);
    if draw.once_in(2) {
        from_image(&mut draw);
    } else {
        from_server(&mut draw);
    }
}

fn from_image(draw: &mut Draw<'_>) {
    let len = draw.number();
    // Mostly of our version and of a kind that there is.
    let mut bytes = Vec::new();
    if !draw.once_in(8) {
        bytes.extend([1, 1 + draw.byte() % 6]);
    }
    bytes.extend(draw.rest());
    let Ok(pinned) = Pinned::decode(&bytes, len) else { return };
    assert_eq!(pinned.encode(), bytes, "only what encode writes is taken");
    assert_eq!(pinned.own.len, len);
    for Version { validator, .. } in [Some(pinned.own), pinned.data].into_iter().flatten() {
        is_kept(&validator);
    }
}

fn from_server(draw: &mut Draw<'_>) {
    // What a response's header can hold, and what of it is text.
    let mut header = || {
        let value = match draw.below(4) {
            0 => return None,
            1 => [b"W/\"", draw.bytes(40), b"\""].concat(),
            2 => [b"\"", draw.bytes(1100), b"\""].concat(),
            _ => draw.bytes(1100).to_vec(),
        };
        Some(HeaderValue::from_bytes(&value).ok()?.to_str().ok()?.to_owned())
    };
    let (etag, date) = (header(), header());
    let len = draw.number();
    let validator = Validator::from_headers(etag.as_deref(), date.as_deref(), len);
    is_kept(&validator);
    validator.check_headers(etag.as_deref(), date.as_deref(), len).expect("a response is of its own version");
    if !validator.is_length_only() {
        let gone = validator.check_headers(None, None, len).expect_err("what vanished is a difference");
        assert!(gone.len() < 4096);
    }
    let longer = validator.check_headers(etag.as_deref(), date.as_deref(), len.wrapping_add(1));
    assert!(longer.is_err() || matches!(validator, Validator::StrongETag(_)));
}

/// An image keeps it, and it is the same when it is read again.
fn is_kept(validator: &Validator) {
    let encoded = validator.encode();
    assert!(encoded.len() <= ENCODED_BYTES_MAX);
    assert_eq!(Validator::decode(&encoded).as_ref(), Ok(validator), "what is pinned can be read again");
    assert!(validator.to_string().len() < 2048);
}
