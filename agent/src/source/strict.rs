//! From a [`Node`] to a typed object, as strictly as `kubectl` does it: a field that the type does not have is an
//! error, and every error names the field's path and line, never its value. An object of somebody else's API, of which
//! the type holds a part only ([`part`]), may have any fields.

use std::{cell::RefCell, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor},
    forward_to_deserialize_any,
};

use super::yaml::{Flaw, Key, Node, Value, shown};

/// Reads a whole object. `ignored` are fields of its root that the caller has read.
pub(super) fn object<'de, T: Deserialize<'de>>(node: &'de Node, ignored: &[&str]) -> Result<T, Vec<Flaw>> {
    let unknown = RefCell::default();
    let read = T::deserialize(Place { node, path: Path::Root { ignored }, unknown: Some(&unknown) });
    let mut flaws = unknown.into_inner();
    match read {
        Ok(object) if flaws.is_empty() => Ok(object),
        Ok(_) => Err(flaws),
        Err(fault) => {
            flaws.push(fault.flaw());
            Err(flaws)
        }
    }
}

/// Reads what the type has of an object. Other fields are ignored, and `null` is as good as no field.
pub(super) fn part<'de, T: Deserialize<'de>>(node: &'de Node) -> Result<T, Vec<Flaw>> {
    let place = Place { node, path: Path::Root { ignored: &[] }, unknown: None };
    T::deserialize(place).map_err(|fault| vec![fault.flaw()])
}

/// Where in the object we are. `Display` is as a user would write it: `spec.gateways[1].publicKey`.
#[derive(Clone, Copy)]
enum Path<'a> {
    Root { ignored: &'a [&'a str] },
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root { .. } => Ok(()),
            Path::Field(Path::Root { .. }, name) => f.write_str(shown(name).trim_matches('"')),
            Path::Field(above, name) => write!(f, "{above}.{}", shown(name).trim_matches('"')),
            Path::Item(above, index) => write!(f, "{above}[{index}]"),
        }
    }
}

/// One node, about to be read.
#[derive(Clone, Copy)]
struct Place<'de, 'a> {
    node: &'de Node,
    path: Path<'a>,
    /// Where fields that the type lacks are told; `None`: they may be there.
    unknown: Option<&'a RefCell<Vec<Flaw>>>,
}

impl<'de> Place<'de, '_> {
    fn fill<T>(&self, result: Result<T, Fault>) -> Result<T, Fault> {
        result.map_err(|mut fault| {
            fault.place.get_or_insert_with(|| (self.path.to_string(), self.node.line));
            fault
        })
    }

    fn read<V: Visitor<'de>>(&self, fields: Option<&'static [&'static str]>, visitor: V) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Int(value) => visitor.visit_i64(*value),
            Value::Uint(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_borrowed_str(value),
            Value::List(items) => visitor.visit_seq(Items { place: *self, rest: items.iter().enumerate() }),
            Value::Map(entries) => {
                visitor.visit_map(Entries { place: *self, known: fields, rest: entries.iter(), value: None })
            }
        }
    }
}

impl<'de> Deserializer<'de> for Place<'de, '_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.fill(self.read(None, visitor))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.node.value {
            // Derived visitors would take a list for the fields in their order.
            Value::List(_) => self.fill(Err(de::Error::invalid_type(Unexpected::Seq, &visitor))),
            _ => self.fill(self.read(Some(fields), visitor)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.node.value {
            Value::Null => self.fill(visitor.visit_none()),
            _ => self.fill(visitor.visit_some(self)),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _name: &'static str, visitor: V) -> Result<V::Value, Fault> {
        self.fill(visitor.visit_newtype_struct(self))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.node.value {
            Value::Text(name) => self.fill(visitor.visit_enum(name.as_str().into_deserializer())),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier
    }
}

struct Items<'de, 'a> {
    place: Place<'de, 'a>,
    rest: std::iter::Enumerate<std::slice::Iter<'de, Node>>,
}

impl<'de> SeqAccess<'de> for Items<'de, '_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some((index, node)) = self.rest.next() else { return Ok(None) };
        let path = Path::Item(&self.place.path, index);
        seed.deserialize(Place { node, path, unknown: self.place.unknown }).map(Some)
    }
}

struct Entries<'de, 'a> {
    place: Place<'de, 'a>,
    /// The fields that the type has; `None` where any key goes.
    known: Option<&'static [&'static str]>,
    rest: std::slice::Iter<'de, (Key, Node)>,
    value: Option<&'de (Key, Node)>,
}

