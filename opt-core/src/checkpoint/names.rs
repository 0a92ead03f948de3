//! Tensor names: what the files of different libraries call the same tensor.

/// Wrappers that put a prefix before every name: PEFT, DataParallel, BLIP-2, torch.compile, Flax.
const WRAPPERS: [&str; 5] = ["base_model.model.", "module.", "language_model.", "_orig_mod.", "params."];

/// Names that metaseq's checkpoints use for what transformers calls otherwise.
const METASEQ: [(&str, &str); 5] = [
    ("output_projection.weight", "lm_head.weight"),
    ("project_in_dim.weight", "project_in.weight"),
    ("project_out_dim.weight", "project_out.weight"),
    ("layer_norm.weight", "final_layer_norm.weight"),
    ("layer_norm.bias", "final_layer_norm.bias"),
];

/// The canonical name, without prefix, of a tensor of the decoder (`layers.0.fc1.weight`) and of the LM head;
/// any other name as it is. `None` for what is no tensor of the model at all.
pub(super) fn canonical(stored: &str) -> Option<&str> {
    let mut name = stored;
    while let Some(rest) = WRAPPERS.iter().find_map(|prefix| name.strip_prefix(prefix)) {
        name = rest;
    }
    if name.starts_with("lm_head.") {
        return Some(name);
    }
    let Some(inner) = name.strip_prefix("model.").unwrap_or(name).strip_prefix("decoder.") else {
        return Some(if is_bare(name) { name } else { stored });
    };
    if inner == "version" {
        return None;
    }
    Some(METASEQ.iter().find(|(theirs, _)| *theirs == inner).map_or(inner, |(_, ours)| *ours))
}

/// Whether a name without `decoder.` is one of the decoder's.
fn is_bare(name: &str) -> bool {
    ["layers.", "embed_", "project_", "final_layer_norm."].iter().any(|prefix| name.starts_with(prefix))
}

/// The name under which `OPTForCausalLM` stores a canonical tensor.
pub(super) fn full(canonical: &str) -> String {
    if canonical.starts_with("lm_head.") {
        canonical.to_owned()
    } else {
        format!("model.decoder.{canonical}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_publisher_s_name_is_the_same_tensor() {
        for prefix in ["", "model.", "module.model.", "base_model.model.model.", "language_model.model."] {
            let name = format!("{prefix}decoder.layers.3.fc1.weight");
            assert_eq!(canonical(&name), Some("layers.3.fc1.weight"), "{name}");
        }
        assert_eq!(canonical("language_model.lm_head.weight"), Some("lm_head.weight"));
        assert_eq!(canonical("decoder.version"), None);
        assert_eq!(canonical("decoder.layer_norm.bias"), Some("final_layer_norm.bias"));
        // Not the decoder's: left alone, so that it cannot stand in for one of its tensors.
        for name in ["vision_model.encoder.layers.0.fc1.weight", "score.weight", "language_projection.bias"] {
            assert_eq!(canonical(name), Some(name));
        }
    }
}
