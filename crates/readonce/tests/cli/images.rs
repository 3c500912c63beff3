//! create, info, map and check say what qemu-img says, and make what it takes.

use std::path::Path;

use serde_json::Value;

use crate::common::{Ran, folder, origin, qemu_img, qemu_io, readonce};

/// Backings of a length with and without whole sectors.
fn backings(folder: &Path) {
    let mut bytes = vec![0_u8; 3 << 20];
    bytes[1 << 20..(1 << 20) + 5].copy_from_slice(b"hello");
    std::fs::write(folder.join("base.raw"), bytes).expect("room");
    std::fs::write(folder.join("odd.raw"), vec![b'x'; 1000]).expect("room");
}

/// What qemu-img says, with our name in it.
fn renamed(ran: Ran) -> Ran {
    Ran { out: ran.out.replace("qemu-img", "readonce"), err: ran.err.replace("qemu-img", "readonce"), ..ran }
}

/// What we say, without what is ours alone.
fn without_ours(ran: Ran) -> Ran {
    let ours = ["copy on read: ", "backing file version: ", "written by readonce only: "];
    let kept = |line: &&str| !ours.iter().any(|start| line.starts_with(start));
    let out = ran.out.split_inclusive('\n').filter(kept).collect();
    Ran { out, ..ran }
}

#[test]
fn create_says_what_qemu_img_says() {
    let (theirs, ours) = (folder(), folder());
    backings(theirs.path());
    backings(ours.path());
    for arguments in [
        "create -f qed a.qed 10M",
        "create -f qed -o cluster_size=4k,table_size=2 -b base.raw -F raw b2.qed 5M",
        "create -f qed -b base.raw -F raw b.qed",
        "create -f qed -b b.qed -F qed top.qed",
        "create -f qed -b odd.raw -F raw odd.qed",
        "create -f qed -b base.raw x.qed",
        "create -f qed -u -b base.raw x.qed 5M",
        "create -f qed -u -b nowhere.raw -F raw x.qed",
        "create -f qed -u -b nowhere.raw -F raw unsafe.qed 1M",
        "create -f qed -b nowhere.raw -F raw x.qed 1M",
        "create -f qed x.qed",
        "create -f qed x.qed 10Q",
        "create -f qed x.qed -- -5",
        "create -f qed sector.qed 1000",
        "create -f qed -o cluster_size=3k x.qed 1M",
        "create -f qed -o table_size=3 x.qed 1M",
        "create -f qed x.qed 65T",
        "create -f qed -o foo=3 x.qed 1M",
        "create -f qed -o cluster_size=abc x.qed 1M",
        "create -f nope x.qed 1M",
        "create c.raw 1M",
        "create -f qed -o size=3M c.qed",
        "create -f qed -o backing_file=base.raw,backing_fmt=raw c2.qed",
        "create -f qed x.qed 1M 2M",
        "create -f qed",
        "create -f qed -b c2.qed -F qed c2.qed",
        "create -f qed -b base.raw -F foo x.qed",
        "create -f qed -b base.raw -F qed x.qed",
        "create -f qed /nowhere/x.qed 1M",
        "create -q -f qed quiet.qed 1M",
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let wanted = renamed(qemu_img(theirs.path(), &arguments));
        assert_eq!(readonce(ours.path(), &arguments), wanted, "{arguments:?}");
    }
    for name in ["a.qed", "b.qed", "b2.qed", "top.qed", "odd.qed", "sector.qed", "c.raw", "c.qed", "c2.qed"] {
        let size = |folder: &Path| {
            let told = qemu_img(folder, &["info", "--output=json", name]).ok().out;
            serde_json::from_str::<Value>(&told).expect("JSON")["virtual-size"].clone()
        };
        assert_eq!(size(ours.path()), size(theirs.path()), "{name}");
        if name.ends_with("qed") {
            qemu_img(ours.path(), &["check", name]).ok();
            qemu_io(ours.path(), &["-c", "write -P 1 0 512", "-c", "read -P 1 0 512", name]).ok();
        }
    }
}

