//! Models from nothing: random weights, and a tokenizer made of the texts that are to be learned.

use super::{
    data::jsonl::{self, Line},
    start::Draws,
};
use crate::{
    Error, ErrorKind, Result,
    checkpoint::{Checkpoint, array_bytes, io},
    config::OptConfig,
    generation::Random,
    tokenizer::{Tokenizer, TokenizerFiles},
};
use ndarray::Array2;
use serde_json::json;
use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};
use tokenizers::{
    AddedToken, TokenizerBuilder,
    decoders::DecoderWrapper,
    models::bpe::{BPE, BpeTrainerBuilder},
    normalizers::NormalizerWrapper,
    pre_tokenizers::{PreTokenizerWrapper, byte_level::ByteLevel},
    processors::{PostProcessorWrapper, template::TemplateProcessing},
};

/// Files that stand beside a model's weights: names and contents.
pub type SideFiles = Vec<(String, Vec<u8>)>;

/// OPT's special tokens, by id.
const SPECIAL: [&str; 4] = ["<s>", "<pad>", "</s>", "<unk>"];

/// A model that has learned nothing, as `OPTForCausalLM(config)` begins: matrices from a normal distribution of
/// deviation `init_std`, biases and the padding token's embedding 0, LayerNorms 1.
///
/// ```
/// use opt_core::{config::OptConfig, tuning::new_model};
///
/// let config = OptConfig::from_json(
///     r#"{"model_type": "opt", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1,
///         "num_attention_heads": 2, "ffn_dim": 64, "max_position_embeddings": 16, "word_embed_proj_dim": 32}"#,
/// )?;
/// let model = new_model(&config, 7)?;
/// assert!(model.validate()?.is_empty());
/// # Ok::<(), opt_core::Error>(())
/// ```
///
/// # Errors
/// [`ErrorKind::Config`] for a config that cannot be meant.
pub fn new_model(config: &OptConfig, seed: u64) -> Result<Checkpoint> {
    let mut tensors = Vec::new();
    for (number, (name, shape)) in config.tensor_shapes().into_iter().enumerate() {
        let (rows, width) = match shape[..] {
            [width] => (1, width),
            [rows, width] => (rows, width),
            _ => continue,
        };
        // Of its own stream, so that a tensor's values do not depend on which others there are.
        let mut draws = Draws(Random::new(seed, 1 << 32 | number as u64));
        let mut values = match (rows, name.ends_with(".weight")) {
            (1, true) if name.contains("layer_norm") => Array2::ones((rows, width)),
            (_, false) => Array2::zeros((rows, width)),
            _ => draws.normal([rows, width], config.init_std),
        };
        if let ("embed_tokens.weight", Some(padding)) = (&name[..], config.pad_token_id) {
            values.outer_iter_mut().skip(padding as usize).take(1).for_each(|mut row| row.fill(0.0));
        }
        tensors.push((name, shape, values));
    }
    let config = serde_json::to_string(config)
        .map_err(|e| Error::because(ErrorKind::Config, "the config cannot be written", e))?;
    Checkpoint::from_bytes(&config, vec![array_bytes(&tensors)?])
}

