//! One input again: `FUZZ_TELL=1 cargo run -p readonce-fuzz --example again TARGET FILE` tells what the target makes of it.

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [target, file] = arguments.as_slice() else { panic!("usage: again TARGET FILE") };
    let target = readonce_fuzz::TARGETS.iter().find(|(name, _)| name == target);
    let (_, run) = target.expect("a target of that name");
    run(&std::fs::read(file).expect("the file can be read"));
}
