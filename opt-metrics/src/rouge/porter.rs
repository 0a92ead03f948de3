//! The stemmer of Porter, "An algorithm for suffix stripping" (1980), as NLTK has extended it.

/// Words that the rules would get wrong.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// What Porter's rules leave of an English word, equal to NLTK's `PorterStemmer` in its default mode for words of
/// letters and digits. The word is lowercased first.
///
/// ```
/// use opt_metrics::rouge::stem;
/// assert_eq!(["relational", "hopping", "dies"].map(stem), ["relat", "hop", "die"]);
/// ```
pub fn stem(word: &str) -> String {
    let lower = word.to_lowercase();
    if let Some((_, stem)) = IRREGULAR.iter().find(|(irregular, _)| *irregular == lower) {
        return (*stem).to_owned();
    }
    if word.chars().count() <= 2 {
        return lower;
    }
    let mut word = Word(lower.chars().collect());
    word.plural();
    word.past();
    word.y();
    word.double_suffix();
    word.apply(
        &[
            ("icate", "ic"),
            ("ative", ""),
            ("alize", "al"),
            ("iciti", "ic"),
            ("ical", "ic"),
            ("ful", ""),
            ("ness", ""),
        ],
        |stem| measure(stem) > 0,
    );
    word.single_suffix();
    word.e();
    // NLTK looks at the word less one letter here.
    if word.ends_with("ll") && measure(word.before(1)) > 1 {
        word.0.pop();
    }
    word.0.into_iter().collect()
}

/// Whether each letter is a consonant: neither a, e, i, o, u nor a y after a consonant.
fn consonants(word: &[char]) -> Vec<bool> {
    let mut flags = Vec::with_capacity(word.len());
    for c in word {
        let flag = match c {
            'a' | 'e' | 'i' | 'o' | 'u' => false,
            'y' => !flags.last().copied().unwrap_or(false),
            _ => true,
        };
        flags.push(flag);
    }
    flags
}

/// How often a vowel is followed by a consonant: m in \[C\](VC)^m\[V\].
fn measure(word: &[char]) -> usize {
    consonants(word).array_windows().filter(|[a, b]| !a && *b).count()
}

fn has_vowel(word: &[char]) -> bool {
    consonants(word).contains(&false)
}

/// Whether a word ends in consonant, vowel, consonant, the last none of w, x, y; or is a vowel and a consonant.
fn ends_short(word: &[char]) -> bool {
    match (consonants(word).as_slice(), word) {
        ([false, true], _) => true,
        ([.., true, false, true], [.., last]) => !matches!(last, 'w' | 'x' | 'y'),
        _ => false,
    }
}

struct Word(Vec<char>);

impl Word {
    fn ends_with(&self, suffix: &str) -> bool {
        let mut letters = self.0.iter().rev();
        suffix.chars().rev().all(|c| letters.next() == Some(&c))
    }

    /// All but the last `letters` letters.
    fn before(&self, letters: usize) -> &[char] {
        self.0.get(..self.0.len().saturating_sub(letters)).unwrap_or_default()
    }

    /// What stands before a suffix of ASCII that the word has.
    fn stem_of(&self, suffix: &str) -> &[char] {
        self.before(suffix.len())
    }

    fn replace(&mut self, suffix: &str, by: &str) {
        self.0.truncate(self.0.len().saturating_sub(suffix.len()));
        self.0.extend(by.chars());
    }

    /// Replaces the first suffix of the list that the word has, if the condition holds for what stands before it.
    fn apply(&mut self, rules: &[(&str, &str)], condition: impl Fn(&[char]) -> bool) {
        if let Some((suffix, by)) = rules.iter().find(|(suffix, _)| self.ends_with(suffix))
            && condition(self.stem_of(suffix))
        {
            self.replace(suffix, by);
        }
    }

    /// Step 1a.
    fn plural(&mut self) {
        if self.ends_with("ies") && self.0.len() == 4 {
            self.0.pop();
        } else {
            self.apply(&[("sses", "ss"), ("ies", "i"), ("ss", "ss"), ("s", "")], |_| true);
        }
    }

    /// Step 1b.
    fn past(&mut self) {
        if self.ends_with("ied") {
            let by = if self.0.len() == 4 { "ie" } else { "i" };
            return self.replace("ied", by);
        }
        if self.ends_with("eed") {
            if measure(self.stem_of("eed")) > 0 {
                self.0.pop();
            }
            return;
        }
        let found = ["ed", "ing"].into_iter().find(|s| self.ends_with(s) && has_vowel(self.stem_of(s)));
        let Some(suffix) = found else { return };
        self.replace(suffix, "");
        if ["at", "bl", "iz"].iter().any(|s| self.ends_with(s)) {
            self.0.push('e');
        } else if let [.., a, last] = self.0[..]
            && a == last
            && consonants(&self.0).last() == Some(&true)
        {
            if !matches!(last, 'l' | 's' | 'z') {
                self.0.pop();
            }
        } else if measure(&self.0) == 1 && ends_short(&self.0) {
            self.0.push('e');
        }
    }

    /// Step 1c: only after a consonant that is not the first letter.
    fn y(&mut self) {
        let stem = self.before(1);
        if self.ends_with("y") && stem.len() > 1 && consonants(stem).last() == Some(&true) {
            self.replace("y", "i");
        }
    }

    /// Step 2.
    fn double_suffix(&mut self) {
        // -alli goes first, and what it leaves goes through the step again.
        while self.ends_with("alli") && measure(self.stem_of("alli")) > 0 {
            self.replace("alli", "al");
        }
        const RULES: [(&str, &str); 22] = [
            ("ational", "ate"),
            ("tional", "tion"),
            ("enci", "ence"),
            ("anci", "ance"),
            ("izer", "ize"),
            ("bli", "ble"),
            ("alli", "al"),
            ("entli", "ent"),
            ("eli", "e"),
            ("ousli", "ous"),
            ("ization", "ize"),
            ("ation", "ate"),
            ("ator", "ate"),
            ("alism", "al"),
            ("iveness", "ive"),
            ("fulness", "ful"),
            ("ousness", "ous"),
            ("aliti", "al"),
            ("iviti", "ive"),
            ("biliti", "ble"),
            ("fulli", "ful"),
            // The l belongs to the stem, so that "geologi" is no shorter a stem than "archaeologi".
            ("ogi", "og"),
        ];
        if self.ends_with("ogi") && !self.ends_with("logi") {
            return;
        }
        self.apply(&RULES, |stem| measure(stem) > 0);
    }

    /// Step 4.
    fn single_suffix(&mut self) {
        const SUFFIXES: [&str; 19] = [
            "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou",
            "ism", "ate", "iti", "ous", "ive", "ize",
        ];
        let Some(suffix) = SUFFIXES.iter().find(|s| self.ends_with(s)) else { return };
        let stem = self.stem_of(suffix);
        if measure(stem) > 1 && (*suffix != "ion" || matches!(stem.last(), Some('s' | 't'))) {
            self.replace(suffix, "");
        }
    }

    /// Step 5a.
    fn e(&mut self) {
        let stem = self.before(1);
        let m = measure(stem);
        if self.ends_with("e") && (m > 1 || m == 1 && !ends_short(stem)) {
            self.0.pop();
        }
    }
}
