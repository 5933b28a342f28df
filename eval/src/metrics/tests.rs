//! The values that kvpress's own code gives (0.5.4 and 0.5.5, `rouge` 1.0.1, fuzzywuzzy 0.18.0, jieba 0.42.1).

use super::*;

#[track_caller]
fn near(found: f64, wanted: f64) {
    assert!((found - wanted).abs() < 5e-7, "{found}, wanted {wanted}");
}

#[test]
fn ruler_counts_references_that_stand_in_the_text() {
    for (text, references, wanted) in [
        (" 1234567, 7654321\n and 111", "1234567 7654321 9999999 111", 75.0),
        ("12345\n67", "1234567", 100.0), // the line end is deleted
        ("ABCDE, FGHIJ", "abcde FGHIJ KLMNO PQRST UVWXY", 40.0),
        ("1. apple 2. pineapple", "apple pine x", 66.67),
        ("", "x", 0.0),
    ] {
        let references: Vec<&str> = references.split(' ').collect();
        near(percent([share_of_references(text, &references)]), wanted);
    }
    near(any_reference("The PARIS.", &["paris", "London"]), 1.0);
    near(any_reference("x", &["paris", "x y"]), 0.0);
    near(share_of_references::<&str>("x", &[]), 0.0);
    near(percent([1.0, 0.0, 0.0]), 33.33);
}

#[test]
fn f1_is_of_words_without_case_punctuation_and_articles() {
    for (text, reference, wanted) in [
        ("The cat, sat!", "a cat sat down", 0.8),
        ("", "", 0.0),
        ("the", "a", 0.0),
        ("cat cat", "cat", 0.666667),
        ("“quoted”", "quoted", 0.0),
    ] {
        near(token_f1(text, reference), wanted);
    }
}

#[test]
fn rouge_l_is_of_sets_of_words() {
    for (text, reference, wanted) in [
        ("the cat sat on the mat", "the cat is on the mat", 0.799999995),
        ("a b c. d e", "d e. a b", 0.888888884),
        ("one two two", "two two one", 0.499999995),
        ("Hello.", "hello.", 0.0),
        ("", "x", 0.0),
        ("... . .", "x", 0.0),
    ] {
        near(rouge_l(text, reference), wanted);
    }
    let long = |words: usize| (0..words).map(|w| w.to_string()).collect::<Vec<_>>().join(" ");
    near(rouge_l(&long(600), &long(600)), 0.999999995);
    near(rouge_l(&long(1200), &long(1200)), 0.0); // too deep for Python
}

#[test]
fn classes_are_taken_off_a_list_that_is_being_walked() {
    let all = ["A", "AB", "ABC", "B"];
    near(classes("ABC", "ABC", &all), 0.5);
    near(classes("AB", "AB", &all), 1.0);
    near(classes("ABC", "AB", &all), 0.5);
    near(classes("nothing", "ABC", &all), 0.0);
}

#[test]
fn numbers_are_compared_as_strings() {
    near(retrieval("3 and 4", "Paragraph 3").unwrap(), 0.5);
    near(retrieval("03", "Paragraph 3").unwrap(), 0.0);
    near(retrieval("3.5", "Paragraph 3").unwrap(), 0.5);
    near(retrieval("段落3", "段落3").unwrap(), 1.0);
    assert_eq!(retrieval("3", "the third"), None);
    near(count("7 7 8", "7"), 0.666667);
    near(count("７", "7"), 0.0); // a digit, another one
    near(count("none", "7"), 0.0);
}

#[test]
fn code_is_alike_as_difflib_has_it() {
    for (text, reference, wanted) in [
        ("```python\nfoo(a, b)\nx", "foo(a,b)", 0.94),
        ("    return self.value", "return self.val", 0.83),
        ("\n\nabc", "abd", 0.67),
        ("# c\n// d\n", "foo", 0.0),
        ("", "x", 0.0),
        ("x = 1", "x = 1", 1.0),
    ] {
        near(code_similarity(text, reference), wanted);
    }
    // Over 200 characters that are all frequent: autojunk leaves next to nothing to match.
    let (text, reference) = ("x = foo(bar, baz) + ".repeat(15), "x = foo(baz, bar) - ".repeat(15));
    near(code_similarity(&text, &reference), 0.03);
}

#[test]
fn boxes_are_found_as_each_version_finds_them() {
    use BoxRule::{V054, V055};
    for (text, first, second) in [
        (r"so \boxed{70}.", Some("70"), Some("70")),
        (r"\boxed{1} or \boxed{70}", Some("70"), Some("70")),
        (r"\boxed{\frac{1}{2}}", Some(r"\frac{1"), Some(r"\frac{1}{2}")),
        ("70", Some("70"), None),
        ("boxed{70", Some("70"), None),
        (r"\boxed{070}", Some("070"), Some("070")),
        ("", Some(""), None),
    ] {
        assert_eq!(boxed(text, V054, true), first, "{text}");
        assert_eq!(boxed(text, V055, true), second, "{text}");
    }
    assert_eq!(boxed(r"\boxed{1} or \boxed{70}", V055, false), Some("1"));
    assert!(same_integer("016", " 16") && !same_integer("16.0", "16") && !same_integer("x", "x"));
}

