//! create, info, map and check say what qemu-img says, and make what it takes.

use std::path::Path;

use serde_json::Value;

use crate::common::{KEEPERS, Ran, folder, names, origin, qemu_img, qemu_io, readonce};

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
        // The same options with another format.
        "create -f qcow2 a.qcow2 10M",
        "create -f qcow2 -o cluster_size=4k,compat=0.10 -b base.raw -F raw b.qcow2 5M",
        "create -f qcow2 -b b.qcow2 -F qcow2 top.qcow2",
        "create -f qcow2 -b odd.raw -F raw odd.qcow2",
        "create -f qcow2 -b base.raw x.qcow2",
        "create -f qcow2 -b base.raw -F qcow2 x.qcow2",
        "create -f qcow2 -u -b nowhere.raw -F raw x.qcow2",
        "create -f qcow2 sector.qcow2 1000",
        "create -f qcow2 x.qcow2",
        "create -f qcow2 x.qcow2 65P",
        "create -f qcow2 -o nosuch x.qcow2 1M",
        "create -f qcow2 -o cluster_size=3k x.qcow2 1M",
        "create -f qcow2 -o compat=foo x.qcow2 1M",
        "create -f qcow2 -o compat=v2,extended_l2=on x.qcow2 1M",
        "create -f qcow2 -o compat=v2,lazy_refcounts=on x.qcow2 1M",
        "create -f qcow2 -o compat=v2,refcount_bits=8 x.qcow2 1M",
        "create -f qcow2 -o compat=v2,compression_type=zstd x.qcow2 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=128k e.qcow2 1M",
        "create -f qcow2 -o extended_l2=on,cluster_size=8k x.qcow2 1M",
        "create -f qcow2 -o extended_l2=yes,lazy_refcounts y.qcow2 1M",
        "create -f qcow2 -o nolazy_refcounts,refcount_bits=0x40 y64.qcow2 1M",
        "create -f qcow2 -o lazy_refcounts=maybe x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=3 x.qcow2 1M",
        "create -f qcow2 -o refcount_bits=x x.qcow2 1M",
        "create -f qcow2 -o compression_type=zstd z.qcow2 1M",
        "create -f qcow2 -o compression_type=lz x.qcow2 1M",
        "create -f qcow2 -o preallocation=metadata pm.qcow2 1M",
        "create -f qcow2 -o preallocation=full pf.qcow2 1M",
        "create -f qcow2 -o preallocation=foo x.qcow2 1M",
        "create -f qcow2 -o preallocation=metadata -b base.raw -F raw x.qcow2",
        "create -f qcow2 -o data_file=d.raw d.qcow2 1M",
        "create -f qcow2 -o data_file=d,,2.raw,data_file_raw=on d2.qcow2 1M",
        "create -f qcow2 -o data_file_raw=on x.qcow2 1M",
        "create -f qcow2 -o data_file=x.raw,data_file_raw=on -b base.raw -F raw x.qcow2",
        "create -f qcow2 -o data_file=x.raw,compat=v2 x.qcow2 1M",
        "create -f qcow2 -o data_file= x.qcow2 1M",
        "create -f qcow2 -o data_file=nowhere/x.raw x.qcow2 1M",
        "create -f qcow2 -o data_file=http://127.0.0.1:1/x x.qcow2 1M",
    ] {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let wanted = renamed(qemu_img(theirs.path(), &arguments));
        assert_eq!(readonce(ours.path(), &arguments), wanted, "{arguments:?}");
    }
    // QEMU leaves some that it could not make.
    let made = |folder: &Path| names(folder).into_iter().filter(|name| name != "x.qed").collect::<Vec<_>>();
    assert_eq!(made(ours.path()), made(theirs.path()));
    let made = names(ours.path());
    for name in made.iter().filter(|name| !["unsafe.", "quiet."].iter().any(|other| name.starts_with(other)))
    {
        let size = |folder: &Path| {
            let told = qemu_img(folder, &["info", "--output=json", name]).ok().out;
            serde_json::from_str::<Value>(&told).expect("JSON")["virtual-size"].clone()
        };
        assert_eq!(size(ours.path()), size(theirs.path()), "{name}");
        if name.contains(".q") {
            qemu_img(ours.path(), &["check", name]).ok();
            qemu_io(ours.path(), &["-c", "write -P 1 0 512", "-c", "read -P 1 0 512", name]).ok();
        }
    }
}

