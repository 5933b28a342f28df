//! The header of a GGUF file: keys and values, and where each tensor lies. Nothing in it is
//! believed: counts are spent against the bytes that are there, lengths are added with care, and a
//! tensor must lie inside the file.

use crate::error::Error;
use crate::weights::Encoding;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::ops::Range;
use std::path::Path;

#[derive(Debug)]
pub(super) struct Header {
    pub(super) values: HashMap<String, Value>,
    pub(super) tensors: HashMap<String, Tensor>,
}

/// A value. Texts and lists stay in the file, so that a header costs no more memory than it has
/// entries.
#[derive(Debug)]
pub(super) enum Value {
    Whole(i128),
    Real(f64),
    Flag(bool),
    Text(Range<usize>),
    List(List),
}

#[derive(Debug)]
pub(super) struct List {
    pub(super) item: u32,
    pub(super) count: usize,
    pub(super) bytes: Range<usize>,
}

#[derive(Debug)]
pub(super) struct Tensor {
    /// Outermost dimension first: the reverse of the file's order.
    pub(super) shape: Vec<usize>,
    pub(super) kind: Type,
    /// Where in the file; empty if the type is unknown.
    pub(super) bytes: Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Known(Encoding),
    Unknown(u32),
}

/// What is wrong with a file, before its path is known.
#[derive(Debug)]
pub(super) struct Fault {
    what: String,
    wanted: String,
    found: String,
}

impl Fault {
    fn new(what: impl Into<String>, wanted: impl Into<String>, found: impl fmt::Display) -> Self {
        Self { what: what.into(), wanted: wanted.into(), found: found.to_string() }
    }

    pub(super) fn at(self, path: &Path) -> Error {
        let Self { what, wanted, found } = self;
        let advice = "fetch or convert the file again";
        Error::Format { path: path.to_owned(), what, wanted, found, advice }
    }
}

type Result<T> = std::result::Result<T, Fault>;

/// Numbers of item types in the format.
impl List {
    pub(super) const I32: u32 = 5;
    pub(super) const F32: u32 = 6;
    pub(super) const TEXT: u32 = 8;
    const LIST: u32 = 9;
}

impl Header {
    pub(super) fn parse(file: &[u8]) -> Result<Self> {
        let mut reader = Reader { file, at: 0 };
        let magic = reader.take(4, "the magic")?;
        if magic != b"GGUF" {
            let found = format!("\"{}\"", magic.escape_ascii());
            return Err(Fault::new("the magic", "\"GGUF\"", found));
        }
        let version = reader.u32("the version")?;
        if !matches!(version, 2 | 3) {
            let big_endian = if version.swap_bytes() <= 3 { " (big-endian)" } else { "" };
            return Err(Fault::new("the version", "2 or 3", format!("{version}{big_endian}")));
        }
        let (tensor_count, value_count) =
            (reader.u64("the tensor count")?, reader.u64("the value count")?);

        let mut values = HashMap::new();
        for _ in 0..value_count {
            let key = reader.name("a key")?;
            let value = reader.value(&key)?;
            insert(&mut values, "key", key, value)?;
        }
        let alignment = match values.get("general.alignment") {
            None => 32,
            Some(&Value::Whole(n))
                if (1..=1 << 20).contains(&n) && (n as usize).is_power_of_two() =>
            {
                n as usize
            }
            Some(found) => {
                let found = format!("{found:?}");
                return Err(Fault::new("general.alignment", "a power of two", found));
            }
        };

        let mut infos = Vec::new();
        for _ in 0..tensor_count {
            infos.push(reader.tensor()?);
        }
        let data = reader.at.next_multiple_of(alignment);
        let mut tensors = HashMap::new();
        for (name, shape, kind, offset) in infos {
            let bytes = locate(&name, &shape, kind, data, offset, alignment, file.len())?;
            insert(&mut tensors, "tensor", name, Tensor { shape, kind, bytes })?;
        }
        Ok(Self { values, tensors })
    }
}

fn insert<T>(map: &mut HashMap<String, T>, what: &str, name: String, value: T) -> Result<()> {
    match map.entry(name) {
        Entry::Vacant(place) => {
            place.insert(value);
            Ok(())
        }
        Entry::Occupied(place) => {
            Err(Fault::new(format!("{what} {}", place.key()), "there once", "there twice"))
        }
    }
}

fn locate(
    name: &str,
    shape: &[usize],
    kind: Type,
    data: usize,
    offset: u64,
    alignment: usize,
    file: usize,
) -> Result<Range<usize>> {
    let Type::Known(encoding) = kind else { return Ok(0..0) };
    let Some(length) = encoding.tensor_bytes(shape) else {
        let wanted = format!("rows of whole {encoding:?} blocks, within the file");
        return Err(Fault::new(
            format!("the shape of tensor {name}"),
            wanted,
            format!("{shape:?}"),
        ));
    };
    let start = usize::try_from(offset).ok().and_then(|offset| data.checked_add(offset));
    let range = start.and_then(|start| Some(start..start.checked_add(length)?));
    match range.filter(|range| range.end <= file) {
        Some(_) if !offset.is_multiple_of(alignment as u64) => {
            let wanted = format!("a multiple of {alignment}");
            Err(Fault::new(format!("the offset of tensor {name}"), wanted, offset))
        }
        Some(range) => Ok(range),
        None => {
            let found = format!("{length} bytes from {offset} on, after a header of {data}");
            Err(Fault::new(
                format!("tensor {name}"),
                format!("within the file's {file} bytes"),
                found,
            ))
        }
    }
}

