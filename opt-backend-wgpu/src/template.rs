//! A small preprocessor for WGSL: variants of a shader are text, so that each compiles to what it needs and no more.
//!
//! Lines: `#if NAME`, `#else`, `#endif` (a name is true if it is defined and not 0); `#include NAME`;
//! `#repeat i N` ... `#end`, once for each i below N, with `$i` replaced; it may hold any other lines, itself among
//! them. Anywhere else `$NAME` is replaced by what is defined. Names are upper case, counters one lower-case letter.

use std::{collections::BTreeMap, fmt::Write};

/// What a variant defines.
pub(crate) type Defines = BTreeMap<&'static str, String>;

/// The text of a shader under `defines`, or what is wrong with it.
pub(crate) fn expand(
    source: &str,
    defines: &Defines,
    include: &dyn Fn(&str) -> Option<&'static str>,
) -> Result<String, String> {
    let mut out = String::with_capacity(source.len());
    expand_lines(&mut source.lines(), defines, &mut Vec::new(), include, &mut out)?;
    Ok(out)
}

/// Counters of the repetitions that a line lies in, and where they are.
type Counters<'a> = Vec<(&'a str, usize)>;

fn expand_lines<'a>(
    lines: &mut dyn Iterator<Item = &'a str>,
    defines: &Defines,
    counters: &mut Counters<'a>,
    include: &dyn Fn(&str) -> Option<&'static str>,
    out: &mut String,
) -> Result<(), String> {
    // For each open #if whether its lines count.
    let mut open: Vec<bool> = Vec::new();
    while let Some(line) = lines.next() {
        let mut words = line.split_whitespace();
        let directive = words.next().filter(|word| word.starts_with('#'));
        let name = words.next().unwrap_or_default();
        let counts = open.iter().all(|counts| *counts);
        match directive {
            Some("#if") => open.push(defines.get(name).is_some_and(|value| value != "0")),
            Some("#else") => match open.last_mut() {
                Some(last) => *last = !*last,
                None => return Err("#else without #if".into()),
            },
            Some("#endif") => {
                open.pop().ok_or("#endif without #if")?;
            }
            Some("#include") if counts => {
                let text = include(name).ok_or_else(|| format!("nothing named {name} to include"))?;
                expand_lines(&mut text.lines(), defines, &mut Vec::new(), include, out)?;
            }
            Some("#repeat") => {
                let body = body(lines);
                if counts {
                    let times = words.next().unwrap_or_default();
                    let mut count = String::new();
                    substitute(times, defines, counters, &mut count)?;
                    let count: usize =
                        count.trim().parse().map_err(|_| format!("cannot repeat {times} times"))?;
                    for i in 0..count {
                        counters.push((name, i));
                        expand_lines(&mut body.iter().copied(), defines, counters, include, out)?;
                        counters.pop();
                    }
                }
            }
            Some("#include") => {}
            Some(unknown) => return Err(format!("unknown directive {unknown}")),
            None if counts => substitute(line, defines, counters, out)?,
            None => {}
        }
    }
    if open.is_empty() { Ok(()) } else { Err("#if without #endif".into()) }
}

/// The lines up to the `#end` that belongs to a `#repeat`.
fn body<'a>(lines: &mut dyn Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut open = 1_usize;
    lines
        .take_while(|line| {
            match line.split_whitespace().next() {
                Some("#repeat") => open += 1,
                Some("#end") => open -= 1,
                _ => {}
            }
            open > 0
        })
        .collect()
}

/// Appends a line with its `$`s replaced.
fn substitute(
    line: &str,
    defines: &Defines,
    counters: &Counters<'_>,
    out: &mut String,
) -> Result<(), String> {
    let mut parts = line.split('$');
    out.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let letter = part.chars().next().unwrap_or(' ');
        if letter.is_ascii_lowercase() {
            match counters.iter().rfind(|(name, _)| name.starts_with(letter)) {
                Some((_, i)) => {
                    let _ = write!(out, "{i}{}", &part[1..]);
                }
                None => return Err(format!("no counter {letter} in {line:?}")),
            }
        } else {
            let end = part.find(|c: char| !c.is_ascii_uppercase() && c != '_').unwrap_or(part.len());
            let (name, rest) = part.split_at(end);
            let value = defines.get(name).ok_or_else(|| format!("{name:?} is not defined in {line:?}"))?;
            out.push_str(value);
            out.push_str(rest);
        }
    }
    out.push('\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(source: &str) -> Result<String, String> {
        let defines = Defines::from([("N", "2".into()), ("ON", "1".into()), ("OFF", "0".into())]);
        expand(source, &defines, &|name| (name == "other").then_some("included $N"))
    }

    #[test]
    fn directives() {
        let text = run(
            "#if ON\na $Nu\n#else\nb\n#endif\n#if OFF\nc\n#endif\n#include other\n#repeat i $N\nx$i\n#end",
        );
        assert_eq!(text.as_deref(), Ok("a 2u\nincluded 2\nx0\nx1\n"));
        let text = run("#repeat i $N\n#if ON\n#repeat j 2\nx$i$j\n#end\n#endif\n#end\ny");
        assert_eq!(text.as_deref(), Ok("x00\nx01\nx10\nx11\ny\n"));
    }

    #[test]
    fn mistakes_are_named() {
        for (source, expected) in [
            ("$MISSING", "MISSING"),
            ("#if ON", "#endif"),
            ("#endif", "#if"),
            ("#include nothing", "nothing"),
            ("$i", "counter"),
            ("#what", "#what"),
        ] {
            let error = run(source).expect_err(source);
            assert!(error.contains(expected), "{source}: {error}");
        }
    }
}
