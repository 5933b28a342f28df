//! What templates expect of Python: `str`, `json.dumps`, `strftime`.

use minijinja::value::{Kwargs, Rest, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::borrow::Cow;
use std::time::{Duration, SystemTime};

/// How a value is written out.
struct Style {
    /// Between two items, and between key and value.
    separators: (String, String),
    /// What one level of nesting is indented by; `None` keeps all on one line.
    indent: Option<String>,
    ascii: bool,
    sort: bool,
    /// As Python's `repr` rather than as JSON.
    repr: bool,
}

/// Python's `str`: what `{{ value }}` writes.
pub(super) fn text(value: &Value) -> Result<Cow<'_, str>, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().into()),
        ValueKind::Undefined => Ok("".into()),
        ValueKind::Bool | ValueKind::None | ValueKind::Number | ValueKind::Seq | ValueKind::Map => {
            let separators = (", ".to_owned(), ": ".to_owned());
            let style = Style { separators, indent: None, ascii: false, sort: false, repr: true };
            let mut out = String::new();
            write(value, &style, 0, &mut out)?;
            Ok(out.into())
        }
        _ => Ok(value.to_string().into()),
    }
}

/// The filter of `transformers`: `json.dumps` with `ensure_ascii` false by default. Keys keep their order, and nothing
/// is escaped for HTML.
pub(super) fn tojson(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name| -> Result<Option<Value>, Error> {
        let given = args
            .get(index)
            .cloned()
            .map_or_else(|| kwargs.get::<Option<Value>>(name), |value| Ok(Some(value)))?;
        Ok(given.filter(|value| !value.is_none()))
    };
    let ascii = argument(0, "ensure_ascii")?.is_some_and(|value| value.is_true());
    let indent = match argument(1, "indent")? {
        None => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(value)?.min(64)),
        }),
    };
    let separators = match argument(2, "separators")? {
        Some(pair) => (
            text(&pair.get_item_by_index(0)?)?.into_owned(),
            text(&pair.get_item_by_index(1)?)?.into_owned(),
        ),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let sort = argument(3, "sort_keys")?.is_some_and(|value| value.is_true());
    kwargs.assert_all_used()?;
    let mut out = String::new();
    write(value, &Style { separators, indent, ascii, sort, repr: false }, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    let literal = |json, python| if style.repr { python } else { json };
    match value.kind() {
        ValueKind::None => out.push_str(literal("null", "None")),
        ValueKind::Bool if value.is_true() => out.push_str(literal("true", "True")),
        ValueKind::Bool => out.push_str(literal("false", "False")),
        ValueKind::Number if value.is_integer() => *out += &value.to_string(),
        ValueKind::Number => float(f64::try_from(value.clone())?, style, out),
        ValueKind::String => string(value.as_str().unwrap_or_default(), style, out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            list(['[', ']'], &items, style, depth, out, |item, out| {
                write(item, style, depth + 1, out)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort {
                keys.sort();
            }
            list(['{', '}'], &keys, style, depth, out, |key, out| {
                if style.repr || key.as_str().is_some() {
                    write(key, style, depth + 1, out)?;
                } else {
                    out.push('"');
                    write(key, style, depth + 1, out)?;
                    out.push('"');
                }
                *out += &style.separators.1;
                write(&value.get_item(key)?, style, depth + 1, out)
            })?;
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("a value of kind {kind} has no JSON"),
            ));
        }
    }
    Ok(())
}

fn list(
    [open, close]: [char; 2],
    items: &[Value],
    style: &Style,
    depth: usize,
    out: &mut String,
    mut item: impl FnMut(&Value, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let line = |depth, out: &mut String| {
        if let Some(indent) = &style.indent {
            out.push('\n');
            *out += &indent.repeat(depth);
        }
    };
    out.push(open);
    for (index, value) in items.iter().enumerate() {
        if index > 0 {
            *out += &style.separators.0;
        }
        line(depth + 1, out);
        item(value, out)?;
    }
    if !items.is_empty() {
        line(depth, out);
    }
    out.push(close);
    Ok(())
}

/// Python's shortest form. Rust's has the same digits and turns to exponents at the same sizes.
fn float(value: f64, style: &Style, out: &mut String) {
    if !value.is_finite() {
        let json = if value.is_nan() { "NaN" } else { "Infinity" };
        let python = if value.is_nan() { "nan" } else { "inf" };
        out.push_str(if value < 0.0 { "-" } else { "" });
        out.push_str(if style.repr { python } else { json });
        return;
    }
    let digits = format!("{value:?}");
    match digits.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) =
                exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
            *out += &format!("{digits}e{sign}{exponent:0>2}");
        }
        None => *out += &digits,
    }
}

fn string(text: &str, style: &Style, out: &mut String) {
    let quote = if !style.repr || text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => *out += "\\\\",
            '\n' => *out += "\\n",
            '\r' => *out += "\\r",
            '\t' => *out += "\\t",
            '\u{8}' if !style.repr => *out += "\\b",
            '\u{c}' if !style.repr => *out += "\\f",
            c if c == quote => out.extend(['\\', c]),
            '\0'..' ' | '\u{7f}' if style.repr => *out += &format!("\\x{:02x}", c as u32),
            '\0'..' ' => *out += &format!("\\u{:04x}", c as u32),
            '\u{7f}'.. if style.ascii => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    *out += &format!("\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// What a template calls to refuse its messages.
pub(super) fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// `strftime` in the C locale, UTC, for the directives of dates and times that templates use.
pub(super) fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    let seconds = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days as usize + 4) % 7]); // 1970 began on a Thursday
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        out += &match chars.next() {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('d') => format!("{day:02}"),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => format!("{:02}", second / 3600),
            Some('M') => format!("{:02}", second / 60 % 60),
            Some('S') => format!("{:02}", second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let what = format!(
                    "strftime_now does not know %{}",
                    other.map(String::from).unwrap_or_default()
                );
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        };
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 0;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month + 1, day + 1)
}
