//! The options of `llara finetune` that concern adapters.

use std::path::PathBuf;

use clap::ArgAction;
use clap::builder::BoolishValueParser;
use llara::model::{LoraConfig, SavedTokens};
use llara::{Error, ErrorKind, Result};

use super::ranges::require;

#[derive(clap::Args)]
#[command(next_help_heading = "LoRA")]
pub(crate) struct LoraArgs {
    /// Train a LoRA adapter with frozen weights and save it in PEFT's format; false: train all weights
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(crate) use_lora: bool,
    /// Rank of the adapter [default: 64]
    #[arg(long, value_name = "N")]
    lora_rank: Option<usize>,
    /// LoRA's alpha: the adapter's output is multiplied by alpha / rank [default: 16]
    #[arg(long, value_name = "X")]
    lora_alpha: Option<f64>,
    /// Dropout probability of the adapter's input [default: 0.1]
    #[arg(long, value_name = "X")]
    lora_dropout: Option<f32>,
    /// Projections with an adapter, separated by spaces or commas [default: q_proj k_proj v_proj o_proj
    /// gate_proj up_proj down_proj]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    target_modules: Vec<String>,
    /// Folder of a PEFT adapter to train further, with its rank, alpha and target modules
    #[arg(long, alias = "peft-model-path", value_name = "DIR")]
    from_peft: Option<PathBuf>,
    /// How an adapter has the embeddings of added tokens, in the terms of PEFT: trainable-token-indices (only
    /// their rows) or modules-to-save (the whole table) [default: trainable-token-indices]
    #[arg(long, value_name = "FORM", value_parser = crate::values::saved_tokens())]
    #[arg(hide_possible_values = true)]
    pub(crate) save_tokens_as: Option<SavedTokens>,
    /// Also save the model with the merged adapter, in merged_model/ of the output folder
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    #[arg(default_value = "false", action = ArgAction::Set)]
    #[arg(value_parser = BoolishValueParser::new(), hide_possible_values = true)]
    pub(crate) save_merged_lora_model: bool,
}

/// The adapter that is trained.
pub(crate) enum Adapter {
    /// None: all weights are trained.
    None,
    /// A new adapter.
    New(LoraConfig),
    /// The adapter of a PEFT folder.
    From(PathBuf),
}

impl LoraArgs {
    /// Whether options of adapters are given although no adapter is trained.
    pub(crate) fn are_ignored(&self) -> bool {
        let others = self.are_set() || self.save_merged_lora_model;
        !self.use_lora && others
    }

    /// Whether settings of an adapter are given.
    fn are_set(&self) -> bool {
        self.lora_rank.is_some()
            || self.lora_alpha.is_some()
            || self.lora_dropout.is_some()
            || !self.target_modules.is_empty()
            || self.save_tokens_as.is_some()
    }

    /// The adapter that the options describe.
    ///
    /// # Errors
    /// Options contradict each other or are out of range.
    pub(crate) fn adapter(&self) -> Result<Adapter> {
        let invalid = |what: &str| Error::new(ErrorKind::Argument, what);
        if !self.use_lora {
            if let Some(dir) = &self.from_peft {
                return Err(invalid(
                    "an adapter cannot be trained further if all weights are trained",
                )
                .got(format!("--use-lora false with --from-peft {}", dir.display()))
                .hint(
                    "omit --use-lora false, or first merge the adapter into its model (llara merge) and \
                     give the merged model as --model",
                ));
            }
            // A command line of the reference may have settings of adapters together with --use_lora false.
            return Ok(Adapter::None);
        }
        if let Some(dir) = &self.from_peft {
            if self.are_set() {
                return Err(invalid("the settings of an existing adapter cannot be changed")
                    .got("--from-peft with other options of adapters")
                    .hint(
                        "omit --lora-rank, --lora-alpha, --lora-dropout, --target-modules and \
                         --save-tokens-as",
                    ));
            }
            return Ok(Adapter::From(dir.clone()));
        }
        let default = LoraConfig::default();
        let config = LoraConfig {
            rank: self.lora_rank.unwrap_or(default.rank),
            alpha: self.lora_alpha.unwrap_or(default.alpha),
            dropout: self.lora_dropout.unwrap_or(default.dropout),
            target_modules: match self.target_modules.as_slice() {
                [] => default.target_modules,
                names => names
                    .iter()
                    .flat_map(|names| names.split([',', ' ', '\t', '\n']))
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned)
                    .collect(),
            },
            trained_tokens: Vec::new(), // known when the tokenizer is read
            saved_tokens: self.save_tokens_as.unwrap_or_default(),
        };
        require(
            config.rank > 0,
            ("--lora-rank", config.rank),
            "the adapter's rank is 0",
            "1 or more, such as 64",
        )?;
        require(
            config.alpha.is_finite() && config.alpha > 0.0,
            ("--lora-alpha", config.alpha),
            "the adapter's alpha is out of range",
            "a positive number, such as 16",
        )?;
        require(
            (0.0..1.0).contains(&config.dropout),
            ("--lora-dropout", config.dropout),
            "the adapter's dropout is out of range",
            "at least 0 and below 1",
        )?;
        config.check()?;
        Ok(Adapter::New(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct Only {
        #[command(flatten)]
        lora: LoraArgs,
    }

    fn parse(args: &[&str]) -> LoraArgs {
        Only::try_parse_from(args).unwrap().lora
    }

    #[test]
    fn adapters_are_the_default_as_in_the_reference() {
        let adapter = |args: &[&str]| parse(args).adapter().unwrap();
        for args in [&[][..], &["--use-lora"], &["--use-lora", "True"]] {
            let Adapter::New(config) = adapter(args) else { panic!("{args:?}") };
            assert_eq!(config, LoraConfig::default());
            assert_eq!((config.rank, config.alpha, config.dropout), (64, 16.0, 0.1));
        }
        assert!(matches!(adapter(&["--from-peft", "dir"]), Adapter::From(_)));
        assert!(parse(&["--from-peft", "dir", "--lora-rank", "2"]).adapter().is_err());
    }

    #[test]
    fn without_lora_other_options_of_adapters_are_ignored() {
        for (args, ignored) in [
            (&["--use-lora", "false"][..], false),
            (&["--use-lora=False", "--lora-rank", "0"], true),
            (&["--use-lora", "0", "--save-merged-lora-model"], true),
        ] {
            let lora = parse(args);
            assert!(matches!(lora.adapter(), Ok(Adapter::None)), "{args:?}");
            assert_eq!(lora.are_ignored(), ignored, "{args:?}");
        }
        assert!(!parse(&["--lora-rank", "2"]).are_ignored());
        let e = parse(&["--use-lora", "false", "--from-peft", "dir"]).adapter().err().unwrap();
        assert!(e.to_string().contains("llara merge"), "{e}");
    }

    #[test]
    fn targets_are_separated_by_spaces_or_commas() {
        for args in [
            &["--target-modules", "q_proj", "v_proj"][..],
            &["--target-modules", "q_proj v_proj"],
            &["--target-modules=q_proj, v_proj"],
            &["--target-modules=q_proj,v_proj"],
        ] {
            let Ok(Adapter::New(config)) = parse(args).adapter() else { panic!("{args:?}") };
            assert_eq!(config.target_modules, ["q_proj", "v_proj"], "{args:?}");
        }
    }
}
