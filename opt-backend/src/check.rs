//! Argument checks that backends share, so that the same mistake gets the same line everywhere.

use crate::{Attend, Error, Moments8, Result};
use std::ops::Range;

/// Fails unless `found == expected`.
pub fn width(op: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::shape(op, format_args!("expected rows of width {expected}, found {found}")))
}

/// Fails if an id is not below `entries`.
pub fn ids(op: &'static str, ids: &[u32], entries: usize) -> Result<()> {
    match ids.iter().find(|id| **id as usize >= entries) {
        None => Ok(()),
        Some(id) => Err(Error::shape(op, format_args!("expected ids below {entries}, found {id}"))),
    }
}

/// Fails if a row is not below `available`.
pub fn rows(op: &'static str, rows: &[usize], available: usize) -> Result<()> {
    match rows.iter().find(|row| **row >= available) {
        None => Ok(()),
        Some(row) => Err(Error::shape(op, format_args!("expected rows below {available}, found {row}"))),
    }
}

/// Fails if spans reach past the rows, or the heads do not divide the width.
pub fn spans(op: &'static str, attend: Attend<'_>, shape: [usize; 2]) -> Result<()> {
    let [rows, width] = shape;
    if attend.heads == 0 || width % attend.heads != 0 {
        let message = format_args!("expected a width that {} heads divide, found {width}", attend.heads);
        return Err(Error::shape(op, message));
    }
    match attend.spans.iter().find(|span| span.start.checked_add(span.len).is_none_or(|end| end > rows)) {
        None => Ok(()),
        Some(span) => {
            Err(Error::shape(op, format_args!("expected spans within {rows} rows, found {span:?}")))
        }
    }
}

/// Fails unless there is one cache per span.
pub fn caches(attend: Attend<'_>, caches: usize) -> Result<()> {
    if caches == attend.spans.len() {
        return Ok(());
    }
    let message = format_args!("expected one cache per span, found {caches} for {}", attend.spans.len());
    Err(Error::shape("attend", message))
}

/// Fails unless a cache was made for as many heads as the call has.
pub fn heads(op: &'static str, attend: Attend<'_>, of_cache: usize) -> Result<()> {
    if of_cache == attend.heads {
        return Ok(());
    }
    let message = format_args!("expected caches of {} heads, found {of_cache}", attend.heads);
    Err(Error::shape(op, message))
}

/// Fails unless there is one target a row.
pub fn targets(op: &'static str, targets: &[u32], rows: usize) -> Result<()> {
    if targets.len() == rows {
        return Ok(());
    }
    let message = format_args!("expected one target a row, found {} for {rows} rows", targets.len());
    Err(Error::shape(op, message))
}

/// Fails unless the shapes `[rows, width]` are equal.
pub fn same_shape(op: &'static str, found: [usize; 2], expected: [usize; 2]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::shape(op, format_args!("expected the shape {expected:?}, found {found:?}")))
}

/// Fails unless the tensors of [`Moments8`] have the shapes for a parameter `[rows, width]`.
pub fn moments8(op: &'static str, found: [[usize; 2]; 3], parameter: [usize; 2]) -> Result<()> {
    let expected = Moments8::shapes(parameter);
    found.iter().zip(expected.parts()).try_for_each(|(found, expected)| same_shape(op, *found, *expected))
}

/// Fails unless the vector called `what` has `expected` elements.
pub fn length(op: &'static str, what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::shape(op, format_args!("expected a {what} of {expected} elements, found {found}")))
}

/// Fails unless the range runs forward and ends within the `available` rows.
pub fn range(op: &'static str, range: &Range<usize>, available: usize) -> Result<()> {
    if range.start <= range.end && range.end <= available {
        return Ok(());
    }
    Err(Error::shape(op, format_args!("expected a range within {available} rows, found {range:?}")))
}

/// Fails unless a cache has the layer.
pub fn layer(op: &'static str, layer: usize, layers: usize) -> Result<()> {
    if layer < layers {
        return Ok(());
    }
    Err(Error::shape(op, format_args!("expected a layer below {layers}, found {layer}")))
}
