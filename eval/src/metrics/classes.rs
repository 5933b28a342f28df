//! Which class a text names.

/// 1 over the number of classes that `text` names, if `reference` is among them.
///
/// Names inside the reference's are taken off the list while the reference implementation walks it, so that it skips the name
/// after each: kept, for the published scores have it.
pub fn classes<S: AsRef<str>>(text: &str, reference: &str, classes: &[S]) -> f64 {
    let classes = classes.iter().map(AsRef::as_ref);
    let mut named: Vec<&str> = classes.filter(|class| text.contains(class)).collect();
    let mut at = 0;
    while let Some(&class) = named.get(at) {
        if reference.contains(class) && class != reference {
            let first = named.iter().position(|other| *other == class).unwrap_or(at);
            named.remove(first);
        }
        at += 1;
    }
    if named.contains(&reference) { 1.0 / named.len() as f64 } else { 0.0 }
}