#[test]
fn info_map_and_check_say_what_qemu_img_says() {
    let folder = folder();
    let at = folder.path();
    backings(at);
    std::fs::create_dir(at.join("sub")).expect("room");
    for arguments in [
        "create -q -f qed plain.qed 10M",
        "create -q -f qed -b base.raw -F raw b.qed",
        "create -q -f qed -b b.qed -F qed top.qed",
        "create -q -f qed -b odd.raw -F raw odd.qed 2M",
        "create -q -f qed -b ../base.raw -F raw sub/s.qed",
        "create -q -f qed -o cluster_size=4k,table_size=16 -b base.raw -F raw small.qed 5M",
    ] {
        qemu_img(at, &arguments.split(' ').collect::<Vec<_>>()).ok();
    }
    qemu_io(at, &["-c", "write -P 1 64k 64k", "-c", "write -z 128k 128k", "b.qed"]).ok();
    qemu_io(at, &["-c", "write -P 2 1M 300k", "-c", "write -P 3 0 1", "top.qed"]).ok();
    qemu_io(at, &["-c", "write -P 2 9k 70k", "-c", "write -z 4M 64k", "small.qed"]).ok();
    let images = [
        "plain.qed",
        "b.qed",
        "top.qed",
        "odd.qed",
        "sub/s.qed",
        "small.qed",
        "base.raw",
        "odd.raw",
        "nowhere",
    ];
    for image in images {
        for command in [
            &["info"][..],
            &["info", "--backing-chain"],
            &["map"],
            &["map", "--output=json"],
            &["map", "--output=json", "-s", "512", "-l", "100k"],
            &["check"],
            &["check", "--output=json"],
        ] {
            let arguments = [command, &[image]].concat();
            let wanted = renamed(qemu_img(at, &arguments));
            assert_eq!(without_ours(readonce(at, &arguments)), wanted, "{arguments:?}");
        }
        for command in [&["info", "--output=json"][..], &["info", "--backing-chain", "--output=json"]] {
            let arguments = [command, &[image]].concat();
            let (ours, wanted) = (readonce(at, &arguments), renamed(qemu_img(at, &arguments)));
            assert_eq!((ours.code, &ours.err), (wanted.code, &wanted.err), "{arguments:?}");
            if wanted.code == Some(0) {
                let mut told: Value = serde_json::from_str(&ours.out).expect("JSON");
                match &mut told {
                    Value::Array(layers) => layers.iter_mut().for_each(remove_ours),
                    layer => remove_ours(layer),
                }
                assert_eq!(told, serde_json::from_str::<Value>(&wanted.out).expect("JSON"), "{arguments:?}");
            }
        }
    }
    for arguments in [
        &["info"][..],
        &["info", "a", "b"],
        &["info", "-f", "qed", "base.raw"],
        &["info", "-f", "foo", "base.raw"],
        &["info", "--output=xml", "base.raw"],
        &["info", "/"],
        &["check", "-r", "foo", "b.qed"],
        &["check", "-f", "raw", "b.qed"],
        &["foo"],
        &[],
    ] {
        assert_eq!(readonce(at, arguments), renamed(qemu_img(at, arguments)), "{arguments:?}");
    }
}

fn remove_ours(layer: &mut Value) {
    let layer = layer.as_object_mut().expect("an object");
    if layer.contains_key("backing-filename") {
        assert!(layer["readonce"]["copy-on-read"].is_boolean());
    }
    layer.remove("readonce");
}