/// Reads on through a file.
struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let rest = &self.file[self.at..];
        let Some(taken) = rest.get(..count) else {
            let wanted = format!("{count} bytes at {}", self.at);
            return Err(Fault::new(
                what,
                wanted,
                format!("cut off by the file's end at {}", self.file.len()),
            ));
        };
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// The place of a text.
    fn text(&mut self, what: &str) -> Result<Range<usize>> {
        let length = self.u64(what)?;
        // A length beyond usize is beyond the file as well.
        self.take(usize::try_from(length).unwrap_or(usize::MAX), what)?;
        Ok(self.at - length as usize..self.at)
    }

    fn name(&mut self, what: &str) -> Result<String> {
        let place = self.text(what)?;
        match std::str::from_utf8(&self.file[place.clone()]) {
            Ok(name) => Ok(name.to_owned()),
            Err(_) => Err(Fault::new(what, "UTF-8", format!("other bytes at {}", place.start))),
        }
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let item = self.u32(key)?;
        Ok(match item {
            List::TEXT => Value::Text(self.text(key)?),
            List::LIST => Value::List(self.list(key)?),
            _ => self.scalar(key, item)?,
        })
    }

    fn scalar(&mut self, key: &str, item: u32) -> Result<Value> {
        Ok(match item {
            0 => Value::Whole(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Whole(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Whole(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Whole(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Whole(u32::from_le_bytes(self.array(key)?).into()),
            List::I32 => Value::Whole(i32::from_le_bytes(self.array(key)?).into()),
            List::F32 => Value::Real(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Flag(self.array::<1>(key)? != [0]),
            10 => Value::Whole(u64::from_le_bytes(self.array(key)?).into()),
            11 => Value::Whole(i64::from_le_bytes(self.array(key)?).into()),
            12 => Value::Real(f64::from_le_bytes(self.array(key)?)),
            _ => return Err(unknown_item(key, item)),
        })
    }

    fn list(&mut self, key: &str) -> Result<List> {
        let (item, count) = (self.u32(key)?, self.u64(key)?);
        let start = self.at;
        match item {
            List::TEXT => {
                for _ in 0..count {
                    self.text(key)?;
                }
            }
            // Nothing uses lists of lists, and their depth would be the stack's.
            List::LIST => return Err(Fault::new(key, "a list of plain values", "a list of lists")),
            _ => {
                let size = match item {
                    0 | 1 | 7 => 1,
                    2 | 3 => 2,
                    4..=6 => 4,
                    10..=12 => 8,
                    _ => return Err(unknown_item(key, item)),
                };
                let length = usize::try_from(count).ok().and_then(|count| count.checked_mul(size));
                self.take(length.unwrap_or(usize::MAX), key)?;
            }
        }
        // Every item took at least one byte.
        Ok(List { item, count: count as usize, bytes: start..self.at })
    }

    fn tensor(&mut self) -> Result<(String, Vec<usize>, Type, u64)> {
        let name = self.name("a tensor's name")?;
        let what = format!("the entry of tensor {name}");
        let dimensions = self.u32(&what)?;
        if !(1..=4).contains(&dimensions) {
            return Err(Fault::new(
                format!("the dimensions of tensor {name}"),
                "1 to 4",
                dimensions,
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let n = self.u64(&what)?;
            shape.push(usize::try_from(n).map_err(|_| Fault::new(&what, "a size in memory", n))?);
        }
        shape.reverse();
        let (kind, offset) = (Type::new(self.u32(&what)?), self.u64(&what)?);
        Ok((name, shape, kind, offset))
    }
}

fn unknown_item(key: &str, item: u32) -> Fault {
    Fault::new(format!("the type of {key}"), "0 to 12", item)
}

impl Type {
    fn new(number: u32) -> Self {
        Self::Known(match number {
            0 => Encoding::F32,
            1 => Encoding::F16,
            2 => Encoding::Q4_0,
            3 => Encoding::Q4_1,
            6 => Encoding::Q5_0,
            8 => Encoding::Q8_0,
            12 => Encoding::Q4_K,
            13 => Encoding::Q5_K,
            14 => Encoding::Q6_K,
            30 => Encoding::BF16,
            _ => return Self::Unknown(number),
        })
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(encoding) => write!(f, "{encoding:?}"),
            Self::Unknown(7) => f.write_str("Q5_1"),
            Self::Unknown(10) => f.write_str("Q2_K"),
            Self::Unknown(11) => f.write_str("Q3_K"),
            Self::Unknown(20) => f.write_str("IQ4_NL"),
            Self::Unknown(23) => f.write_str("IQ4_XS"),
            Self::Unknown(number) => write!(f, "GGUF type {number}"),
        }
    }
}
