use ndarray::{Array2, ArrayView2, Axis};
use serde::{Deserialize, Serialize};
use std::{fmt, ops::Range};

/// How hidden states of a sequence become one vector, as sentence-transformers' `Pooling` does it. All tokens count
/// that a sequence is run with, what the tokenizer puts in front included; virtual tokens of an adapter do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pooling {
    /// All tokens alike.
    #[default]
    Mean,
    /// Token i of n (from 1) counts i: SGPT's (arXiv 2202.08904), since later tokens of a decoder have seen more.
    WeightedMean,
    /// The last token alone: the only one that has seen all others.
    LastToken,
    /// The largest value in each dimension.
    Max,
    /// The first token alone (`cls`). In a decoder it has seen nothing but itself: with a BOS in front it is the same
    /// vector for every text.
    FirstToken,
    /// No pooling: a vector for each token.
    None,
}

impl Pooling {
    /// What each of `len` tokens counts, together 1; `None` for [`Pooling::Max`] and [`Pooling::None`], which are no
    /// weighted sums.
    ///
    /// ```
    /// use opt_core::embedding::Pooling;
    /// assert_eq!(Pooling::WeightedMean.weights(3), Some(vec![1.0 / 6.0, 2.0 / 6.0, 3.0 / 6.0]));
    /// assert_eq!(Pooling::Max.weights(3), None);
    /// ```
    pub fn weights(self, len: usize) -> Option<Vec<f32>> {
        let count = len as f32;
        let one = |is: bool| f32::from(u8::from(is));
        let of = |i: usize| match self {
            Self::Mean => Some(count.recip()),
            Self::WeightedMean => Some((i + 1) as f32 / (count * (count + 1.0) / 2.0)),
            Self::LastToken => Some(one(i + 1 == len)),
            Self::FirstToken => Some(one(i == 0)),
            Self::Max | Self::None => None,
        };
        // Of no tokens too it is known whether they would be weighed.
        of(0).and_then(|_| (0..len).map(of).collect())
    }

    /// Pools the states `[tokens, width]` of one sequence: `[1, width]`, or all of them for [`Pooling::None`]. Sums are
    /// made in f64, in the order of tokens. Of no tokens nothing comes, `[0, width]`.
    ///
    /// ```
    /// use ndarray::array;
    /// use opt_core::embedding::Pooling;
    ///
    /// let states = array![[1.0, 8.0], [2.0, 5.0], [9.0, 2.0]];
    /// assert_eq!(Pooling::Mean.pool(states.view()), array![[4.0, 5.0]]);
    /// assert_eq!(Pooling::WeightedMean.pool(states.view()), array![[32.0 / 6.0, 4.0]]);
    /// assert_eq!(Pooling::Max.pool(states.view()), array![[9.0, 8.0]]);
    /// assert_eq!(Pooling::LastToken.pool(states.view()), array![[9.0, 2.0]]);
    /// ```
    pub fn pool(self, states: ArrayView2<'_, f32>) -> Array2<f32> {
        let (count, width) = states.dim();
        let row = |row: usize| states.slice(ndarray::s![row..row + 1, ..]).to_owned();
        match self {
            _ if count == 0 => Array2::zeros((0, width)),
            Self::None => states.to_owned(),
            Self::FirstToken => row(0),
            Self::LastToken => row(count - 1),
            Self::Max => {
                // A value that is no number stays one, so that it shows.
                let larger = |a: f32, b: f32| if b > a || b.is_nan() { b } else { a };
                states.fold_axis(Axis(0), f32::NEG_INFINITY, |a, b| larger(*a, *b)).insert_axis(Axis(0))
            }
            Self::Mean | Self::WeightedMean => {
                let weighs = |i: usize| if self == Self::Mean { 1.0 } else { (i + 1) as f64 };
                let mut sum = vec![0f64; width];
                for (i, state) in states.outer_iter().enumerate() {
                    let weight = weighs(i);
                    sum.iter_mut().zip(state).for_each(|(sum, value)| *sum += weight * f64::from(*value));
                }
                let total: f64 = (0..count).map(weighs).sum();
                Array2::from_shape_fn((1, width), |(_, i)| sum.get(i).map_or(0.0, |sum| (sum / total) as f32))
            }
        }
    }

    /// The row that is the pooled one of these, where it is one of them.
    pub(crate) fn row(self, rows: &Range<usize>) -> Option<usize> {
        match self {
            Self::LastToken => rows.end.checked_sub(1).filter(|last| rows.contains(last)),
            Self::FirstToken => Some(rows.start).filter(|first| rows.contains(first)),
            Self::None => None,
            // Of one token all are the same.
            Self::Mean | Self::WeightedMean | Self::Max => Some(rows.start).filter(|_| rows.len() == 1),
        }
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mean => "mean",
            Self::WeightedMean => "weighted mean",
            Self::LastToken => "last token",
            Self::Max => "max",
            Self::FirstToken => "first token",
            Self::None => "none",
        })
    }
}