#[test]
fn check_tells_and_mends_leaks_and_corruption() {
    let folder = folder();
    let at = folder.path();
    qemu_img(at, &["create", "-q", "-f", "qed", "clean.qed", "3M"]).ok();
    qemu_io(at, &["-c", "write -P 1 64k 64k", "-c", "write -P 2 1M 64k", "clean.qed"]).ok();
    let clean = std::fs::read(at.join("clean.qed")).expect("an image");
    let number =
        |place: usize| u64::from_le_bytes(clean[place..place + 8].try_into().expect("8 bytes")) as usize;
    let l2 = number(number(40));

    let mut leaky = clean.clone();
    leaky.resize(clean.len() + (128 << 10), 0);
    let mut corrupt = clean.clone();
    corrupt[l2 + 8 * 3..l2 + 8 * 4].copy_from_slice(&0x1234_5000_u64.to_le_bytes());
    let mut twice = clean.clone();
    twice.copy_within(l2 + 8..l2 + 16, l2 + 8 * 5);

    for (bytes, code) in [(&leaky, 3), (&corrupt, 2), (&twice, 2)] {
        std::fs::write(at.join("image.qed"), bytes).expect("room");
        for output in ["--output=human", "--output=json"] {
            let arguments = ["check", output, "image.qed"];
            let told = readonce(at, &arguments);
            assert_eq!(told.code, Some(code), "{told:?}");
            let wanted = qemu_img(at, &arguments);
            match output {
                "--output=human" => assert_eq!(told.out, wanted.out),
                _ => assert_eq!(
                    serde_json::from_str::<Value>(&told.out).expect("JSON"),
                    serde_json::from_str::<Value>(&wanted.out).expect("JSON")
                ),
            }
        }
        let mended = readonce(at, &["check", "-r", "all", "image.qed"]).ok();
        assert!(
            mended.out.starts_with("The following inconsistencies were found and repaired:"),
            "{mended:?}"
        );
        assert!(
            mended.out.contains("Double checking the fixed image now...\nNo errors were found"),
            "{mended:?}"
        );
        qemu_img(at, &["check", "image.qed"]).ok();
        qemu_io(at, &["-c", "read -P 1 64k 64k", "-c", "read -P 2 1M 64k", "image.qed"]).ok();
    }
    readonce(at, &["check", "-f", "raw", "clean.qed"]).fails(63, "This image format does not support checks");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_over_a_url_is_pinned_and_holds_no_signature() {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let signed = format!("{url}?X-Amz-Signature=secret");
    let made =
        readonce(at, &["create", "-f", "qed", "-o", "copy_on_read", "-b", &signed, "-F", "raw", "c.qed"])
            .ok();
    assert_eq!(
        made.out,
        format!(
            "Formatting 'c.qed', fmt=qed size=4194304 backing_file={url} backing_fmt=raw cluster_size=65536 copy_on_read=on\n"
        )
    );
    assert!(made.err.contains("READONCE_URL") && !made.err.contains("secret"), "{made:?}");
    let bytes = std::fs::read(at.join("c.qed")).expect("an image");
    assert!(!bytes.windows(6).any(|window| window == b"secret"));

    let told: Value =
        serde_json::from_str(&readonce(at, &["info", "--output=json", "c.qed"]).ok().out).expect("JSON");
    assert_eq!(told["backing-filename"], url.as_str());
    assert_eq!(told["readonce"]["copy-on-read"], true);
    assert_eq!(told["readonce"]["pin"]["length"], 4_194_304);
    assert_eq!(told["readonce"]["only-readonce-wrote"], true);
    assert!(told["readonce"]["pin"]["validator"].as_str().expect("text").starts_with("ETag "), "{told}");
    let map = readonce(at, &["map", "--output=json", "c.qed"]).ok();
    assert_eq!(
        map.out,
        "[{ \"start\": 0, \"length\": 4194304, \"depth\": 1, \"present\": true, \"zero\": false, \"data\": true, \
         \"compressed\": false, \"offset\": 0}]\n"
    );
    // Without the backing file: it is not needed to look at the image itself.
    origin.vanish().await;
    readonce(at, &["info", "c.qed"]).ok();
    readonce(at, &["check", "c.qed"]).ok();
}
