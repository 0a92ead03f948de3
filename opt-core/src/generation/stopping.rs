use super::{FinishReason, Hooks, Settings};
use opt_backend::{MaybeSend, MaybeSync};
use std::{fmt, sync::Arc};

/// A caller's own reason to stop a sequence.
pub trait StoppingCriterion: MaybeSend + MaybeSync {
    /// Whether the sequence `ids` (prompt and generated) is complete; asked after each new token.
    fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool;
}

/// Decides after each token whether a sequence is complete.
#[derive(Clone)]
pub struct Stopping {
    eos: Vec<u32>,
    max_length: usize,
    prompt_len: usize,
    strings: Option<StopStrings>,
    criteria: Vec<Arc<dyn StoppingCriterion>>,
}

impl Stopping {
    /// The conditions of `settings`, of `stop`, and of the caller's criteria.
    pub fn new(settings: &Settings, stop: Option<StopStrings>, hooks: &Hooks) -> Self {
        Self {
            eos: settings.eos.clone(),
            max_length: settings.max_length,
            prompt_len: settings.prompt_len,
            strings: stop,
            criteria: hooks.criteria.clone(),
        }
    }

    /// Why `ids` (prompt and generated) is complete, `None` if it is not: eos, then stop strings and criteria, then
    /// the length.
    pub fn check(&self, ids: &[u32]) -> Option<FinishReason> {
        if ids.last().is_some_and(|id| self.eos.contains(id)) {
            return Some(FinishReason::Eos);
        }
        let stops = self.strings.as_ref().is_some_and(|s| s.matches(ids))
            || self.criteria.iter().any(|c| c.should_stop(ids, self.prompt_len));
        if stops {
            return Some(FinishReason::Stop);
        }
        (ids.len() >= self.max_length).then_some(FinishReason::Length)
    }
}

impl fmt::Debug for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopping")
            .field("eos", &self.eos)
            .field("max_length", &self.max_length)
            .field("strings", &self.strings)
            .finish_non_exhaustive()
    }
}

/// Texts that end a sequence.
///
/// ```
/// use opt_core::generation::StopStrings;
/// use std::sync::Arc;
///
/// let tokens = ["st", "opera", "tion"].map(|t| t.as_bytes().to_vec());
/// let stop = StopStrings::new(&["stop".to_owned()], Arc::new(tokens.to_vec()));
/// assert!(stop.matches(&[0, 1]));
/// assert!(!stop.matches(&[0, 1, 2]), "the string has to end within the last token");
/// ```
#[derive(Debug, Clone)]
pub struct StopStrings {
    strings: Vec<Vec<u8>>,
    token_bytes: Arc<Vec<Vec<u8>>>,
}

impl StopStrings {
    /// `token_bytes[id]` is what token `id` adds to a text (a special token its own name, as in transformers); ids past
    /// its end add nothing. Empty strings are passed over.
    pub fn new(strings: &[String], token_bytes: Arc<Vec<Vec<u8>>>) -> Self {
        let strings = strings.iter().filter(|s| !s.is_empty()).map(|s| s.as_bytes().to_vec()).collect();
        Self { strings, token_bytes }
    }

    /// Whether one of the strings ends within the last of `ids`; it may begin anywhere before, prompt included.
    ///
    /// This is transformers' `StopStringCriteria`, over bytes instead of characters: a character that is split over
    /// tokens, which cannot match there, matches here.
    pub fn matches(&self, ids: &[u32]) -> bool {
        let Some((&last, before)) = ids.split_last() else { return false };
        let last = self.bytes(last);
        let Some(longest) = self.strings.iter().map(Vec::len).max().filter(|_| !last.is_empty()) else {
            return false;
        };
        // As much of the text before as a match can reach back to.
        let mut tail: Vec<u8> = last.iter().rev().copied().collect();
        for &id in before.iter().rev() {
            if tail.len() >= last.len() + longest - 1 {
                break;
            }
            tail.extend(self.bytes(id).iter().rev());
        }
        tail.reverse();
        let start = tail.len() - last.len();
        self.strings.iter().any(|string| {
            let first = (start + 1).saturating_sub(string.len());
            tail.get(first..).is_some_and(|tail| tail.windows(string.len()).any(|window| window == string))
        })
    }

    fn bytes(&self, id: u32) -> &[u8] {
        self.token_bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        config::OptConfig,
        generation::{Extras, GenerationConfig},
    };
    use std::{fs, path::Path};

    #[test]
    fn stop_strings_match_where_transformers_does() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/stop_strings/cases.json");
        let file: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let texts = |value: &serde_json::Value| -> Vec<String> {
            value.as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_owned()).collect()
        };
        let tokens = Arc::new(texts(&file["tokens"]).into_iter().map(String::into_bytes).collect::<Vec<_>>());
        let (mut stops, mut goes_on) = (0, 0);
        for case in file["cases"].as_array().unwrap() {
            let stop = StopStrings::new(&texts(&case["strings"]), tokens.clone());
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let expected = case["stop"].as_bool().unwrap();
            assert_eq!(stop.matches(&ids), expected, "{case}");
            *(if expected { &mut stops } else { &mut goes_on }) += 1;
        }
        assert!(stops > 200 && goes_on > 200, "{stops} and {goes_on}");
    }

    #[test]
    fn a_split_character_and_unknown_ids() {
        let tokens = vec![vec![0xC3], vec![0xA9, b'x'], Vec::new()];
        let stop = StopStrings::new(&["é".to_owned()], Arc::new(tokens));
        assert!(stop.matches(&[0, 1]));
        assert!(stop.matches(&[0, 9, 2, 1]), "ids without text stand between");
        assert!(
            !stop.matches(&[0, 1, 9])
                && !stop.matches(&[0, 1, 2])
                && !stop.matches(&[0])
                && !stop.matches(&[])
        );
    }

    struct Even;
    impl StoppingCriterion for Even {
        fn should_stop(&self, ids: &[u32], prompt_len: usize) -> bool {
            (ids.len() - prompt_len).is_multiple_of(2)
        }
    }

    #[test]
    fn eos_before_strings_before_length() {
        let model = OptConfig::default();
        let config = GenerationConfig::default().max_new_tokens(3).eos_token_id([2, 5]);
        let settings = config.resolve(&model, &[2, 7], 0, &Extras::default()).unwrap().0;
        let strings =
            StopStrings::new(&["ab".to_owned()], Arc::new([b"a", b"b"].map(|t| t.to_vec()).to_vec()));
        let stopping = Stopping::new(&settings, Some(strings.clone()), &Hooks::default());
        assert_eq!(stopping.check(&[2, 7, 5]), Some(FinishReason::Eos));
        assert_eq!(stopping.check(&[2, 7, 5, 7]), None, "only the last token ends a sequence");
        assert_eq!(stopping.check(&[2, 7, 0, 1]), Some(FinishReason::Stop));
        assert_eq!(stopping.check(&[2, 7, 7, 7, 7]), Some(FinishReason::Length));
        assert_eq!(stopping.check(&[2, 7, 7, 0, 1]), Some(FinishReason::Stop));
        assert_eq!(stopping.check(&[2, 7, 7, 0, 5]), Some(FinishReason::Eos));

        let hooks = Hooks { criteria: vec![Arc::new(Even)], ..Hooks::default() };
        let stopping = Stopping::new(&settings, None, &hooks);
        assert_eq!(stopping.check(&[2, 7, 7]), None);
        assert_eq!(stopping.check(&[2, 7, 7, 7]), Some(FinishReason::Stop));
    }
}
