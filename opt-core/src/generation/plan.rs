use crate::Result;
use ndarray::{ArcArray1, ArcArray2, Array2, Axis};
use opt_backend::TopK;

/// Which of a request's models a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ModelRole {
    /// The model whose text is wanted.
    #[default]
    Target,
    /// The draft model of assisted decoding.
    Assistant,
}

/// What to do next: first the cache operations in order, then all runs together as one batch.
///
/// Each model role has its own list of cache slots. At the start there is one slot, 0, empty.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// Cache operations, in order, before the runs.
    pub cache: Vec<CacheOp>,
    /// Runs; none means that the strategy has finished.
    pub runs: Vec<Run>,
}

/// A change of cache slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheOp {
    /// Slot i becomes what slot `parents[i]` was, and afterwards there are `parents.len()` slots: forks where a
    /// parent is named twice, drops where it is not named.
    Reorder {
        /// Whose slots.
        model: ModelRole,
        /// For each new slot, the old one.
        parents: Vec<usize>,
    },
    /// Keeps the first `len` positions of a slot.
    Truncate {
        /// Whose slot.
        model: ModelRole,
        /// Which slot.
        slot: usize,
        /// Positions to keep.
        len: usize,
    },
}

/// Tokens to append to one slot.
#[derive(Debug, Clone)]
pub struct Run {
    /// For which model.
    pub model: ModelRole,
    /// Which of its slots.
    pub slot: usize,
    /// The tokens to run behind what the slot holds.
    pub tokens: Vec<u32>,
    /// Whether this is the run of the prompt: then the driver may put embeddings in front of (or a restored cache in
    /// place of the first of) `tokens`. The target's first run, and no other, is of exactly the prompt; the draft
    /// model's first run has the tokens that are certain by then behind it.
    pub prompt: bool,
    /// What is to be known of the result.
    pub need: Need,
}

/// What a run must answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Need {
    /// In which form logits are wanted.
    pub scores: ScoreNeed,
    /// Of how many of the run's last tokens (1: the next token's only).
    pub rows: usize,
    /// Whether the last hidden states (what the LM head sees) of *all* the run's tokens are wanted, and of the
    /// embeddings in front of them. What a restored cache stands for cannot be answered: run it again.
    pub hidden: bool,
}

/// In which form logits are wanted: the less, the less has to leave the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ScoreNeed {
    /// None.
    #[default]
    None,
    /// The k largest, with log-sum-exp.
    TopK(usize),
    /// The whole row.
    Full,
}

/// The answer to one run.
#[derive(Debug, Clone, Default)]
pub struct Reply {
    /// One entry per row asked for, in order.
    pub scores: Vec<RowScores>,
    /// `[tokens, width]`, if asked for.
    pub hidden: Option<Array2<f32>>,
}

/// The raw logits of one row.
#[derive(Debug, Clone)]
pub enum RowScores {
    /// The k largest.
    TopK(TopK),
    /// All.
    Full(LogitsRow),
}

/// All logits of a row, `[vocab]`. Rows of one pass share their memory, so that copies cost nothing.
///
/// ```
/// use opt_core::generation::LogitsRow;
///
/// let row = LogitsRow::from(vec![0.5, -1.0]);
/// assert_eq!(row.len(), 2);
/// assert_eq!(row[1], -1.0);
/// ```
#[derive(Debug, Clone)]
pub struct LogitsRow(ArcArray1<f32>);

impl LogitsRow {
    /// The rows of logits `[rows, vocab]`.
    pub(crate) fn each(logits: ArcArray2<f32>) -> impl Iterator<Item = Self> {
        // Rows are handed out as slices.
        let logits = match logits.is_standard_layout() {
            true => logits,
            false => logits.as_standard_layout().into_owned().into_shared(),
        };
        (0..logits.nrows()).map(move |row| Self(logits.clone().index_axis_move(Axis(0), row)))
    }
}

impl From<Vec<f32>> for LogitsRow {
    fn from(row: Vec<f32>) -> Self {
        Self(ArcArray1::from_vec(row))
    }
}

impl std::ops::Deref for LogitsRow {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.0.as_slice().unwrap_or_default()
    }
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FinishReason {
    /// An end token, which is the last id.
    Eos,
    /// The maximal length, or time.
    Length,
    /// A stop string or a criterion of the caller's.
    Stop,
}

/// Another token that could have been chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alternative {
    /// Its id.
    pub id: u32,
    /// Its log-probability under the raw logits.
    pub log_prob: f32,
}

/// A token that is certain (will not be taken back), for streaming.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// Which of the request's sequences.
    pub sequence: usize,
    /// The token.
    pub id: u32,
    /// log softmax of the raw logits at `id`.
    pub log_prob: f32,
    /// The most probable tokens at this place, if asked for.
    pub alternatives: Vec<Alternative>,
    /// Set on a sequence's last token.
    pub finish: Option<FinishReason>,
}

/// One finished sequence.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SequenceOutput {
    /// New tokens, with the eos that was produced and no padding.
    pub ids: Vec<u32>,
    /// For each, log softmax of the raw logits.
    pub log_probs: Vec<f32>,
    /// The beam's score: sum of processed log-probabilities over length^length_penalty. `None` without beams.
    pub score: Option<f32>,
    /// Why it ended.
    pub finish: FinishReason,
    /// For each token the most probable ones, if asked for.
    pub alternatives: Vec<Vec<Alternative>>,
    /// For each token the processed scores `[vocab]`, if asked for.
    pub scores: Vec<Vec<f32>>,
    /// For each token the raw logits `[vocab]`, if asked for.
    pub logits: Vec<Vec<f32>>,
    /// With beams, for each token the index of the beam it was taken from.
    pub beam_indices: Vec<usize>,
}

/// A sequence that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its ids, those of the prompt first.
    pub ids: Vec<u32>,
    /// The target's slot that holds all of them but the last.
    pub slot: usize,
}

/// The decision part of generation for one request. See the module's documentation.
pub trait Strategy: opt_backend::MaybeSend {
    /// What to run next; no runs once finished. Called again only after [`Strategy::advance`].
    fn plan(&mut self) -> Plan;

    /// Takes the answers to the runs of the last plan, in their order.
    ///
    /// # Errors
    /// Those of processors and callbacks of the caller's.
    fn advance(&mut self, replies: Vec<Reply>) -> Result<()>;

    /// Sequences that ended in the last [`Strategy::advance`] while others go on, so that the next plan may drop their
    /// slots: whoever wants to know more of them looks now.
    fn ended(&mut self) -> Vec<Ended> {
        Vec::new()
    }

    /// Tokens that became certain since the last call. Beam search knows none before its end and then gives those of
    /// every returned sequence, one sequence after the other.
    fn take_events(&mut self) -> Vec<TokenEvent>;

    /// Ends the request where it is, as when the time is over: unfinished sequences end with `reason`. May come at any
    /// time; answers to a plan made before are ignored. A sequence's last event bears `reason` only if it has not been
    /// taken yet.
    fn interrupt(&mut self, reason: FinishReason);

    /// The sequences, best first where there are scores. Called once, after the last plan was empty.
    fn finish(&mut self) -> Vec<SequenceOutput>;
}
