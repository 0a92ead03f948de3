use crate::{Error, ErrorKind, Result};

/// Cuts the tokens of a calibration text into sequences of `length` tokens, at most `most` of them, spread evenly over
/// the text; what is left at the end is dropped.
///
/// # Errors
/// [`ErrorKind::Prompt`] if there are fewer tokens than one sequence takes, [`ErrorKind::Option`] for a length or number
/// of 0.
pub fn calibration_sequences(ids: &[u32], length: usize, most: usize) -> Result<Vec<Vec<u32>>> {
    if length == 0 || most == 0 {
        let message = "calibration: expected sequences of at least one token, and at least one of them";
        return Err(Error::new(ErrorKind::Option, message));
    }
    if ids.len() < length {
        let message = format_args!(
            "calibration text: expected at least {length} tokens (one full sequence), found {}",
            ids.len()
        );
        return Err(Error::new(ErrorKind::Prompt, message));
    }
    let all = ids.len() / length;
    let count = all.min(most);
    // Chunk i * all / count: the first chunk, and then equally far apart.
    let chunks = (0..count).filter_map(|i| ids.chunks_exact(length).nth(i * all / count));
    Ok(chunks.map(<[u32]>::to_vec).collect())
}
