//! The demo, as the README's first command runs it.

use crate::common::{folder, names, readonce};

#[test]
fn the_demo_ends_well_and_leaves_nothing_behind() {
    let folder = folder();
    let told = readonce(folder.path(), &["demo"]).ok();
    for words in [
        "create the image",
        "read everything",
        "shut the origin",
        "Every byte was right",
        "readonce run http://",
    ] {
        assert!(told.out.contains(words), "{words}: {told:?}");
    }
    assert_eq!(told.err, "");
    assert_eq!(names(folder.path()), Vec::<String>::new());
}
