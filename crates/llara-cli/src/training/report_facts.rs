//! What the report of a run says about settings that do not depend on what is trained.

use llara::model::LoraConfig;
use llara::train::TrainConfig;

/// The adapter that is trained, if there is one.
pub(crate) fn adapter_setting(lora: Option<LoraConfig>) -> String {
    match lora {
        None => "none, all weights are trained".to_owned(),
        Some(LoraConfig { rank, alpha, dropout, target_modules, .. }) => {
            let modules: Vec<String> = target_modules.iter().map(ToString::to_string).collect();
            format!("rank {rank}, alpha {alpha}, dropout {dropout}, on {}", modules.join(", "))
        }
    }
}

/// The settings of the optimizer and of the order of the rows.
pub(crate) fn common_settings(config: &TrainConfig) -> [(&'static str, String); 7] {
    let adamw = &config.adamw;
    [
        ("learning rate", format!("{:e}", config.learning_rate)),
        ("schedule", format!("{:?}, warm-up {:?}", config.decay, config.warmup)),
        ("weight decay", adamw.weight_decay.to_string()),
        ("betas", format!("{}, {}", adamw.beta1, adamw.beta2)),
        (
            "gradient clipping",
            adamw.max_grad_norm.map_or("none".to_owned(), |norm| norm.to_string()),
        ),
        ("sampling", format!("{:?}", config.sampling)),
        ("seed", config.seed.to_string()),
    ]
}
