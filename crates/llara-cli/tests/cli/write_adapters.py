# Appended to the code of a model card: adapters with token embeddings as PEFT itself writes them, below OUT, and
# the embeddings that it computes for TEXTS. BASE has fewer than ROWS token embeddings; the ids from FIRST on are new.
import json

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

new = list(range(FIRST, ROWS))
FORMS = [
    ("list", False, {"trainable_token_indices": new[::-1]}),
    ("dict", True, {"trainable_token_indices": {"embed_tokens": [5] + new}}),
    ("table", False, {"modules_to_save": ["embed_tokens"]}),
    ("table-and-head", True, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ("resized", False, {}),
]
embeddings = {}
for name, causal, form in FORMS:
    for save_table in ("auto", False):
        if name == "resized" and not save_table:
            continue
        torch.manual_seed(0)
        base = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(BASE, dtype=torch.float32)
        base.resize_token_embeddings(ROWS, mean_resizing=False)
        config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **form)
        tuned = get_peft_model(base, config).eval()
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        folder = name if save_table else f"{name}-without-base"
        tuned.save_pretrained(f"{OUT}/{folder}", save_embedding_layers=save_table)
        tokenizer.save_pretrained(f"{OUT}/{folder}")
        model = base.model if causal else base
        both = [embed(TEXTS, role) for role in ("query", "passage")]
        embeddings[folder] = torch.cat(both).flatten().tolist()
print(json.dumps(embeddings))
