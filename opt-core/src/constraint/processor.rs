use super::{Constraint, vocabulary::set};
use crate::{
    Error, ErrorKind, Result,
    generation::{LogitsProcessor, Method, Settings},
};
use llguidance::{Matcher, api::StopReason};
use std::{
    collections::HashMap,
    fmt::Display,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// A request's constraint in its chain of processors.
///
/// It is stateless as far as anyone can see: what it forbids follows from the ids behind the prompt. Where those were
/// met before, or all but the last of them, the matcher that has read them is still there, so that each token is read
/// once, whichever beam or sequence it belongs to.
pub(crate) struct Constrained {
    constraint: Constraint,
    prompt_len: usize,
    eos: Vec<u32>,
    places: Mutex<Places>,
}

/// What may follow some ids.
struct Place {
    /// Has read the ids; `None` where no text can follow.
    matcher: Option<Matcher>,
    /// A bit for each id that may follow.
    mask: Vec<u32>,
    used: u64,
}

/// The places used last, by the ids that lead there.
struct Places {
    places: HashMap<Vec<u32>, Place>,
    /// Of how many uses the places are certain to be kept.
    keep: u64,
    clock: u64,
}

impl Constrained {
    pub(crate) fn new(constraint: &Constraint, settings: &Settings) -> Self {
        let beams = match settings.method {
            Method::Beam { beams } | Method::GroupBeam { beams, .. } => beams,
            _ => 1,
        };
        // A step looks at each sequence's place and makes one behind it. Drafts go a few tokens ahead and back.
        let keep = 2 * beams.max(settings.num_return_sequences) as u64 + 16;
        Self {
            constraint: constraint.clone(),
            prompt_len: settings.prompt_len,
            eos: settings.eos.clone(),
            places: Mutex::new(Places { places: HashMap::new(), keep, clock: 0 }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place behind `ids`, from the nearest one before it that is known.
    fn make(&self, places: &mut Places, ids: &[u32]) -> Result<Place> {
        let known = (0..ids.len()).rev().find_map(|len| {
            let (before, rest) = ids.split_at_checked(len)?;
            Some((places.matcher(before)?, rest))
        });
        // From there, or from the start.
        let (matcher, rest) = known.unwrap_or_else(|| (self.constraint.matcher(), ids));
        match self.read(matcher, rest) {
            Ok(place) => Ok(place),
            // Perhaps the automaton that all share is spent, as it is after too many states: once more with a new one.
            Err(_) => {
                places.places.clear();
                self.read(self.constraint.renewed(), ids)
            }
        }
    }

    /// Reads `rest` and finds what may follow.
    fn read(&self, mut matcher: Matcher, rest: &[u32]) -> Result<Place> {
        let (mut mask, over) = self.constraint.follow(&mut matcher, rest)?;
        // An id is an end wherever the text may end, and else nothing: a request may name any token as its end.
        let last = self.eos.iter().max().map_or(0, |id| *id as usize + 1);
        mask.resize(mask.len().max(last.div_ceil(32)), 0);
        self.eos.iter().for_each(|id| set(&mut mask, *id, over != Over::No));
        Ok(Place { matcher: (over != Over::Must).then_some(matcher), mask, used: 0 })
    }
}

/// Whether a text may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Over {
    No,
    May,
    /// Nothing can follow.
    Must,
}

impl Constraint {
    /// Reads `ids`: the text ids that may follow, as bits, and whether the text may end.
    pub(super) fn follow(&self, matcher: &mut Matcher, ids: &[u32]) -> Result<(Vec<u32>, Over)> {
        let wrong = |what: &str, error: &dyn Display| {
            Error::new(ErrorKind::Option, super::line(&format!("constraint: {what}"), error))
        };
        // Also where there are none: this is what looks whether anything can follow.
        matcher.consume_tokens(ids).map_err(|e| wrong("the ids so far do not fit it", &e))?;
        let may =
            matcher.is_accepting().map_err(|e| wrong("whether the text may end cannot be found", &e))?;
        if matcher.is_stopped() {
            return Ok((Vec::new(), Over::Must));
        }
        let mut mask: Vec<u32> = match matcher.compute_mask() {
            Ok(mask) => mask.into(),
            // Bytes could follow, but no token is made of them.
            Err(e) if e.to_string().starts_with(&StopReason::NoExtensionBias.to_string()) => Vec::new(),
            Err(e) => return Err(wrong("what may follow cannot be found", &e)),
        };
        self.vocabulary().keep_text(&mut mask);
        match (mask.iter().any(|word| *word != 0), may) {
            (true, false) => Ok((mask, Over::No)),
            (true, true) => Ok((mask, Over::May)),
            (false, true) => Ok((mask, Over::Must)),
            (false, false) => {
                let message =
                    "constraint: no token of the vocabulary can follow, and the text may not end here";
                Err(Error::new(ErrorKind::Option, message))
            }
        }
    }
}

impl Places {
    /// A copy of the matcher that has read `ids`.
    fn matcher(&mut self, ids: &[u32]) -> Option<Matcher> {
        self.touch(ids)?.matcher.clone()
    }

    fn touch(&mut self, ids: &[u32]) -> Option<&Place> {
        let place = self.places.get_mut(ids)?;
        self.clock += 1;
        place.used = self.clock;
        Some(place)
    }

    fn insert(&mut self, ids: &[u32], place: Place) {
        self.clock += 1;
        self.places.insert(ids.to_vec(), Place { used: self.clock, ..place });
        // Swept when it has twice as many as it must keep, so that a use costs the same however many there are.
        if self.places.len() as u64 > 2 * self.keep {
            let oldest = self.clock.saturating_sub(self.keep);
            self.places.retain(|_, place| place.used > oldest);
        }
    }
}

impl LogitsProcessor for Constrained {
    fn name(&self) -> &str {
        "prefix_allowed_tokens_fn"
    }

    fn process(&self, ids: &[u32], scores: &mut [f32]) -> Result<()> {
        let produced = ids.get(self.prompt_len..).unwrap_or_default();
        let mut places = self.lock();
        if let Some(place) = places.touch(produced) {
            forbid(&place.mask, scores);
            return Ok(());
        }
        let place = self.make(&mut places, produced)?;
        forbid(&place.mask, scores);
        places.insert(produced, place);
        Ok(())
    }
}

/// Rules out every id without a bit in `mask`, those behind its last word too.
fn forbid(mask: &[u32], scores: &mut [f32]) {
    for (scores, word) in scores.chunks_mut(32).zip(mask.iter().copied().chain(std::iter::repeat(0))) {
        match word {
            0 => scores.fill(f32::NEG_INFINITY),
            u32::MAX => {}
            _ => {
                for (bit, score) in scores.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}
