//! Adapters, configurations and sizes that cannot be meant, and what is said of them.

use super::*;
use crate::common::tiny::Tiny;
use opt_core::adapter::{AdapterConfig, AdapterMethod, LoraConfig, Names};

#[test]
fn wrong_adapters_are_refused() {
    let config = checkpoint("pre_ln").config().clone();
    let error = adapter("plain").check(checkpoint("vocab_odd").config()).unwrap_err().to_string();
    assert_eq!(
        error,
        "adapter \"plain\": an adapter for another model: tensor \
         base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight: expected shape [4, 20], found [4, 32]"
    );
    let error = adapter("all_linear").check(&config).unwrap_err().to_string();
    assert!(error.contains("target_modules: \"model.decoder.project_in\" is no module"), "{error}");
    let error = adapter("plain").named("x");
    let error = Adapter::new("x", adapter("other").config().clone(), error.tensors().clone()).check(&config);
    assert!(error.unwrap_err().to_string().contains("is missing"));
    let error = adapter("prompt").check(checkpoint("proj_pre").config()).unwrap_err().to_string();
    assert!(error.contains("prompt_embeddings: expected shape [5, 16], found [5, 32]"), "{error}");
    let error = adapter("prefix").check(checkpoint("shape_1.3b").config()).unwrap_err().to_string();
    assert!(error.contains("prompt_embeddings: expected shape [5, 256], found [5, 128]"), "{error}");

    let lora = |names: &[&str]| {
        let mut lora = LoraConfig::default();
        lora.target_modules = Names::list(names.iter().copied());
        AdapterConfig::new(AdapterMethod::Lora(lora))
    };
    let slots = |names: &[&str]| lora(names).slots(&config).map(|slots| slots.len());
    assert_eq!(slots(&["q_proj"]).unwrap(), 4);
    // A list for any OPT model may name what this one lacks.
    assert_eq!(slots(&["q_proj", "project_in"]).unwrap(), 4);
    let error = slots(&["q_prj"]).unwrap_err().to_string();
    assert_eq!(
        error,
        "target_modules: \"q_prj\" is no module of this model; near it are q_proj, k_proj, v_proj"
    );
    let error = slots(&["final_layer_norm"]).unwrap_err().to_string();
    assert!(error.contains("cannot have a low-rank term"), "{error}");
    slots(&[]).unwrap_err();
    slots(&["project_in"]).unwrap_err();
    let error = lora(&["q_proj"]).save(["final_layernorm"]).slots(&config).unwrap_err().to_string();
    assert!(
        error.starts_with("modules_to_save: \"final_layernorm\" is no module")
            && error.contains("final_layer_norm")
    );

    let tensors = adapter("plain").tensors().clone();
    let with = |change: fn(&mut BTreeMap<String, ArrayD<f32>>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        let adapter = Adapter::new("x", adapter("plain").config().clone(), tensors);
        adapter.check(&config).map_err(|e| e.to_string())
    };
    assert!(with(|tensors| drop(tensors.pop_first())).unwrap_err().contains("[4, 32] is missing"));
    let classifier = |tensors: &mut BTreeMap<_, _>| {
        drop(tensors.insert("base_model.model.score.weight".to_owned(), ArrayD::zeros(vec![2, 32])))
    };
    assert!(with(classifier).unwrap()[0].contains("belongs to a head"));
    let infinite = |tensors: &mut BTreeMap<_, ArrayD<f32>>| {
        tensors.first_entry().unwrap().get_mut().fill(f32::INFINITY);
    };
    assert!(with(infinite).unwrap_err().contains("expected finite numbers"));

    let twice =
        Opt::load(model("pre_ln"), backend::load().adapter(adapter("plain")).adapter(folder("plain")));
    assert_eq!(twice.err().unwrap().kind(), ErrorKind::Option);
    let error = Adapter::open(model("pre_ln")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("found no adapter_config.json"), "{error}");
}

