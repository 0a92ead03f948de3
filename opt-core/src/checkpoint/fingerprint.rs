use super::Checkpoint;
use crate::Result;

/// Stretches of a tensor that are looked at, and the bytes of each.
const STRETCHES: usize = 64;
const STRETCH: usize = 64;

impl Checkpoint {
    /// Eight hexadecimal digits that tell these weights from others: a CRC-32 of the tensors' names, number formats and
    /// shapes, and of 64 stretches of 64 bytes of each, evenly spaced with its first and last bytes among them.
    ///
    /// Training moves nearly every number of a tensor, so that what is skipped is no loss; the largest checkpoints take
    /// milliseconds. The same numbers in another number format are other weights here.
    ///
    /// # Errors
    /// Those of reading a tensor.
    pub(crate) fn fingerprint(&self) -> Result<String> {
        let mut crc = crc32fast::Hasher::new();
        for info in self.tensors() {
            crc.update(format!("{} {} {:?}\n", info.name, info.dtype, info.shape).as_bytes());
            let tensor = self.read(info)?;
            stretches(tensor.bytes()).for_each(|stretch| crc.update(stretch));
        }
        Ok(format!("{:08x}", crc.finalize()))
    }
}

fn stretches(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let last = bytes.len().saturating_sub(STRETCH);
    let place = move |i: usize| (last as u64 * i as u64 / (STRETCHES as u64 - 1)) as usize;
    (0..STRETCHES).filter_map(move |i| bytes.get(place(i)..bytes.len().min(place(i) + STRETCH)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::array_bytes;
    use ndarray::Array2;

    fn checkpoint(name: &str, values: &[f32]) -> Checkpoint {
        let config = r#"{"model_type": "opt"}"#;
        let values = Array2::from_shape_vec((1, values.len()), values.to_vec()).expect("a row");
        let file = array_bytes(&[(name.to_owned(), vec![1, values.ncols()], values)]).expect("it is written");
        Checkpoint::from_bytes(config, vec![file]).expect("it is read")
    }

    #[test]
    fn it_tells_weights_apart() {
        let values: Vec<f32> = (0..5000).map(|i| i as f32).collect();
        let of = |name: &str, values: &[f32]| checkpoint(name, values).fingerprint().expect("it is read");
        let found = of("embed_tokens.weight", &values);
        assert_eq!((found.len(), &found), (8, &of("embed_tokens.weight", &values)));
        assert_ne!(found, of("lm_head.weight", &values));
        assert_ne!(found, of("embed_tokens.weight", &values[1..]));
        for changed in [0, 4999] {
            let mut other = values.clone();
            other[changed] += 0.5;
            assert_ne!(found, of("embed_tokens.weight", &other), "number {changed}");
        }
        let other: Vec<f32> = values.iter().map(|value| value + 0.01).collect();
        assert_ne!(found, of("embed_tokens.weight", &other));
    }

    #[test]
    fn stretches_cover_what_is_short_and_both_ends_of_what_is_long() {
        let bytes: Vec<u8> = (0..=255).cycle().take(100_001).collect();
        let all: Vec<&[u8]> = stretches(&bytes).collect();
        assert_eq!(all.len(), STRETCHES);
        assert!(all.iter().all(|stretch| stretch.len() == STRETCH));
        assert_eq!((all[0], all[STRETCHES - 1]), (&bytes[..STRETCH], &bytes[bytes.len() - STRETCH..]));
        assert!(stretches(&bytes[..5]).all(|stretch| *stretch == bytes[..5]));
        assert!(stretches(&[]).all(<[u8]>::is_empty));
    }
}
