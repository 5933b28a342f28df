//! Ratcliff and Obershelp's likeness of texts, as Python's `difflib.SequenceMatcher` computes it.

use std::collections::HashMap;

/// Twice the matching characters over all characters, from 0 to 1.
///
/// In a second text of 200 characters and more, those that make up more than a hundredth of it start no match (`autojunk`):
/// likeness falls sharply there, and is not symmetric.
pub fn ratio(a: &str, b: &str) -> f64 {
    let [a, b] = [a, b].map(|text| text.chars().collect::<Vec<_>>());
    if a.is_empty() && b.is_empty() {
        return 1.0;
    }
    let mut places: HashMap<char, Vec<usize>> = HashMap::new();
    for (place, &c) in b.iter().enumerate() {
        places.entry(c).or_default().push(place);
    }
    if b.len() >= 200 {
        let most = b.len() / 100 + 1;
        places.retain(|_, places| places.len() <= most);
    }
    let mut matching = 0;
    let mut open = vec![(0, a.len(), 0, b.len())];
    while let Some((a_start, a_end, b_start, b_end)) = open.pop() {
        let (i, j, length) = longest(&a, &b, &places, (a_start, a_end, b_start, b_end));
        if length > 0 {
            matching += length;
            open.push((a_start, i, b_start, j));
            open.push((i + length, a_end, j + length, b_end));
        }
    }
    2.0 * matching as f64 / (a.len() + b.len()) as f64
}

/// The longest block in which the two parts are equal, the first of several: where it begins in each, and its length.
fn longest(
    a: &[char],
    b: &[char],
    places: &HashMap<char, Vec<usize>>,
    (a_start, a_end, b_start, b_end): (usize, usize, usize, usize),
) -> (usize, usize, usize) {
    let (mut i, mut j, mut length) = (a_start, b_start, 0);
    let mut ending: HashMap<usize, usize> = HashMap::new(); // at a place of b, with the previous character of a
    for (at, c) in a.iter().enumerate().take(a_end).skip(a_start) {
        let mut next = HashMap::new();
        for &place in places.get(c).into_iter().flatten() {
            if (b_start..b_end).contains(&place) {
                let before = place.checked_sub(1).and_then(|before| ending.get(&before));
                let run = before.copied().unwrap_or(0) + 1;
                next.insert(place, run);
                if run > length {
                    (i, j, length) = (at + 1 - run, place + 1 - run, run);
                }
            }
        }
        ending = next;
    }
    // What starts no match may still belong to one.
    while i > a_start && j > b_start && a[i - 1] == b[j - 1] {
        (i, j, length) = (i - 1, j - 1, length + 1);
    }
    while i + length < a_end && j + length < b_end && a[i + length] == b[j + length] {
        length += 1;
    }
    (i, j, length)
}
