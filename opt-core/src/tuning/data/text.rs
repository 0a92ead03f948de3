//! Files read piece by piece: lines, and documents cut where their tokens are not changed by it.

use crate::{
    Error, ErrorKind, Result,
    tokenizer::{Bos, Tokenizer},
};
use std::io::{BufRead, BufReader, Read};

/// The most bytes that are held at once: of a line, a document of several lines, or a text without white space.
const MOST: usize = 64 << 20;

/// A reader of one file's UTF-8, that knows its lines.
pub(super) struct Text<R> {
    reader: BufReader<R>,
    /// Bytes that were read and not handed out.
    held: Vec<u8>,
    /// Lines handed out.
    line: u64,
    /// Bytes read so far.
    pub(super) bytes: u64,
}

impl<R: Read> Text<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader: BufReader::with_capacity(1 << 16, reader), held: Vec::new(), line: 0, bytes: 0 }
    }

    /// The next line with its number, the first of which is 1, and with its line break, which is `\n` where there is
    /// one.
    pub(super) fn line(&mut self) -> Result<Option<(u64, String)>> {
        let mut line = std::mem::take(&mut self.held);
        line.clear();
        let read =
            (&mut self.reader).take(MOST as u64 + 1).read_until(b'\n', &mut line).map_err(cannot_read)?;
        if read == 0 {
            return Ok(None);
        }
        self.line += 1;
        if read > MOST {
            return Err(too_long("a line", self.line));
        }
        let first = self.bytes == 0;
        self.bytes += read as u64;
        let text = std::str::from_utf8(&line).map_err(|e| not_utf8(self.line, &line, e.valid_up_to()))?;
        let text = unix(if first { without_mark(text) } else { text });
        self.held = line;
        Ok(Some((self.line, text)))
    }

    /// Lines up to the next that is blank, and the number of the first of them.
    pub(super) fn paragraph(&mut self) -> Result<Option<(u64, String)>> {
        let mut paragraph: Option<(u64, String)> = None;
        while let Some((number, line)) = self.line()? {
            let blank = line.trim().is_empty();
            match &mut paragraph {
                Some(_) if blank => break,
                None if blank => {}
                Some((first, text)) => {
                    text.push_str(&line);
                    if text.len() > MOST {
                        return Err(too_long("a text", *first));
                    }
                }
                None => paragraph = Some((number, line)),
            }
        }
        Ok(paragraph
            .map(|(first, text)| (first, text.strip_suffix('\n').map_or(text.clone(), str::to_owned))))
    }

    /// The next piece of about `size` bytes, and the number of its first line. Pieces are cut where GPT-2's
    /// pre-tokenizer cuts in any case, so that the tokens of pieces are those of the whole: after a single line break
    /// between words or, should there be none, in front of a single space. The last piece is what remains.
    pub(super) fn piece(&mut self, size: usize) -> Result<Option<(u64, String)>> {
        // At least a byte order mark.
        let mut wanted = size.clamp(4, MOST);
        loop {
            let missing = wanted.saturating_sub(self.held.len()) as u64;
            let first = self.bytes == 0;
            let read = (&mut self.reader).take(missing).read_to_end(&mut self.held).map_err(cannot_read)?;
            self.bytes += read as u64;
            if first && self.held.starts_with("\u{feff}".as_bytes()) {
                self.held.drain(..3);
            }
            let at_end = (read as u64) < missing;
            if self.held.is_empty() {
                return Ok(None);
            }
            let valid = match std::str::from_utf8(&self.held) {
                Ok(text) => text,
                // A character that is cut by the piece's end.
                Err(e) if e.error_len().is_none() && !at_end => {
                    std::str::from_utf8(self.held.get(..e.valid_up_to()).unwrap_or_default())
                        .unwrap_or_default()
                }
                Err(e) => return Err(not_utf8(self.line + 1, &self.held, e.valid_up_to())),
            };
            let cut = match cut(valid) {
                _ if at_end => valid.len(),
                Some(cut) => cut,
                None if wanted < MOST => {
                    wanted = (2 * wanted).min(MOST);
                    continue;
                }
                None => valid.len(),
            };
            let piece = unix(valid.get(..cut).unwrap_or(valid));
            self.held.drain(..cut);
            let number = self.line + 1;
            self.line += piece.bytes().filter(|b| *b == b'\n').count() as u64;
            return Ok(Some((number, piece)));
        }
    }
}

/// The last place where `text` can be cut; see [`Text::piece`].
fn cut(text: &str) -> Option<usize> {
    let solid = |c: Option<char>| c.is_some_and(|c| !c.is_whitespace());
    let between =
        |before: &str, after: &str| solid(before.chars().next_back()) && solid(after.chars().next());
    let line = |(i, _): &(usize, &str)| {
        let (before, after) = text.split_at_checked(*i)?;
        let before = before.strip_suffix('\r').unwrap_or(before);
        between(before, after.get(1..)?).then_some(i + 1)
    };
    let space = |(i, _): &(usize, &str)| {
        let (before, after) = text.split_at_checked(*i)?;
        between(before, after.get(1..)?).then_some(*i)
    };
    let cut = |mark: &'static str, at: &dyn Fn(&(usize, &str)) -> Option<usize>| {
        text.rmatch_indices(mark).find_map(|found| at(&found)).filter(|cut| *cut > 0)
    };
    cut("\n", &line).or_else(|| cut(" ", &space))
}

