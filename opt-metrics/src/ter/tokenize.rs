use super::TerOptions;
use crate::{
    bleu::{is_western_punctuation, space_out, split_stops},
    python::split,
};

pub(super) fn tokenize(text: &str, options: &TerOptions) -> Vec<String> {
    let mut text = if options.case_sensitive { text.to_owned() } else { text.to_lowercase() };
    // An empty text stays empty; so it would with the spaces of normalisation.
    if options.normalized {
        text = normalize(&text);
        if options.asian_support {
            text = collect(space_out(&text, is_asian));
            text = collect(space_out(&text, |c| is_asian_punctuation(c) || is_wide_punctuation(c)));
        }
    }
    if options.no_punct {
        text.retain(|c| !".,?:;!\"()".contains(c));
        if options.asian_support {
            text.retain(|c| !is_asian_punctuation(c) && !is_wide_punctuation(c));
        }
    }
    split(&text).map(str::to_owned).collect()
}

fn collect(text: Vec<char>) -> String {
    text.into_iter().collect()
}

fn normalize(text: &str) -> String {
    let mut text = text.replace("\n-", "").replace('\n', " ");
    for (entity, character) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(entity, character);
    }
    let spaced = collect(space_out(&format!(" {text} "), is_western_punctuation)).replace("'s ", " 's ");
    collect(split_stops(&spaced.chars().collect::<Vec<_>>()))
}

/// Characters that are words of their own: CJK ideographs, strokes, radicals and compatibility forms, and all from
/// U+3200 to U+3F22. Tercom means only the enclosed letters up to U+32FF by the last range; sacrebleu has two digits of
/// it the other way round, so extension A's are split twice, which changes nothing. Kana are left together: the
/// expressions that should split them never match text in normalised form, which starts with a space.
fn is_asian(c: char) -> bool {
    matches!(c,
        '\u{4e00}'..='\u{9fff}' | '\u{3400}'..='\u{4dbf}' | '\u{31c0}'..='\u{31ef}' | '\u{2e80}'..='\u{2eff}'
        | '\u{3300}'..='\u{33ff}' | '\u{f900}'..='\u{faff}' | '\u{fe30}'..='\u{fe4f}' | '\u{3200}'..='\u{3f22}')
}

fn is_asian_punctuation(c: char) -> bool {
    matches!(c,
        '\u{3001}' | '\u{3002}' | '\u{3008}'..='\u{3011}' | '\u{3014}'..='\u{301f}' | '\u{ff61}'..='\u{ff65}'
        | '\u{30fb}')
}

fn is_wide_punctuation(c: char) -> bool {
    matches!(
        c,
        '\u{ff0e}'
            | '\u{ff0c}'
            | '\u{ff1f}'
            | '\u{ff1a}'
            | '\u{ff1b}'
            | '\u{ff01}'
            | '\u{ff02}'
            | '\u{ff08}'
            | '\u{ff09}'
    )
}
