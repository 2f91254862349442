"""What the keywords for targets mean in the common language models, encoder-decoders among them."""

import pytest
from rankwise.variants.adapter.targets import resolve

from tests import language_models

GATED = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"})
FUSED = ({"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"})
ENDS = {
    **dict.fromkeys(("llama", "qwen2", "mistral", "gemma", "gemma2", "cohere", "granite"), GATED),
    **dict.fromkeys(("bloom", "gpt_neox"), FUSED),
    "gpt2": ({"attn.c_attn", "attn.c_proj"}, {"mlp.c_fc", "mlp.c_proj"}),
    "t5": ({"q", "k", "v", "o"}, {"wi", "wo"}),
    "bart": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
}


@pytest.mark.parametrize("name", language_models.NAMES)
def test_keywords_mean_the_linears_of_the_layers_and_never_the_output_layer(name):
    model, (attention, mlp) = language_models.made(name), ENDS[name]
    found = {keyword: resolve(model, keyword, []) for keyword in ("all-linear", "attention", "mlp")}
    last = 2 if name == "gpt2" else 1
    for keyword, ends in (("attention", attention), ("mlp", mlp)):
        assert {".".join(path.split(".")[-last:]) for path in found[keyword]} == ends
    # Two layers; of an encoder-decoder two and two, the decoder's with two attentions each.
    attentions = 6 if model.config.is_encoder_decoder else 2
    assert len(found["attention"]) == attentions * len(attention)
    assert len(found["mlp"]) == (4 if model.config.is_encoder_decoder else 2) * len(mlp)
    assert sorted(found["all-linear"]) == sorted(found["attention"] + found["mlp"])