/// Whether the tokens of a text are those of its pieces: not so where the tokenizer puts a space in front of any text,
/// or makes tokens of several words.
pub(super) fn can_cut(tokenizer: &Tokenizer) -> bool {
    let ids = |text: &str| tokenizer.encode(text, Bos::Never).ok();
    [("the house\n", "stood \"here\"."), ("It's", " a house"), ("\u{201c}So\u{201d}\n", "7 x")].iter().all(
        |(before, after)| {
            let joined = ids(before).zip(ids(after)).map(|(before, after)| [before, after].concat());
            joined.is_some() && joined == ids(&format!("{before}{after}"))
        },
    )
}

fn unix(text: &str) -> String {
    text.replace("\r\n", "\n")
}

/// Without the byte order mark that some editors begin a file with.
fn without_mark(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn cannot_read(error: std::io::Error) -> Error {
    Error::because(ErrorKind::Io, "cannot read", error)
}

fn too_long(what: &str, line: u64) -> Error {
    let message =
        format_args!("line {line}: expected {what} of at most {} MiB, found a longer one", MOST >> 20);
    Error::new(ErrorKind::Prompt, message)
}

/// `from` is the line on which `bytes` begin.
fn not_utf8(from: u64, bytes: &[u8], valid: usize) -> Error {
    let (good, bad) = bytes.split_at(valid.min(bytes.len()));
    let line = from + good.iter().filter(|b| **b == b'\n').count() as u64;
    let found = bad.first().map_or("a character cut short".to_owned(), |b| format!("the byte 0x{b:02x}"));
    Error::new(ErrorKind::Prompt, format_args!("line {line}: expected UTF-8 text, found {found}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str, size: usize) -> Vec<String> {
        let mut reader = Text::new(text.as_bytes());
        std::iter::from_fn(|| reader.piece(size).unwrap().map(|(_, piece)| piece)).collect()
    }

    #[test]
    fn pieces_join_to_the_text_and_are_cut_between_words() {
        let text = "One two\nthree  four\n\nfive\r\nsix \nseven\u{201d}\neight nine";
        for size in 1..60 {
            let pieces = pieces(text, size);
            assert_eq!(pieces.concat(), unix(text));
            for pair in pieces.windows(2) {
                let (before, after) = (&pair[0], &pair[1]);
                let line = before.strip_suffix('\n').is_some_and(|t| !t.ends_with(char::is_whitespace))
                    && !after.starts_with(char::is_whitespace);
                let space = !before.ends_with(char::is_whitespace)
                    && after.strip_prefix(' ').is_some_and(|t| !t.starts_with(char::is_whitespace));
                assert!(line || space, "{before:?} {after:?}");
            }
        }
        assert_eq!(pieces("\u{feff}one two three", 4), ["one", " two", " three"]);
        assert_eq!(pieces("", 4), [""; 0]);
        assert_eq!(pieces("\u{feff}", 4), [""; 0]);
        assert_eq!(pieces("\u{1f600}\u{1f600}", 1), ["\u{1f600}\u{1f600}"]);
    }

    #[test]
    fn lines_and_paragraphs() {
        let mut reader = Text::new("\u{feff}a\r\n\n \nb\nc\n\n".as_bytes());
        let lines: Vec<_> = std::iter::from_fn(|| reader.line().unwrap()).collect();
        let expected = [(1, "a\n"), (2, "\n"), (3, " \n"), (4, "b\n"), (5, "c\n"), (6, "\n")];
        assert_eq!(lines, expected.map(|(n, line)| (n, line.to_owned())));
        let mut reader = Text::new("\n\na\n\n \nb\nc".as_bytes());
        let paragraphs: Vec<_> = std::iter::from_fn(|| reader.paragraph().unwrap()).collect();
        assert_eq!(paragraphs, [(3, "a".to_owned()), (6, "b\nc".to_owned())]);
    }

    #[test]
    fn broken_utf8_is_named_by_its_line() {
        let bytes = b"one\ntwo\nth\xffree\n".as_slice();
        let expected = "line 3: expected UTF-8 text, found the byte 0xff";
        assert_eq!(Text::new(bytes).piece(1000).unwrap_err().to_string(), expected);
        let mut reader = Text::new(bytes);
        let error = loop {
            match reader.line() {
                Ok(line) => assert!(line.is_some()),
                Err(error) => break error,
            }
        };
        assert_eq!(error.to_string(), expected);
        // Cut short by the file's end.
        assert!(Text::new(b"one\xe2\x80".as_slice()).piece(100).is_err());
        let mut small = Text::new(bytes);
        let error = loop {
            match small.piece(2) {
                Ok(piece) => assert!(piece.is_some()),
                Err(error) => break error,
            }
        };
        assert_eq!(error.to_string(), expected);
    }
}
