//! What is done to made texts before they are measured.

use crate::task::FilterStep;
use crate::template::python_space;
use opt_core::{Error, ErrorKind, Result};
use regex::Regex;

/// Applies the steps of a filter to a text.
pub(crate) fn apply(steps: &[FilterStep], text: &str) -> Result<String> {
    let mut text = text.to_owned();
    for step in steps {
        text = match step {
            FilterStep::RemoveWhitespace => text.trim_matches(python_space).to_owned(),
            FilterStep::Lowercase => text.to_lowercase(),
            FilterStep::Uppercase => text.to_uppercase(),
            FilterStep::TakeFirst => text,
            FilterStep::Regex { pattern, group_select, fallback } => {
                let regex = Regex::new(pattern).map_err(|_| {
                    Error::new(ErrorKind::Config, format_args!("pattern {pattern:?} cannot be read"))
                })?;
                find(&regex, &text, *group_select).unwrap_or_else(|| fallback.clone())
            }
        };
    }
    Ok(text)
}

/// The match of an index, from the end if it is negative: the first group that found something, all of it where there
/// are no groups.
fn find(regex: &Regex, text: &str, select: i64) -> Option<String> {
    let all: Vec<regex::Captures<'_>> = regex.captures_iter(text).collect();
    let index = if select < 0 {
        all.len().checked_sub(usize::try_from(-select).ok()?)?
    } else {
        usize::try_from(select).ok()?
    };
    let found = all.get(index)?;
    let part = if found.len() == 1 {
        found.get(0)
    } else if found.len() == 2 {
        // Python's findall gives an empty text for one group that took no part.
        return Some(found.get(1).map_or("", |m| m.as_str()).trim_matches(python_space).to_owned());
    } else {
        found.iter().skip(1).flatten().find(|group| !group.is_empty())
    };
    part.map(|part| part.as_str().trim_matches(python_space).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_finds_what_python_finds() {
        let regex = |pattern: &str, group_select| FilterStep::Regex {
            pattern: pattern.to_owned(),
            group_select,
            fallback: "[invalid]".to_owned(),
        };
        let text = "The sum is 12. So #### 1,204 or #### 7 ";
        for (pattern, select, expected) in [
            (r"#### (\-?[0-9\.\,]+)", 0, "1,204"),
            (r"#### (\-?[0-9\.\,]+)", -1, "7"),
            (r"#### (\-?[0-9\.\,]+)", 5, "[invalid]"),
            (r"(sum)|(So)", 1, "So"),
            (r"sum is \d+", 0, "sum is 12"),
            (r"nothing", 0, "[invalid]"),
        ] {
            assert_eq!(apply(&[regex(pattern, select)], text).unwrap(), expected, "{pattern}");
        }
        assert_eq!(apply(&[FilterStep::RemoveWhitespace, FilterStep::Uppercase], " a ").unwrap(), "A");
    }
}
