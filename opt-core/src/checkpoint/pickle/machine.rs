//! A pickle machine that can build a state dict and nothing else.
//!
//! Python's pickle is a program that may call anything; this one knows six names and refuses every other. Values live
//! in one arena and refer to each other by index, so nothing recurses, and each opcode makes at most one value.
//! Opcodes after Python's `pickletools`.

use super::super::entry::{FileDType, fail, shown};
use crate::Result;
use std::collections::HashMap;

/// Far above what a model needs: the largest OPT has 1,700 tensors of about 15 values.
const MOST_VALUES: usize = 1 << 20;

/// No tensor of a model has more axes than 2.
const MOST_AXES: usize = 8;

/// What a pickle may name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(FileDType),
}

const GLOBALS: [(&str, &str, Global); 9] = [
    ("collections", "OrderedDict", Global::OrderedDict),
    ("torch._utils", "_rebuild_tensor_v2", Global::RebuildTensor),
    ("torch._utils", "_rebuild_parameter", Global::RebuildParameter),
    ("torch", "FloatStorage", Global::Storage(FileDType::F32)),
    ("torch", "HalfStorage", Global::Storage(FileDType::F16)),
    ("torch", "BFloat16Storage", Global::Storage(FileDType::BF16)),
    // What packed weights are made of.
    ("torch", "IntStorage", Global::Storage(FileDType::I32)),
    ("torch", "CharStorage", Global::Storage(FileDType::I8)),
    ("torch", "ByteStorage", Global::Storage(FileDType::U8)),
];

/// A value on the stack; strings borrow from the pickle.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Str(&'a str),
    Global(Global),
    /// An index into the arena.
    Node(usize),
}

#[derive(Debug)]
pub(super) enum Node<'a> {
    Tuple(Vec<Value<'a>>),
    List(Vec<Value<'a>>),
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
}

/// Numbers in a record of the archive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Storage<'a> {
    pub(super) dtype: FileDType,
    pub(super) key: &'a str,
    pub(super) length: usize,
}

/// A view into a storage; offset and strides in numbers.
#[derive(Debug, Clone)]
pub(super) struct Tensor<'a> {
    pub(super) storage: Storage<'a>,
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) strides: Vec<usize>,
}

/// What a pickle built.
#[derive(Debug)]
pub(super) struct Built<'a> {
    nodes: Vec<Node<'a>>,
    pub(super) top: Value<'a>,
}

impl<'a> Built<'a> {
    pub(super) fn node(&self, value: Value<'a>) -> Option<&Node<'a>> {
        match value {
            Value::Node(index) => self.nodes.get(index),
            _ => None,
        }
    }
}

struct Machine<'a> {
    program: &'a [u8],
    at: usize,
    stack: Vec<Value<'a>>,
    /// Heights of the stack where marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, Value<'a>>,
    nodes: Vec<Node<'a>>,
    /// Values copied out of lists, which a short program can ask for again and again.
    copied: usize,
}

/// Runs a pickle.
pub(super) fn run(program: &[u8]) -> Result<Built<'_>> {
    let mut machine = Machine {
        program,
        at: 0,
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        nodes: Vec::new(),
        copied: 0,
    };
    loop {
        let at = machine.at;
        let step = machine.step().map_err(|e| e.at(format_args!("pickle at byte {at}")))?;
        if let Some(top) = step {
            return Ok(Built { nodes: machine.nodes, top });
        }
        let Machine { stack, marks, memo, nodes, copied, .. } = &machine;
        if stack.len() + marks.len() + memo.len() + nodes.len() + copied > MOST_VALUES {
            return fail(format_args!("pickle: more than {MOST_VALUES} values"));
        }
    }
}

