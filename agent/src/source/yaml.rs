//! YAML text as trees whose every node knows its line.
//!
//! Invariant: no error made here holds a value of the text, because that value could be a secret. For the same reason
//! the tree has no `Debug`.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};
use serde_saphyr::{Error, Spanned, budget::BudgetBreach};

/// A value and the line, from 1, where it stands; for an alias, where it is used.
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

pub(super) enum Value {
    Null,
    Bool(bool),
    Int(i64),
    /// Above `i64::MAX`.
    Uint(u64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    /// In the order of the text; no key occurs twice.
    Map(Vec<(Key, Node)>),
}

pub(super) struct Key {
    pub(super) line: usize,
    pub(super) name: String,
}

/// What is wrong with a text, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flaw {
    /// From 1.
    pub(super) line: Option<usize>,
    pub(super) message: String,
}

impl Flaw {
    pub(super) fn at(line: usize, message: impl Into<String>) -> Flaw {
        Flaw { line: (line > 0).then_some(line), message: message.into() }
    }
}

impl Value {
    /// The field of that name, if this is a mapping that has it.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        let Value::Map(fields) = self else { return None };
        fields.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
    }
}

/// Every document of the text that is not empty. JSON is YAML.
pub(super) fn documents(text: &str) -> Result<Vec<Node>, Flaw> {
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: 48,
            flow_nesting_limit: 48,
            max_nodes: 200_000,
            max_events: 500_000,
            max_documents: 10_000,
            max_aliases: 1_000,
            max_anchors: 1_000,
            max_merge_keys: 1_000,
            max_recorded_anchor_events: 50_000,
            max_recorded_anchor_bytes: 4 << 20,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 50_000,
            max_replay_stack_depth: 16,
        },
        // What `kubectl` would take for something else than the text must not pass as text here.
        leading_zero_numbers_as_strings: true,
        reject_unsupported_tags: true,
        // A snippet of the text may hold a secret.
        with_snippet: false,
    };
    serde_saphyr::from_multiple_with_options::<Node>(text, options).map_err(|error| flaw(&error))
}

/// Which document of the text the line is in, from 1. Empty documents count.
pub(super) fn document_at(text: &str, line: usize) -> usize {
    let mut document = 0;
    for line in text.lines().take(line) {
        let starts = line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']));
        let blank = matches!(line.trim_start().bytes().next(), None | Some(b'#' | b'%'));
        if starts || (document == 0 && !blank) {
            document += 1;
        }
    }
    document.max(1)
}

fn flaw(error: &Error) -> Flaw {
    let error = error.without_snippet();
    let line = error.location().map(|location| location.line() as usize).filter(|line| *line > 0);
    let message = match error {
        Error::AliasError { error, .. } => flaw(error).message,
        // The scanner's own words: fixed texts, at most with one character in them.
        Error::ExternalMessage { msg, .. } => format!("is not YAML: {msg}"),
        Error::Eof { .. } => "is not YAML: it ends too early".to_owned(),
        Error::DuplicateMappingKey { key, .. } => match key {
            Some(key) => format!("the field {} is given twice: keep one", shown(key)),
            None => "a field is given twice: keep one".to_owned(),
        },
        Error::UnknownAnchor { .. } => "an alias (*name) stands for an anchor (&name) that is not there".to_owned(),
        Error::RecursiveReferencesRequireWeakTypes { .. } => "an alias (*name) contains itself".to_owned(),
        Error::UnsupportedTag { .. } => "tags (!name) of one's own mean nothing here: leave the tag out".to_owned(),
        Error::NullIntoString { .. } => "a field's name is empty".to_owned(),
        Error::NonFiniteFloat { .. } => "a number is not finite".to_owned(),
        Error::Budget { breach: BudgetBreach::Depth { .. }, .. } => "is nested too deeply".to_owned(),
        Error::Budget { breach: BudgetBreach::Documents { .. }, .. } => "has too many documents: split it".to_owned(),
        Error::Budget { .. } => "has too many values, anchors or aliases: split it".to_owned(),
        Error::AliasReplayLimitExceeded { .. }
        | Error::AliasExpansionLimitExceeded { .. }
        | Error::AliasReplayStackDepthExceeded { .. }
        | Error::AliasReplayCounterOverflow { .. } => {
            "its aliases (*name) expand to too much: write the values out".to_owned()
        }
        _ => "is not YAML that can be read".to_owned(),
    };
    Flaw { line, message }
}

/// A name from the text as it may be printed: only what cannot be a key.
pub(super) fn shown(name: &str) -> String {
    let plain = |c: u8| c.is_ascii_alphanumeric() || b"-_./".contains(&c);
    let printable = !name.is_empty() && name.len() <= 40 && name.bytes().all(plain);
    if printable { format!("{name:?}") } else { "(not shown)".to_owned() }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Node, D::Error> {
        let Spanned { value, referenced, .. } = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node { line: referenced.line() as usize, value })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Uint(value), Value::Int))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut fields = Vec::new();
        while let Some((name, node)) = map.next_entry::<Spanned<String>, Node>()? {
            fields.push((Key { line: name.referenced.line() as usize, name: name.value }, node));
        }
        Ok(Value::Map(fields))
    }
}
