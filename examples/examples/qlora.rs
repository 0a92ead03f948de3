//! QLoRA (arXiv 2305.14314): low-rank terms beside weights that stay packed in four bits. Two steps by hand, without a
//! trainer.

use opt_core::{
    Load, Result,
    adapter::{AdapterConfig, AdapterMethod, LoraConfig, Names},
    quantize::QuantSpec,
    tuning::{Example, Method, StepOptions, Tuner},
};

fn main() -> Result<()> {
    let mut lora = LoraConfig::default();
    lora.r = 4;
    lora.target_modules = Names::list(["q_proj", "v_proj", "fc1"]);
    let method = Method::adapter(AdapterConfig::new(AdapterMethod::Lora(lora)), 42);
    let load = Load::default().quantize(QuantSpec::nf4());
    let mut tuner = Tuner::load(opt_examples::model(), method, load)?;
    println!("{} parameters are trained beside packed weights", tuner.trainable());

    let examples = [Example::new((10..40).collect()), Example::new((40..60).collect())];
    let mut options = StepOptions::default();
    options.lr = 1e-2;
    for step in 1..=5 {
        options.step = step;
        let result = tuner.step(&[&examples], options)?;
        println!("step {step}: loss {:.3}, norm of the gradients {:.3}", result.loss, result.grad_norm);
    }

    // PEFT's files; `Adapter::open` and PeftModel.from_pretrained read them.
    let output = std::env::temp_dir().join(format!("opt-qlora-{}", std::process::id()));
    tuner.adapter()?.save(&output)?;
    println!("saved: {}", output.join("adapter_model.safetensors").exists());
    let _ = std::fs::remove_dir_all(&output);
    Ok(())
}
