"""Small random models with experts in one parameter: as Mixtral and Qwen3-MoE store them, as GPT-OSS, and as Llama 4."""

from typing import Any

import torch
import transformers

SIZE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZE |= {"head_dim": 4, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZE, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZE, intermediate_size=20, moe_intermediate_size=12, num_experts=5, num_experts_per_tok=2
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZE, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZE, intermediate_size=12, intermediate_size_mlp=20, num_local_experts=3, num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
}  # fmt: skip
NAMES = tuple(CONFIGS)
TARGETS = ["q_proj", "experts.gate_up_proj", "experts.down_proj"]


def made(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """In evaluation mode; every tensor random, so that no bias and no gate is at a start of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    return in_one_type(model.to(dtype))


def in_one_type(model: Any) -> Any:
    """The model, in evaluation mode, with norms in its own type, where transformers' compute in float32."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=1e-6)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    model.config._experts_implementation = "eager"  # "grouped_mm" knows no float64
    return model.eval()


def tokens(step: int = 0, rows: int = 6) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return {"input_ids": torch.randint(3, 50, (rows, 7), generator=random)}
