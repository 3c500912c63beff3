//! One thread, one seed: which task runs next and when a timer fires are drawn, never measured.

pub use readonce_testkit::exec::Exec;
