//! The language of tasks: Jinja as lm-evaluation-harness uses it, Python's methods on strings and lists included.
//!
//! A *template* is text with `{{ … }}` in it and gives text; an *expression* is what stands between such braces and
//! gives a value: `choices.label.index(answerKey)`.

use minijinja::{
    Environment, Error as JinjaError, ErrorKind as JinjaErrorKind, State, UndefinedBehavior, Value,
    syntax::SyntaxConfig,
};
use opt_core::{Error, ErrorKind, Result};
use regex::Regex;

/// An environment with the harness' manners: what is not there is an error, a last line break stays.
pub(crate) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_undefined_behavior(UndefinedBehavior::Strict);
    env.set_syntax(SyntaxConfig::builder().keep_trailing_newline(true).build().unwrap_or_default());
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(method);
    env.add_filter("regex_replace", regex_replace);
    env.add_function("detokenize_wikitext", |text: String| crate::detokenize::wikitext(&text));
    env.add_function("detokenize", |text: String| crate::detokenize::general(&text));
    env.add_function("wikihow", wikihow);
    env.add_function("plain_question", plain_question);
    env.add_function("capitalize_last_sentence", capitalize_last_sentence);
    env
}

/// HellaSwag's texts without what WikiHow left in them; of a text or of each of a list.
fn wikihow(value: Value) -> std::result::Result<Value, JinjaError> {
    let Some(text) = value.as_str() else {
        return value.try_iter()?.map(wikihow).collect();
    };
    let text = text.trim_matches(python_space).replace(" [title]", ". ");
    let mut plain = String::with_capacity(text.len());
    let mut rest = &text[..];
    // What stands in brackets on one line goes.
    while let Some((before, after)) = rest.split_once('[') {
        plain.push_str(before);
        match after.split_once(']').filter(|(inside, _)| !inside.contains('\n')) {
            Some((_, after)) => rest = after,
            None => {
                plain.push('[');
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    Ok(Value::from(plain.replace("  ", " ")))
}

/// A question of the plain format, which may begin with the template's own word.
fn plain_question(query: &str) -> String {
    let query = query.trim_matches(python_space);
    let query = query.strip_prefix("Question:").map_or(query, |rest| rest.trim_start_matches(python_space));
    query.to_owned()
}

/// HellaSwag's `ctx` with what is `ctx_b` in the official file as Python's `capitalize` writes it: all that follows the
/// last end of a sentence. Where `ctx` ends with a sentence `ctx_b` is empty there.
fn capitalize_last_sentence(ctx: &str) -> String {
    if ctx.ends_with(['.', '!', '?']) {
        return ctx.to_owned();
    }
    let cut = [". ", "! ", "? "].iter().filter_map(|mark| ctx.rfind(mark)).max().map_or(0, |at| at + 2);
    match ctx.split_at_checked(cut) {
        Some((before, last)) => format!("{before}{}", capitalize(last)),
        None => ctx.to_owned(),
    }
}

/// Python's `str.capitalize`: the first letter large, all others small.
fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first: String = chars.next().map(char::to_uppercase).into_iter().flatten().collect();
    first + &chars.as_str().to_lowercase()
}

/// Methods that minijinja's own compatibility with Python lacks.
fn method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> std::result::Result<Value, JinjaError> {
    match (name, args) {
        ("index", [wanted]) if value.as_str().is_none() => {
            let mut items = value.try_iter()?;
            let found = items.position(|item| &item == wanted);
            found.map(Value::from).ok_or_else(|| {
                JinjaError::new(JinjaErrorKind::InvalidOperation, format!("{wanted} is not one of {value}"))
            })
        }
        ("index", [wanted]) => {
            let (text, part) = (value.as_str().unwrap_or_default(), wanted.as_str().unwrap_or_default());
            let found = text.find(part).map(|at| text.get(..at).unwrap_or_default().chars().count());
            found.map(Value::from).ok_or_else(|| {
                JinjaError::new(JinjaErrorKind::InvalidOperation, format!("{part:?} is not in {text:?}"))
            })
        }
        // Without an argument Python splits at its own white space, of which there is more than Rust's.
        ("split", []) => {
            let words =
                value.as_str().unwrap_or_default().split(python_space).filter(|word| !word.is_empty());
            Ok(words.map(Value::from).collect())
        }
        ("strip" | "lstrip" | "rstrip", []) => {
            let text = value.as_str().unwrap_or_default();
            Ok(Value::from(match name {
                "strip" => text.trim_matches(python_space),
                "lstrip" => text.trim_start_matches(python_space),
                _ => text.trim_end_matches(python_space),
            }))
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// What Python's `str.isspace` takes for white space.
pub(crate) fn python_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `text | regex_replace(pattern, replacement)`: Python's `re.sub`, with `${1}` for what `\1` is there.
fn regex_replace(text: &str, pattern: &str, replacement: &str) -> std::result::Result<String, JinjaError> {
    let pattern = Regex::new(pattern)
        .map_err(|e| JinjaError::new(JinjaErrorKind::InvalidOperation, format!("regex_replace: {e}")))?;
    Ok(pattern.replace_all(text, replacement).into_owned())
}

/// The first line of what minijinja says, without the name it gives to the text.
pub(crate) fn explain(error: &JinjaError) -> String {
    let detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), |detail| format!("{}: {detail}", error.kind()));
    detail.lines().next().unwrap_or_default().to_owned()
}

/// Renders a template.
pub(crate) fn render(
    env: &Environment<'_>,
    template: &str,
    context: &Value,
) -> std::result::Result<String, JinjaError> {
    env.template_from_str(template)?.render(context)
}

/// Evaluates an expression.
pub(crate) fn evaluate(
    env: &Environment<'_>,
    expression: &str,
    context: &Value,
) -> std::result::Result<Value, JinjaError> {
    env.compile_expression(expression)?.eval(context)
}

/// # Errors
/// [`ErrorKind::Config`] for a template that cannot be read.
pub(crate) fn check_template(env: &Environment<'_>, what: &str, template: &str) -> Result<()> {
    env.template_from_str(template).map(drop).map_err(|e| bad(what, template, &e))
}

/// # Errors
/// [`ErrorKind::Config`] for an expression that cannot be read.
pub(crate) fn check_expression(env: &Environment<'_>, what: &str, expression: &str) -> Result<()> {
    env.compile_expression(expression).map(drop).map_err(|e| bad(what, expression, &e))
}

fn bad(what: &str, source: &str, error: &JinjaError) -> Error {
    Error::new(ErrorKind::Config, format_args!("{what}: {source:?}: {}", explain(error)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use minijinja::context;

    fn text(template: &str, context: Value) -> String {
        render(&environment(), template, &context).unwrap()
    }

    #[test]
    fn templates_of_the_harness_render_as_there() {
        let doc = context! { text => "one two  three", choices => context! { label => ["A", "B"] }, key => "B", ctx_b => "the LADY" };
        assert_eq!(text("{{text.split(' ')[:-1]|join(' ')}}", doc.clone()), "one two ");
        assert_eq!(text("{{' '+text.split(' ')[-1]}}", doc.clone()), " three");
        assert_eq!(text("{{choices.label.index(key)}}", doc.clone()), "1");
        assert_eq!(text("{{ctx_b.capitalize()}}\n", doc.clone()), "The lady\n");
        assert_eq!(text("{{ text | regex_replace('o(.)', '${1}o') }}", doc.clone()), "noe tw o three");
        assert_eq!(text("{{ '\u{1c} a\u{a0}'.strip() }}", doc.clone()), "a");
        let missing = render(&environment(), "{{ nothing }}", &doc).unwrap_err();
        assert!(explain(&missing).contains("undefined"), "{}", explain(&missing));
    }
}