#[test]
fn configurations() {
    let read = AdapterConfig::from_json;
    let config =
        read(r#"{"peft_type": "LORA", "something_new": {"a": 1}, "target_modules": "ALL-linear"}"#).unwrap();
    let lora = config.lora().unwrap();
    assert!((lora.r, lora.lora_alpha) == (8, 8.0) && lora.target_modules.is_all_linear());
    for (json, parts) in [
        (
            r#"{"peft_type": "IA3"}"#,
            &["peft_type", "LORA, PREFIX_TUNING, PROMPT_TUNING, P_TUNING", "IA3"][..],
        ),
        ("{}", &["peft_type", "found none"]),
        ("[]", &["expected a JSON object"]),
        ("{", &["adapter_config.json is not usable"]),
        (r#"{"peft_type": "LORA", "r": "x"}"#, &["adapter_config.json: r:"]),
        (r#"{"peft_type": "LORA", "r": 0}"#, &["adapter_config.json: r: expected a rank"]),
        (r#"{"peft_type": "LORA", "bias": "some"}"#, &["adapter_config.json: bias:"]),
        (r#"{"peft_type": "LORA", "layer_replication": [[0, 1]]}"#, &["layer_replication", "not supported"]),
        (r#"{"peft_type": "LORA", "trainable_token_indices": [1]}"#, &["trainable_token_indices"]),
        (
            r#"{"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}"#,
            &["pissa_niter_4", "model's own weights"],
        ),
        (
            r#"{"peft_type": "LORA", "target_modules": "q.*", "layers_to_transform": 1}"#,
            &["layers_to_transform"],
        ),
        (r#"{"peft_type": "LORA", "use_dora": true, "lora_bias": true}"#, &["lora_bias"]),
        (r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 0}"#, &["num_virtual_tokens"]),
        (
            r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "num_transformer_submodules": 2}"#,
            &["num_transformer_submodules"],
        ),
    ] {
        let error = read(json).unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "{json}: {error}"));
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let mut lora = LoraConfig::default();
    lora.target_modules = Names::Pattern("(q_proj".to_owned());
    let error =
        AdapterConfig::new(AdapterMethod::Lora(lora)).slots(&OptConfig::default()).unwrap_err().to_string();
    assert!(error.contains("target_modules: \"(q_proj\" is not a usable regular expression"), "{error}");
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<AdapterConfig>(&text).unwrap(), config);
}

#[test]
fn virtual_tokens_take_room() {
    let tiny = Tiny { context: 24, ..Tiny::default() };
    let config = OptConfig::from_json(&tiny.config()).unwrap();
    for (kind, width) in [("PREFIX_TUNING", 2 * 2 * 32), ("PROMPT_TUNING", 32)] {
        let json = format!(r#"{{"peft_type": "{kind}", "num_virtual_tokens": 10}}"#);
        let tensor =
            ArrayD::from_shape_fn(vec![10, width], |i| ((i[0] * 7 + i[1] * 3) % 11) as f32 * 0.1 - 0.5);
        let adapter = Adapter::new(
            "x",
            AdapterConfig::from_json(&json).unwrap(),
            [("prompt_embeddings".into(), tensor)],
        );
        adapter.check(&config).unwrap();
        let opt = tiny.load(backend::load().adapter(adapter)).adapted("x").unwrap();
        assert_eq!(opt.context(), 14);
        let ids: Vec<u32> = (3..17).collect();
        opt.logits(&ids).unwrap();
        let error = opt.logits(&(3..18).collect::<Vec<_>>()).unwrap_err().to_string();
        assert_eq!(error, "expected at most 14 positions (the context less 10 virtual tokens), found 15");
        let generated = opt.generate(&ids[..10], &GenerationConfig::default().max_new_tokens(50)).unwrap();
        assert_eq!(generated.ids().len(), 5);
        // Beams fork and reorder what stands behind the virtual tokens.
        let beams = GenerationConfig::default().max_new_tokens(4).num_beams(3);
        opt.generate(&ids[..4], &beams).unwrap();
        // Without a cache, all is run again each time.
        let uncached = GenerationConfig::default().max_new_tokens(4).use_cache(false);
        let cached = opt.generate(&ids[..4], &GenerationConfig::default().max_new_tokens(4)).unwrap();
        assert_eq!(opt.generate(&ids[..4], &uncached).unwrap().ids(), cached.ids());
    }
    let json = r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 24}"#;
    let tensors = [("prompt_embeddings".to_owned(), ArrayD::zeros(vec![24, 32]))];
    let adapter = Adapter::new("x", AdapterConfig::from_json(json).unwrap(), tensors);
    let checkpoint = Checkpoint::from_bytes(&tiny.config(), vec![tiny.weights()]).unwrap();
    let error = Opt::assemble(&checkpoint, None, None, backend::load().adapter(adapter)).err().unwrap();
    assert!(error.to_string().contains("expected less than 24 virtual tokens"), "{error}");
}
