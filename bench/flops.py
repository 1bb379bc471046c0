"""The number of floating-point operations of a step; a multiplication and an addition are two operations.

Two counts, both of real tokens only (padding is never needed):

plain    every block computes all of its outputs for every token.
         Matrices, P parameters in those of a block: forward 2·P per token; backward 2·P for the gradient of the input
         and 2·P for that of the weights, 6·P in total. With LoRA the frozen matrices have no gradient, 4·P, and the
         adapters (r·(in + out) parameters per matrix) need 6 per parameter.
         Attention, causal: a sequence of n tokens has n·(n + 1)/2 pairs; each takes 4·heads·head_dim operations forward
         (scores, values) and 8 backward (d queries, d keys, d values, d probabilities). Recomputing scores in the
         backward pass is a choice and not counted.
needed   without work on which the result does not depend: queries, attention rows, output projection and MLP of the
         last block except for the pooled positions; repeated sequences of a batch, if there is no dropout; with LoRA
         the gradients of the first block's input, below which no parameter is trainable.

Not counted in either: embedding, norms, rotary positions, activation, pooling, loss, optimizer. They need O(1) operations per
number and are limited by memory bandwidth.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """The fields of a model's config.json on which the counts depend."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config):
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        )

    def matrices(self):
        """(in, out) of the seven matrices of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }


@dataclasses.dataclass(frozen=True)
class Work:
    """The task: `train` all weights, train adapters of `lora_rank`, or neither (encoding)."""

    shape: Shape
    train: bool = True
    lora_rank: int = 0
    pooled: int = 8

    def plain(self, lengths):
        """Operations for sequences of these lengths, all blocks alike."""
        tokens = sum(lengths)
        matrices = sum(self._matrix(*sizes) for sizes in self.shape.matrices().values())
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        return self.shape.layers * (tokens * matrices + pairs * self._pair())

    def needed(self, lengths):
        """Operations on which the result depends. `lengths` must not contain repeated sequences that are encoded once."""
        tokens = sum(lengths)
        last = sum(min(n, self.pooled) for n in lengths)
        spared = 0
        for name, sizes in self.shape.matrices().items():
            if name not in ("k_proj", "v_proj"):
                spared += (tokens - last) * self._matrix(*sizes)
        # Position i attends to i + 1; the last block needs only the pooled ones at the end.
        unpooled = [max(n - self.pooled, 0) for n in lengths]
        spared += sum(n * (n + 1) // 2 for n in unpooled) * self._pair()
        if self.lora_rank:
            for name in ("q_proj", "k_proj", "v_proj"):
                inputs, outputs = self.shape.matrices()[name]
                spared += tokens * (2 * inputs * outputs + 2 * self.lora_rank * inputs)
        return self.plain(lengths) - spared

    def _matrix(self, inputs, outputs):
        """Operations per token for one matrix."""
        if not self.train:
            return 2 * inputs * outputs
        if self.lora_rank:
            return 4 * inputs * outputs + 6 * self.lora_rank * (inputs + outputs)
        return 6 * inputs * outputs

    def _pair(self):
        """Operations per pair of positions in the attention of one block."""
        return (12 if self.train else 4) * self.shape.heads * self.shape.head_dim