impl<'a> Machine<'a> {
    fn step(&mut self) -> Result<Option<Value<'a>>> {
        let [opcode] = self.array()?;
        match opcode {
            b'.' => return self.pop().map(Some),
            0x80 => match self.array()? {
                [2..=5] => {}
                [protocol] => return fail(format_args!("expected protocol 2 to 5, found {protocol}")),
            },
            // FRAME: a hint for buffering.
            0x95 => drop(self.array::<8>()?),
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Value::Int(value.into()));
            }
            b'K' => {
                let [value] = self.array()?;
                self.push(Value::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Value::Int(value.into()));
            }
            0x8a => self.long()?,
            b'G' => {
                self.array::<8>()?;
                self.push(Value::Float);
            }
            b'X' => {
                let length = u32::from_le_bytes(self.array()?);
                self.string(length as usize)?;
            }
            0x8c => {
                let [length] = self.array()?;
                self.string(length.into())?;
            }
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),
            b'}' => self.push_node(Node::Dict(Vec::new())),
            b']' => self.push_node(Node::List(Vec::new())),
            b')' => self.push_node(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.pop_mark()?;
                self.push_node(Node::Tuple(items));
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.push_node(Node::Tuple(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.list()?.extend(items);
            }
            b's' => {
                let value = self.pop()?;
                let key = self.pop()?;
                self.dict()?.push((key, value));
            }
            b'u' => self.set_items()?,
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => match self.pop_many(2)?[..] {
                [Value::Str(module), Value::Str(name)] => self.global(module, name)?,
                _ => return fail("STACK_GLOBAL: expected two strings"),
            },
            b'Q' => self.persistent()?,
            b'R' => self.reduce()?,
            b'b' => self.build()?,
            b'q' => {
                let [key] = self.array()?;
                self.memoize(key.into())?;
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                self.memoize(key)?;
            }
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => {
                let [key] = self.array()?;
                self.recall(key.into())?;
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?;
            }
            other => return fail(format_args!("opcode {other:#04x} has no place in a state dict")),
        }
        Ok(None)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8]> {
        let bytes = self.at.checked_add(length).and_then(|end| self.program.get(self.at..end));
        match bytes {
            Some(bytes) => {
                self.at += length;
                Ok(bytes)
            }
            None => fail(format_args!("truncated: expected {length} bytes more")),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.bytes(N)?;
        bytes.try_into().or_else(|_| fail("truncated"))
    }

    fn string(&mut self, length: usize) -> Result<()> {
        match std::str::from_utf8(self.bytes(length)?) {
            Ok(text) => {
                self.push(Value::Str(text));
                Ok(())
            }
            Err(e) => fail(format_args!("a string is not UTF-8: {e}")),
        }
    }

    fn line(&mut self) -> Result<&'a str> {
        let rest = self.program.get(self.at..).unwrap_or_default();
        let Some(length) = rest.iter().position(|&b| b == b'\n') else {
            return fail("truncated: no end of line");
        };
        let line = self.bytes(length)?;
        self.bytes(1)?;
        std::str::from_utf8(line).or_else(|e| fail(format_args!("a name is not UTF-8: {e}")))
    }

    /// A little-endian two's complement number of any length; no size in a checkpoint needs more than 8 bytes.
    fn long(&mut self) -> Result<()> {
        let [length] = self.array()?;
        let bytes = self.bytes(length.into())?;
        let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        match wide.get_mut(..bytes.len()) {
            Some(low) => low.copy_from_slice(bytes),
            None => return fail(format_args!("a number of {length} bytes")),
        }
        self.push(Value::Int(i64::from_le_bytes(wide)));
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(value);
    }

    fn push_node(&mut self, node: Node<'a>) {
        self.stack.push(Value::Node(self.nodes.len()));
        self.nodes.push(node);
    }

    /// The height below which the values belong to an open mark.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<Value<'a>> {
        if self.stack.len() <= self.floor() {
            return fail("the stack is empty");
        }
        self.stack.pop().map_or_else(|| fail("the stack is empty"), Ok)
    }

    fn pop_many(&mut self, n: usize) -> Result<Vec<Value<'a>>> {
        match self.stack.len().checked_sub(n).filter(|&start| start >= self.floor()) {
            Some(start) => Ok(self.stack.split_off(start)),
            None => fail("the stack is empty"),
        }
    }

    fn pop_mark(&mut self) -> Result<Vec<Value<'a>>> {
        match self.marks.pop().filter(|&mark| mark <= self.stack.len()) {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => fail("no mark"),
        }
    }

    fn top(&self) -> Result<Value<'a>> {
        self.stack.last().copied().map_or_else(|| fail("the stack is empty"), Ok)
    }

    fn list(&mut self) -> Result<&mut Vec<Value<'a>>> {
        match self.top()? {
            Value::Node(index) => match self.nodes.get_mut(index) {
                Some(Node::List(items)) => Ok(items),
                _ => fail("expected a list to append to"),
            },
            _ => fail("expected a list to append to"),
        }
    }

    fn dict(&mut self) -> Result<&mut Vec<(Value<'a>, Value<'a>)>> {
        match self.top()? {
            Value::Node(index) => match self.nodes.get_mut(index) {
                Some(Node::Dict(items)) => Ok(items),
                _ => fail("expected a dict to set items of"),
            },
            _ => fail("expected a dict to set items of"),
        }
    }

    fn set_items(&mut self) -> Result<()> {
        let items = self.pop_mark()?;
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return fail("SETITEMS: expected keys and values in pairs");
        }
        self.dict()?.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    fn memoize(&mut self, key: u32) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&mut self, key: u32) -> Result<()> {
        match self.memo.get(&key) {
            Some(&value) => {
                self.push(value);
                Ok(())
            }
            None => fail(format_args!("memo {key} was never set")),
        }
    }

    fn global(&mut self, module: &str, name: &str) -> Result<()> {
        let known = GLOBALS.iter().find(|(m, n, _)| *m == module && *n == name);
        let Some((_, _, global)) = known else {
            let allowed: Vec<_> =
                GLOBALS.iter().map(|(module, name, _)| format!("{module}.{name}")).collect();
            return fail(format_args!(
                "the pickle asks for {}, which is refused; allowed are {}",
                shown(&format!("{module}.{name}")),
                allowed.join(", ")
            ));
        };
        self.push(Value::Global(*global));
        Ok(())
    }

    fn tuple(&self, value: Value<'a>) -> Option<&[Value<'a>]> {
        match value {
            Value::Node(index) => match self.nodes.get(index) {
                Some(Node::Tuple(items)) => Some(items),
                _ => None,
            },
            _ => None,
        }
    }

    /// `("storage", class, key, device, length)`: a record of the archive.
    fn persistent(&mut self) -> Result<()> {
        let id = self.pop()?;
        let Some(
            &[
                Value::Str("storage"),
                Value::Global(Global::Storage(dtype)),
                Value::Str(key),
                _,
                Value::Int(length),
            ],
        ) = self.tuple(id)
        else {
            return fail("a persistent id is not a storage of numbers that are read");
        };
        let Ok(length) = usize::try_from(length) else {
            return fail(format_args!("a storage of {length} numbers"));
        };
        self.push_node(Node::Storage(Storage { dtype, key, length }));
        Ok(())
    }

    fn reduce(&mut self) -> Result<()> {
        let (arguments, callable) = (self.pop()?, self.pop()?);
        let Some(arguments) = self.tuple(arguments) else {
            return fail("REDUCE: expected a tuple of arguments");
        };
        match (callable, arguments) {
            (Value::Global(Global::OrderedDict), []) => self.push_node(Node::Dict(Vec::new())),
            (Value::Global(Global::OrderedDict), &[Value::Node(pairs)]) => {
                let pairs = self.pairs(pairs)?;
                self.copied += pairs.len();
                self.push_node(Node::Dict(pairs));
            }
            (Value::Global(Global::RebuildParameter), &[data, ..]) => self.push(data),
            (
                Value::Global(Global::RebuildTensor),
                &[Value::Node(storage), Value::Int(offset), shape, strides, ..],
            ) => {
                let Some(&Node::Storage(storage)) = self.nodes.get(storage) else {
                    return fail("_rebuild_tensor_v2: expected a storage");
                };
                let (shape, strides) = (self.sizes(shape)?, self.sizes(strides)?);
                let Ok(offset) = usize::try_from(offset) else {
                    return fail(format_args!("_rebuild_tensor_v2: offset {offset}"));
                };
                self.push_node(Node::Tensor(Tensor { storage, offset, shape, strides }));
            }
            _ => return fail("REDUCE: these arguments are not a dict's, tensor's or parameter's"),
        }
        Ok(())
    }

    /// The pairs of a list of pairs.
    fn pairs(&self, list: usize) -> Result<Vec<(Value<'a>, Value<'a>)>> {
        let Some(Node::List(items)) = self.nodes.get(list) else {
            return fail("OrderedDict: expected a list of pairs");
        };
        let pair = |&item: &Value<'a>| match item {
            Value::Node(index) => match self.nodes.get(index) {
                Some(Node::Tuple(pair) | Node::List(pair)) => match pair[..] {
                    [key, value] => Ok((key, value)),
                    _ => fail("OrderedDict: expected pairs"),
                },
                _ => fail("OrderedDict: expected pairs"),
            },
            _ => fail("OrderedDict: expected pairs"),
        };
        items.iter().map(pair).collect()
    }

    fn sizes(&self, value: Value<'a>) -> Result<Vec<usize>> {
        let Some(items) = self.tuple(value) else {
            return fail("_rebuild_tensor_v2: expected a tuple of sizes");
        };
        if items.len() > MOST_AXES {
            return fail(format_args!("_rebuild_tensor_v2: a tensor of {} axes", items.len()));
        }
        let size = |item: &Value<'a>| match *item {
            Value::Int(n) => {
                usize::try_from(n).or_else(|_| fail(format_args!("_rebuild_tensor_v2: size or stride {n}")))
            }
            _ => fail("_rebuild_tensor_v2: a size that is no number"),
        };
        items.iter().map(size).collect()
    }

    /// Attributes of a state dict (`_metadata`) and of tensors mean nothing here.
    fn build(&mut self) -> Result<()> {
        self.pop()?;
        match self.top()? {
            Value::Node(index) if matches!(self.nodes.get(index), Some(Node::Dict(_) | Node::Tensor(_))) => {
                Ok(())
            }
            _ => fail("BUILD: expected a dict or a tensor"),
        }
    }
}
