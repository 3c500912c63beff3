#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| readonce_fuzz::trace::run(data));
