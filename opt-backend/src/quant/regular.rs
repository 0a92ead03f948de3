use super::{Levels, Quantized, Zeros};
use ndarray::{Array2, Axis, CowArray, Ix2};

/// A quantized weight in the order of a kernel: groups of one size lie one after the other.
///
/// A file may give the inputs of a group anywhere in the row, or a group size that a kernel's step does not divide.
/// Here inputs are reordered (and where need be padded with inputs that read as zero), so that kernels know one case.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Regular<'a> {
    /// The input that each place of a row reads, [`Regular::PADDING`] for none; `None` is all of them in order, and
    /// then a row has as many places as inputs.
    pub inputs: Option<Vec<u32>>,
    /// Codes, `[out, places]`; those of padding are any.
    pub codes: CowArray<'a, u8, Ix2>,
    /// Scales, `[out, places / group]`.
    pub scales: Array2<f32>,
    /// Zero points of the same shape, or one for all. 0 for tables.
    pub zeros: Zeros,
    /// What codes stand for.
    pub levels: Levels,
    /// Places that share a scale: a multiple of the step that was asked for.
    pub group: usize,
}

impl Regular<'_> {
    /// A place that reads no input.
    pub const PADDING: u32 = u32::MAX;

    /// Places of a row.
    pub fn places(&self) -> usize {
        self.codes.ncols()
    }
}

impl Quantized {
    /// The weight with groups of one size, a multiple of `step`.
    ///
    /// # Panics
    /// If `step` is 0.
    pub fn regular(&self, step: usize) -> Regular<'_> {
        let [out, input] = self.shape();
        let groups = self.scales.ncols();
        // The inputs of each group, in ascending order.
        let mut members = vec![Vec::new(); groups];
        (0..input).for_each(|i| members[self.group(i)].push(i as u32));
        let used: Vec<usize> = (0..groups).filter(|g| !members[*g].is_empty()).collect();
        let largest = members.iter().map(Vec::len).max().unwrap_or(0);
        let mut group = largest.next_multiple_of(step).max(step);
        // Where groups differ much, padding all to the largest would be more padding than weight: they are cut into
        // pieces of one step, which have their scale each.
        let in_steps: usize = used.iter().map(|g| members[*g].len().next_multiple_of(step)).sum();
        if used.len() * group > 2 * in_steps {
            group = step;
        }
        let (mut inputs, mut pieces) = (Vec::new(), Vec::new());
        for g in used {
            for piece in members[g].chunks(group) {
                let start = inputs.len();
                inputs.extend_from_slice(piece);
                inputs.resize(start + group, Regular::PADDING);
                pieces.push(g);
            }
        }
        let in_order = inputs.len() == input && inputs.iter().enumerate().all(|(at, i)| *i as usize == at);
        let codes = if in_order {
            CowArray::from(self.codes.view())
        } else {
            let code = |(o, at): (usize, usize)| match inputs[at] {
                Regular::PADDING => 0,
                i => self.codes[[o, i as usize]],
            };
            CowArray::from(Array2::from_shape_fn((out, inputs.len()), code))
        };
        let columns = |values: &Array2<f32>| values.select(Axis(1), &pieces);
        let zeros = match (&self.zeros, self.levels) {
            (_, Levels::Table(_)) => Zeros::Same(0),
            (Zeros::Same(zero), _) => Zeros::Same(*zero),
            (Zeros::Each(zeros), _) => {
                let zeros = zeros.select(Axis(1), &pieces);
                // One for all is less to hold and to read.
                match zeros.first() {
                    Some(first) if zeros.iter().all(|zero| zero == first) => Zeros::Same(*first),
                    _ => Zeros::Each(zeros),
                }
            }
        };
        Regular {
            inputs: (!in_order).then_some(inputs),
            codes,
            scales: columns(&self.scales),
            zeros,
            levels: self.levels,
            group,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Groups;
    use ndarray::array;

    /// What a row is worth as a kernel would read it.
    fn value(regular: &Regular<'_>, inputs: usize) -> Array2<f32> {
        let mut weight = Array2::zeros((regular.codes.nrows(), inputs));
        for ((o, at), &code) in regular.codes.indexed_iter() {
            let input = regular.inputs.as_ref().map_or(at as u32, |inputs| inputs[at]);
            if input == Regular::PADDING {
                continue;
            }
            let zero = match &regular.zeros {
                Zeros::Same(zero) => *zero,
                Zeros::Each(zeros) => zeros[[o, at / regular.group]],
            };
            weight[[o, input as usize]] =
                regular.scales[[o, at / regular.group]] * (f32::from(code) - f32::from(zero));
        }
        weight
    }

    #[test]
    fn is_worth_the_same_in_any_order() {
        let codes = array![[0u8, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13]];
        let scales = array![[0.5, 0.25, 2.0], [1.0, 3.0, 4.0]];
        let zeros = Zeros::Each(array![[8, 7, 3], [0, 16, 2]]);
        let levels = Levels::Integers { bits: 4 };
        let uneven = Groups::Index(vec![0, 0, 0, 2, 0, 0, 1]);
        for groups in [Groups::Runs(3), Groups::Index(vec![2, 0, 1, 0, 2, 2, 1]), uneven] {
            let weight =
                Quantized::new(codes.clone(), scales.clone(), zeros.clone(), levels, groups).unwrap();
            for step in [1, 4, 32] {
                let regular = weight.regular(step);
                assert!(regular.group.is_multiple_of(step) && regular.places().is_multiple_of(regular.group));
                assert_eq!(value(&regular, 7), weight.dequantize());
            }
        }
    }

    #[test]
    fn what_is_regular_stays() {
        let codes = Array2::from_shape_fn((3, 64), |(o, i)| ((o * 64 + i) % 16) as u8);
        let scales = Array2::ones((3, 2));
        let weight = Quantized::new(
            codes.clone(),
            scales,
            Zeros::Same(8),
            Levels::Integers { bits: 4 },
            Groups::Runs(32),
        )
        .unwrap();
        let regular = weight.regular(32);
        assert_eq!((&regular.inputs, regular.codes.view(), regular.group), (&None, codes.view(), 32));
        // One scale a row.
        let scales = Array2::ones((3, 1));
        let weight = Quantized::new(
            weight.codes,
            scales,
            Zeros::Same(8),
            Levels::Integers { bits: 4 },
            Groups::Runs(64),
        )
        .unwrap();
        assert_eq!(weight.regular(32).group, 64);
    }
}