impl<'de> MapAccess<'de> for Entries<'de, '_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        for entry in self.rest.by_ref() {
            let name = entry.0.name.as_str();
            if matches!(self.place.path, Path::Root { ignored } if ignored.contains(&name)) {
                continue;
            }
            if let Some(known) = self.known.filter(|known| !known.contains(&name)) {
                if let Some(flaws) = self.place.unknown {
                    let path = Path::Field(&self.place.path, name);
                    flaws.borrow_mut().push(Flaw::at(entry.0.line, unknown(&path, name, known)));
                }
                continue;
            }
            if self.place.unknown.is_none() && matches!(entry.1.value, Value::Null) {
                continue;
            }
            self.value = Some(entry);
            return seed.deserialize(name.into_deserializer()).map(Some);
        }
        Ok(None)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some((key, node)) = self.value.take() else { return Err(de::Error::custom("")) };
        let path = Path::Field(&self.place.path, &key.name);
        seed.deserialize(Place { node, path, unknown: self.place.unknown })
    }
}

fn unknown(path: &Path<'_>, name: &str, known: &[&str]) -> String {
    let lower = name.to_ascii_lowercase();
    if ["private", "preshared", "secret"].iter().any(|word| lower.contains(word)) {
        return format!(
            "{path}: secrets do not belong in this folder but in the keys' directory; \
             take this one for known to others and make a new one"
        );
    }
    match nearest(name, known) {
        Some(near) => format!("{path}: there is no such field, did you mean {near:?}?"),
        None => format!("{path}: there is no such field; there are: {}", known.join(", ")),
    }
}

/// The candidate that the name was probably meant to be: the same but for case, or at most a third of it mistyped.
pub(super) fn nearest<'a>(name: &str, candidates: &[&'a str]) -> Option<&'a str> {
    if name.len() > 40 {
        return None;
    }
    let name = name.to_ascii_lowercase();
    let distances = candidates.iter().map(|candidate| (distance(&name, &candidate.to_ascii_lowercase()), *candidate));
    distances.min().filter(|(distance, candidate)| *distance <= candidate.len().min(9) / 3).map(|(_, near)| near)
}

/// Levenshtein's distance, in bytes.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// Why a value does not fit its field.
#[derive(Debug)]
struct Fault {
    /// The field's path and line, once the innermost [`Place`] has added them.
    place: Option<(String, usize)>,
    message: String,
}

impl Fault {
    fn new(message: String) -> Fault {
        Fault { place: None, message }
    }

    fn flaw(self) -> Flaw {
        match self.place {
            Some((path, line)) if path.is_empty() => Flaw::at(line, self.message),
            Some((path, line)) => Flaw::at(line, format!("{path}: {}", self.message)),
            None => Flaw { line: None, message: self.message },
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    /// Drops the text: it may quote the value.
    fn custom<T: fmt::Display>(_text: T) -> Fault {
        Fault::new("has a value that does not fit the field".to_owned())
    }

    fn invalid_type(found: Unexpected<'_>, wanted: &dyn Expected) -> Fault {
        let remedy = match (&found, wanted.to_string().as_str()) {
            (Unexpected::Unit, _) => ": give it one or leave the field out",
            (Unexpected::Bool(_) | Unexpected::Unsigned(_) | Unexpected::Signed(_), "a string") => ": put it in quotes",
            _ => "",
        };
        Fault::new(format!("is {}, must be {}{remedy}", described(&found), wanted_in_words(wanted)))
    }

    fn invalid_value(found: Unexpected<'_>, wanted: &dyn Expected) -> Fault {
        Fault::new(format!("is {}, must be {}", described(&found), wanted_in_words(wanted)))
    }

    fn unknown_variant(_variant: &str, expected: &'static [&'static str]) -> Fault {
        Fault::new(format!("must be one of: {}", expected.join(", ")))
    }

    fn missing_field(field: &'static str) -> Fault {
        Fault::new(format!("the field {field:?} is missing"))
    }
}

/// What was found, without a text that could be a secret.
fn described(found: &Unexpected<'_>) -> String {
    match found {
        Unexpected::Unit | Unexpected::Option => "without a value".to_owned(),
        Unexpected::Bool(value) => format!("the boolean {value}"),
        Unexpected::Signed(value) => format!("the number {value}"),
        Unexpected::Unsigned(value) => format!("the number {value}"),
        Unexpected::Float(_) => "a number that is not whole or too large".to_owned(),
        Unexpected::Str(_) | Unexpected::Char(_) => "a text".to_owned(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a mapping".to_owned(),
        _ => "something else".to_owned(),
    }
}

fn wanted_in_words(wanted: &dyn Expected) -> String {
    match wanted.to_string().as_str() {
        "a string" => "a text".to_owned(),
        "a sequence" => "a list".to_owned(),
        "i8" | "i16" | "i32" | "i64" | "u8" | "u16" | "u32" | "u64" => "a whole number".to_owned(),
        "a map" => "a mapping".to_owned(),
        other if other.starts_with("struct ") || other == "ObjectMeta" => "a mapping".to_owned(),
        other => other.to_owned(),
    }
}