/// QEMU makes it, and looks for it, in the folder that it happens to run in.
#[test]
fn a_data_file_lies_where_the_image_looks_for_it() {
    let folder = folder();
    let at = folder.path();
    std::fs::create_dir(at.join("sub")).expect("room");
    readonce(at, &["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "sub/d.qcow2", "1M"]).ok();
    assert_eq!(names(&at.join("sub")), ["d.qcow2", "d.raw"]);
    qemu_io(&at.join("sub"), &["-c", "write -P 1 0 64k", "d.qcow2"]).ok();
    readonce(at, &["io", "-c", "read -P 1 0 64k", "-c", "write -P 2 64k 64k", "sub/d.qcow2"]).ok();
    qemu_io(&at.join("sub"), &["-c", "read -P 2 64k 64k", "d.qcow2"]).ok();
    assert_eq!(readonce(at, &["resize", "sub/d.qcow2", "2M"]).ok().out, "Image resized.\n");
    assert_eq!(std::fs::metadata(at.join("sub/d.raw")).expect("a file").len(), 2 << 20);
    qemu_img(&at.join("sub"), &["check", "d.qcow2"]).ok();
    for name in ["data_file=x.qcow2", "data_file=./x.qcow2"] {
        readonce(at, &["create", "-f", "qcow2", "-o", name, "x.qcow2", "1M"]).fails(1, "are the same file");
    }
    assert_eq!(names(at), ["sub"]);
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
        "create -q -f qcow2 -b base.raw -F raw b.qcow2",
        "create -q -f qcow2 -b b.qcow2 -F qcow2 top.qcow2 4M",
        "create -q -f qcow2 -o compat=0.10,cluster_size=512 -b ../base.raw -F raw sub/v2.qcow2 5M",
        "create -q -f qcow2 -o extended_l2=on,cluster_size=128k -b base.raw -F raw units.qcow2 4M",
        "create -q -f qcow2 -o preallocation=metadata pre.qcow2 2M",
        "create -q -f qcow2 -o preallocation=full full.qcow2 2M",
        "create -q -f qcow2 -o data_file=d.raw,lazy_refcounts=on d.qcow2 2M",
        "create -q -f qcow2 -o data_file=dr.raw,data_file_raw=on dr.qcow2 2M",
        "create -q -f qcow2 -o refcount_bits=1,cluster_size=2M big.qcow2 20M",
        "create -q -f qcow2 snap.qcow2 1M",
        "convert -c -O qcow2 base.raw c.qcow2",
        "convert -c -O qcow2 -o compression_type=zstd,cluster_size=4k base.raw cz.qcow2",
        "create -q -f qcow2 -b c.qcow2 -F qcow2 overc.qcow2",
        "create -q -f qcow2 marked.qcow2 1M",
        "create -q -f qcow2 unknown.qcow2 1M",
    ] {
        qemu_img(at, &arguments.split(' ').collect::<Vec<_>>()).ok();
    }
    qemu_io(at, &["-c", "write -P 1 64k 64k", "-c", "write -z 128k 128k", "b.qed"]).ok();
    qemu_io(at, &["-c", "write -P 2 1M 300k", "-c", "write -P 3 0 1", "top.qed"]).ok();
    qemu_io(at, &["-c", "write -P 2 9k 70k", "-c", "write -z 4M 64k", "small.qed"]).ok();
    for (image, commands) in [
        (
            "b.qcow2",
            &["write -P 1 64k 64k", "write -z 128k 128k", "write -P 2 2M 100k", "discard 2M 64k"][..],
        ),
        ("top.qcow2", &["write -P 2 1M 300k", "write -P 3 0 1", "write -z 0 1M", "write 512k 64k"]),
        ("sub/v2.qcow2", &["write -P 2 9k 70k", "write -z 4M 64k"]),
        (
            "units.qcow2",
            &["write 4k 8k", "write -z 16k 4k", "write 1M 300k", "write -z 512k 256k", "write -z 1M 4k"],
        ),
        ("pre.qcow2", &["write -P 1 128k 64k"]),
        ("d.qcow2", &["write 0 256k", "write -z 64k 64k", "write -z 512k 256k", "discard 128k 64k"]),
        ("dr.qcow2", &["write 0 256k", "write -z 64k 64k", "discard 128k 64k"]),
        ("big.qcow2", &["write 3M 5M"]),
        ("snap.qcow2", &["write 0 128k"]),
        ("c.qcow2", &["write -P 4 1M 64k"]),
    ] {
        let commands = commands.iter().flat_map(|command| ["-c", command]);
        qemu_io(at, &commands.chain([image]).collect::<Vec<_>>()).ok();
    }
    // The holes of a data file are looked at where the image's own file has less room than its tables name.
    let data = std::fs::read(at.join("d.raw")).expect("a file");
    let file = std::fs::File::create(at.join("d.raw")).expect("a file");
    file.set_len(data.len() as u64).expect("room");
    std::os::unix::fs::FileExt::write_all_at(&file, &data[..64 << 10], 0).expect("room");
    qemu_img(at, &["snapshot", "-c", "first one", "snap.qcow2"]).ok();
    qemu_io(at, &["-c", "write -P 2 64k 128k", "snap.qcow2"]).ok();
    qemu_img(at, &["bitmap", "--add", "snap.qcow2", "bits"]).ok();
    qemu_img(at, &["bitmap", "--add", "-g", "128k", "--disable", "snap.qcow2", "more bits"]).ok();
    for (image, bit) in [("marked.qcow2", 2), ("unknown.qcow2", 0x40)] {
        let mut bytes = std::fs::read(at.join(image)).expect("an image");
        bytes[79] = bit;
        std::fs::write(at.join(image), bytes).expect("room");
    }
    let images = [
        "b.qcow2",
        "top.qcow2",
        "sub/v2.qcow2",
        "units.qcow2",
        "pre.qcow2",
        "full.qcow2",
        "d.qcow2",
        "dr.qcow2",
        "big.qcow2",
        "snap.qcow2",
        "c.qcow2",
        "cz.qcow2",
        "overc.qcow2",
        "marked.qcow2",
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
        &["info", "-f", "qcow2", "base.raw"],
        &["snapshot", "-l", "snap.qcow2"],
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
    // QED
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

    let qed = [("qed", leaky, 3), ("qed", corrupt, 2), ("qed", twice, 2)];

    // qcow2
    qemu_img(at, &["create", "-q", "-f", "qcow2", "clean.qcow2", "3M"]).ok();
    qemu_io(at, &["-c", "write -P 1 64k 64k", "-c", "write -P 2 1M 64k", "clean.qcow2"]).ok();
    let clean = std::fs::read(at.join("clean.qcow2")).expect("an image");
    let number = |place: usize| {
        (u64::from_be_bytes(clean[place..place + 8].try_into().expect("8 bytes")) & 0x00ff_ffff_ffff_fe00)
            as usize
    };
    let (l2, block) = (number(number(40)), number(number(48)));
    let data = number(l2 + 8) >> 16;
    let changed = |place: usize, bytes: &[u8]| {
        let mut image = clean.clone();
        image[place..place + bytes.len()].copy_from_slice(bytes);
        image
    };
    let clusters = clean.len().div_ceil(1 << 16);
    let mut leaky = changed(block + 2 * clusters, &[0, 1, 0, 1]);
    leaky.resize((clusters + 2) << 16, 0);
    let uncounted = changed(block + 2 * data, &[0, 0]);
    let corrupt = changed(l2 + 8 * 3, &0x8000_0000_1234_5000_u64.to_be_bytes());
    let twice = changed(l2 + 8 * 5, &clean[l2 + 8..l2 + 16]);
    let qcow2 = [("qcow2", leaky, 3), ("qcow2", uncounted, 2), ("qcow2", corrupt, 2), ("qcow2", twice, 2)];

    for (format, bytes, code) in qed.into_iter().chain(qcow2) {
        std::fs::write(at.join("image"), bytes).expect("room");
        for output in ["--output=human", "--output=json"] {
            let arguments = ["check", output, "image"];
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
        let mended = readonce(at, &["check", "-r", "all", "image"]).ok();
        assert!(
            mended.out.starts_with("The following inconsistencies were found and repaired:"),
            "{mended:?}"
        );
        assert!(
            mended.out.contains("Double checking the fixed image now...\nNo errors were found"),
            "{mended:?}"
        );
        qemu_img(at, &["check", "-f", format, "image"]).ok();
        qemu_io(at, &["-f", format, "-c", "read -P 1 64k 64k", "-c", "read -P 2 1M 64k", "image"]).ok();
    }
    readonce(at, &["check", "-f", "raw", "clean.qed"]).fails(63, "This image format does not support checks");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_over_a_url_is_pinned_and_holds_no_signature() {
    for keeper in KEEPERS {
        pinned_without_signature(keeper).await;
    }
}

async fn pinned_without_signature((format, options): (&str, &str)) {
    let folder = folder();
    let at = folder.path();
    let origin = origin().await;
    let url = origin.url();
    let signed = format!("{url}?X-Amz-Signature=secret");
    let options = format!("{options}copy_on_read");
    let made =
        readonce(at, &["create", "-f", format, "-o", &options, "-b", &signed, "-F", "raw", "c.img"]).ok();
    assert!(made.out.starts_with(&format!("Formatting 'c.img', fmt={format} ")), "{made:?}");
    assert!(made.out.contains(&format!(" size=4194304 backing_file={url} backing_fmt=raw ")), "{made:?}");
    assert!(made.out.ends_with(" copy_on_read=on\n"), "{made:?}");
    assert!(made.err.contains("READONCE_URL") && !made.err.contains("secret"), "{made:?}");
    let bytes = std::fs::read(at.join("c.img")).expect("an image");
    assert!(!bytes.windows(6).any(|window| window == b"secret"));

    let told: Value =
        serde_json::from_str(&readonce(at, &["info", "--output=json", "c.img"]).ok().out).expect("JSON");
    assert_eq!(told["backing-filename"], url.as_str());
    assert_eq!(told["readonce"]["copy-on-read"], true);
    assert_eq!(told["readonce"]["pin"]["length"], 4_194_304);
    assert_eq!(told["readonce"]["only-readonce-wrote"], true);
    assert!(told["readonce"]["pin"]["validator"].as_str().expect("text").starts_with("ETag "), "{told}");
    let map = readonce(at, &["map", "--output=json", "c.img"]).ok();
    assert_eq!(
        map.out,
        "[{ \"start\": 0, \"length\": 4194304, \"depth\": 1, \"present\": true, \"zero\": false, \"data\": true, \
         \"compressed\": false, \"offset\": 0}]\n"
    );
    // Without the backing file: it is not needed to look at the image itself.
    origin.vanish().await;
    readonce(at, &["info", "c.img"]).ok();
    readonce(at, &["check", "c.img"]).ok();
}

/// QED allows them, QEMU does not open them: who made one for QEMU would find out when it is full.
#[test]
fn qed_images_that_qemu_cannot_open_are_told_at_create() {
    let folder = folder();
    let at = folder.path();
    for cluster_size in ["4k", "2M", "4M", "8M", "16M", "64M"] {
        for table_size in ["1", "2", "4", "8", "16"] {
            let sizes = format!("cluster_size={cluster_size},table_size={table_size}");
            let told = readonce(at, &["create", "-f", "qed", "-o", &sizes, "w.qed", "1M"]).ok();
            let opened = qemu_img(at, &["info", "w.qed"]);
            if opened.code == Some(0) {
                assert_eq!(told.err, "", "{sizes}");
                continue;
            }
            let words = opened.err.trim_end().rsplit(": ").next().expect("words");
            assert!(
                told.err.contains(&format!("warning: QEMU cannot open w.qed (\"{words}\")")),
                "{sizes}: {told:?} {opened:?}"
            );
        }
    }
}