/// A tokenizer learned from texts: byte-level BPE with OPT's special ids, `</s>` being put in front.
///
/// Files are `.txt`, or `.jsonl` as [`super::data`] reads them, without `ids`. Returns the tokenizer and the files
/// that hold it, by name.
///
/// # Errors
/// [`ErrorKind::Io`] and [`ErrorKind::NotFound`] for files that cannot be read, [`ErrorKind::Tokenizer`] if there are too
/// few tokens for 256 bytes and the special tokens, [`ErrorKind::Prompt`] for lines that are no texts.
pub fn train_tokenizer(files: &[&Path], vocab_size: usize, context: usize) -> Result<(Tokenizer, SideFiles)> {
    let least = 256 + SPECIAL.len();
    if vocab_size < least {
        let message = format_args!(
            "vocab_size: expected at least {least} for a tokenizer of bytes, found {vocab_size}"
        );
        return Err(Error::new(ErrorKind::Tokenizer, message));
    }
    let failed = |e| Error::because(ErrorKind::Tokenizer, "the tokenizer cannot be trained", e);
    let invalid = |e: String| Error::new(ErrorKind::Tokenizer, e);
    let bytes = ByteLevel::new(false, true, true);
    let front = TemplateProcessing::builder()
        .try_single("</s> $A")
        .map_err(invalid)?
        .try_pair("</s> $A $B")
        .map_err(invalid)?
        .special_tokens(vec![("</s>", 2)])
        .build()
        .map_err(|e| invalid(e.to_string()))?;
    let mut tokenizer = TokenizerBuilder::<
        BPE,
        NormalizerWrapper,
        PreTokenizerWrapper,
        PostProcessorWrapper,
        DecoderWrapper,
    >::new()
    .with_model(BPE::default())
    .with_pre_tokenizer(Some(PreTokenizerWrapper::ByteLevel(bytes)))
    .with_post_processor(Some(PostProcessorWrapper::Template(front)))
    .with_decoder(Some(DecoderWrapper::ByteLevel(ByteLevel::default())))
    .build()
    .map_err(failed)?;
    let mut trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.iter().map(|token| AddedToken::from(*token, true)).collect())
        .build();
    let texts: Vec<Texts> = files.iter().map(|path| Texts::open(path)).collect::<Result<_>>()?;
    let mut problem = None;
    let lines = texts.into_iter().flatten().map_while(|line| line.map_err(|e| problem = Some(e)).ok());
    tokenizer.train(&mut trainer, lines).map_err(failed)?;
    if let Some(problem) = problem {
        return Err(problem);
    }
    let json = tokenizer.to_string(false).map_err(failed)?.into_bytes();
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": true, "bos_token": "</s>", "eos_token": "</s>",
        "unk_token": "<unk>", "pad_token": "<pad>", "model_max_length": context,
        "clean_up_tokenization_spaces": false,
    });
    let map = json!({ "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>" });
    let files = vec![
        ("tokenizer.json".to_owned(), json),
        ("tokenizer_config.json".to_owned(), format!("{config:#}\n").into_bytes()),
        ("special_tokens_map.json".to_owned(), format!("{map:#}\n").into_bytes()),
    ];
    let mut parts = TokenizerFiles::default();
    for (name, contents) in &files {
        let contents = Some(contents.clone());
        match &name[..] {
            "tokenizer.json" => parts.tokenizer_json = contents,
            "tokenizer_config.json" => parts.tokenizer_config_json = contents,
            _ => parts.special_tokens_map_json = contents,
        }
    }
    Ok((Tokenizer::from_files(&parts)?, files))
}

/// The texts of a file, line by line: what the splitting into words never joins.
struct Texts {
    lines: BufReader<File>,
    jsonl: bool,
    place: String,
    number: usize,
}

impl Texts {
    fn open(path: &Path) -> Result<Self> {
        let jsonl = path.extension().is_some_and(|extension| extension == "jsonl");
        let lines =
            BufReader::with_capacity(1 << 20, File::open(path).map_err(|e| io("cannot open", path, e))?);
        Ok(Self { lines, jsonl, place: path.display().to_string(), number: 0 })
    }

    fn line(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let read = self.lines.read_line(&mut line);
        self.number += 1;
        let place = format_args!("{}, line {}", self.place, self.number).to_string();
        if read.map_err(|e| Error::because(ErrorKind::Io, &place, e))? == 0 {
            return Ok(None);
        }
        if !self.jsonl || line.trim().is_empty() {
            return Ok(Some(line));
        }
        Ok(Some(match jsonl::parse(&line).map_err(|e| e.at(&place))? {
            Line::Text(text) => text,
            Line::Pair { prompt, completion } => format!("{prompt}\n{completion}"),
            Line::Ids(_) => {
                let message = "expected text to learn a tokenizer from, found ids";
                return Err(Error::new(ErrorKind::Prompt, message).at(place));
            }
        }))
    }
}

impl Iterator for Texts {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Self::Item> {
        self.line().transpose()
    }
}