#[test]
fn a_letter_is_found_with_and_without_parentheses() {
    for (text, wanted) in [
        ("The correct answer is (B).", "B"),
        ("**The correct answer is** C", "C"),
        ("The correct answer is A, no: The correct answer is (D)", "AD"),
        ("B", ""),
        ("The correct answer is E", ""),
    ] {
        for letter in ["A", "B", "C", "D"] {
            assert_eq!(says_letter(text, letter), wanted.contains(letter), "{text}");
        }
    }
}

#[cfg(feature = "chinese")]
#[test]
fn chinese_is_cut_into_words_first() {
    let (text, reference) = ("我爱北京天安门", "我爱天安门");
    near(token_f1_zh(text, reference), 0.857143);
    near(rouge_l_zh(text, reference), 0.857142852);
    near(token_f1_zh("我爱，北京！", "我爱北京"), 1.0);
}

#[test]
fn no_text_is_an_error() {
    let long = "字 word. {} \\boxed{ 12 ".repeat(20_000);
    for text in ["", "\0\u{feff}\u{fffd}", "🦀".repeat(500).as_str(), long.as_str()] {
        share_of_references(text, &["x"]);
        token_f1(text, "x y");
        rouge_l(text, "x y");
        classes(text, "x", &["x", "y"]);
        count(text, "1");
        retrieval(text, "Paragraph 1");
        code_similarity(text, "x = 1");
        boxed(text, BoxRule::V055, true);
        says_letter(text, "A");
        infinite::is_word(text, "x");
        infinite::first_number(text, "1.5");
        infinite::numbers_in_order(text, &["1".into()]);
        infinite::chooses_function(text, "A", "f");
        infinite::chooses_option(text, "A", "x");
        #[cfg(feature = "chinese")]
        for score in [token_f1_zh, rouge_l_zh] {
            score(text, "我");
        }
    }
}

#[test]
fn infinitebench_reads_answers_as_its_own_scorers_do() {
    use infinite::*;
    let yes = |found: bool, wanted: bool, text: &str| assert_eq!(found, wanted, "{text}");
    for (text, reference, wanted) in
        [("It is \"ab-1\".", "ab-1", true), ("ab-12", "ab-1", false), ("", "x", false)]
    {
        yes(is_word(text, reference), wanted, text);
    }
    for (text, reference, wanted) in [
        (" 071432, not 5", "71432", false),
        ("key 71432.", "71432", true),
        ("22000 122", "22000122", false),
    ] {
        yes(first_digits(text, reference), wanted, text);
    }
    for (text, reference, wanted) in [
        ("The value is: -7.", "-7", true),
        ("7 apples", "7", false),
        ("`12`", "12", true),
        ("", "1", false),
    ] {
        yes(last_number(text, reference), wanted, text);
    }
    for (text, reference, wanted) in [
        ("about 12.5", "12.5", true),
        ("3 or 4", "3", true),
        ("none", "3", false),
        ("12", "12.0", true),
        ("3.5", "3", false),
    ] {
        yes(first_number(text, reference), wanted, text);
    }
    let list = |items: &[&str]| items.iter().map(|item| (*item).to_owned()).collect::<Vec<_>>();
    near(numbers_in_order("[1, 4, 9]", &list(&["1", "4", "8"])), 0.666667);
    near(numbers_in_order("1 4 8 9", &list(&["1", "4", "8"])), 1.0);
    near(numbers_in_order("x", &list(&["1"])), 0.0);
    yes(names_one("it is ace!", &list(&["ACE ROTHSTEIN", "ACE"])), true, "ace");
    yes(names_one("rothstein", &list(&["ACE"])), false, "rothstein");
    near(best_f1("The cat, sat!", &list(&["x", "a cat sat down"])), 0.8);
    #[cfg(feature = "chinese")]
    near(best_f1_zh("我爱，北京！", &list(&["我爱天安门"])), 0.444444);
    for (text, wanted) in [
        ("B", true),
        ("The answer is: fn_a", true),
        ("A or B\nC", true),
        ("A\nB", false),
        ("option B", true),
        ("fn_a", true),
        ("answer:", false),
        ("it is: \"fn_a\"", true),
        ("is:  x", false),
    ] {
        yes(chooses_function(text, "B", "fn_a"), wanted, text);
    }
    for (text, wanted) in [
        ("C", true),
        ("A, then C", true),
        ("C, then A", true),
        ("Cabbage", true),
        ("Totty", true),
        ("the answer is: Totty here", true),
        ("answer is Totty", true),
        ("the option is", false),
        ("perhaps BC", false),
        ("", false),
        ("a\nA\nC", false),
    ] {
        yes(chooses_option(text, "C", "Totty"), wanted, text);
    }
}
