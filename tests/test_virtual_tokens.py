"""Prompt and prefix tuning beside plain versions, and beside PEFT: outputs, generation, files; what is refused."""

import math

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.adapter.probe import fill
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

from tests.loop import outputs
from tests.tiny import VOCABULARY, batch, packed_batch, tiny

K, TOKENS, ROWS, LENGTH = 3, 4, 2, 6


def language_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "gpt2":
            sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 32}
            made = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))
        else:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
            more = {"num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
            made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **more))
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    return made.to(dtype).eval()


def filled(method: str, model: nn.Module, members: int = K, spread: float = 0.5) -> variants.Adapter:
    adapter = variants.create(method, members=members, tokens=TOKENS).attach(model)
    fill(adapter, spread)
    return adapter


def text(members: int = K) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (members * ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    ids[-1, -2:] = mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens_of(adapter: variants.Adapter) -> Tensor:
    ((_, site),) = adapter.named_sites()
    return site.tokens


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_prompt_is_what_embeddings_before_the_text_give(name):
    adapter, plain, inputs = filled("prompt-tuning", language_model(name)), language_model(name), text()
    found = adapter.model(**inputs).logits
    assert found.shape[:2] == inputs["input_ids"].shape, "the text's tokens alone"
    for row in range(K * ROWS):
        length = int(inputs["attention_mask"][row].sum())
        words = plain.get_input_embeddings()(inputs["input_ids"][row, :length])
        whole = torch.cat([tokens_of(adapter)[row // ROWS], words])[None]
        expected = plain(inputs_embeds=whole).logits[0, TOKENS:]
        torch.testing.assert_close(found[row, :length], expected, rtol=1e-9, atol=1e-10)


def plain_gpt2(model: nn.Module, ids: Tensor, prefix: Tensor) -> Tensor:
    """GPT-2's logits of one text (T,), by hand; prefix (p, 2 L d): keys and values before each layer's own."""
    body, heads = model.transformer, 4
    x = body.wte.weight[ids] + body.wpe.weight[len(prefix) : len(prefix) + len(ids)]  # positions from p on
    given = prefix.view(len(prefix), 2 * len(body.h), heads, -1)
    for layer, block in enumerate(body.h):
        q, k, v = (block.ln_1(x) @ block.attn.c_attn.weight + block.attn.c_attn.bias).split(32, dim=1)
        done = []
        for head in range(heads):
            part = slice(8 * head, 8 * head + 8)
            keys = torch.cat([given[:, 2 * layer, head], k[:, part]])
            values = torch.cat([given[:, 2 * layer + 1, head], v[:, part]])
            scores = q[:, part] @ keys.T / math.sqrt(8)
            for t in range(len(ids)):
                scores[t, len(prefix) + t + 1 :] = -torch.inf
            done.append(scores.softmax(1) @ values)
        x = x + torch.cat(done, 1) @ block.attn.c_proj.weight + block.attn.c_proj.bias
        inner = nn.functional.gelu(block.ln_2(x) @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh")
        x = x + inner @ block.mlp.c_proj.weight + block.mlp.c_proj.bias
    return body.ln_f(x) @ model.lm_head.weight.T


def test_a_prefix_is_keys_and_values_before_each_layers_own():
    adapter, plain, inputs = filled("prefix-tuning", language_model("gpt2")), language_model("gpt2"), text()
    found = adapter.model(**inputs).logits
    for row in range(K * ROWS):
        length = int(inputs["attention_mask"][row].sum())
        with torch.no_grad():
            expected = plain_gpt2(plain, inputs["input_ids"][row, :length], tokens_of(adapter)[row // ROWS])
        torch.testing.assert_close(found[row, :length], expected, rtol=1e-9, atol=1e-10)


def test_the_starts():
    vocabulary = tiny("bert").get_input_embeddings().weight
    prompts = tokens_of(variants.create("prompt-tuning", members=2, seeds=[4, 5], tokens=9).attach(tiny("bert")))
    assert all(any(torch.equal(one, word) for word in vocabulary) for prompt in prompts for one in prompt)
    assert not torch.equal(prompts[0], prompts[1])
    normal = tokens_of(variants.create("prompt-tuning", tokens=300, initialization="normal").attach(language_model("llama")))
    assert normal.std().item() == pytest.approx(1, rel=0.05)
    adapter = variants.create("prefix-tuning", tokens=25, spread=0.3).attach(tiny("llama"))
    assert tokens_of(adapter).shape == (1, 25, 2 * 2 * 2 * 8)  # layers of keys and values of two heads of 8, of four queries'
    assert tokens_of(adapter).std().item() == pytest.approx(0.3, rel=0.05)
    assert adapter.parameter_counts()["trainable"].tolist() == [25 * 64]


CONFIGS = {"prompt-tuning": peft.PromptTuningConfig, "prefix-tuning": peft.PrefixTuningConfig}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("method", CONFIGS)
def test_pefts_language_models_go_both_ways_and_generate_the_same(method, name, tmp_path):
    config = CONFIGS[method](task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    oracle, inputs = peft.get_peft_model(language_model(name, torch.float32), config).eval(), text(1)
    nn.init.normal_(oracle.prompt_encoder["default"].embedding.weight, std=0.7)
    oracle.save_pretrained(tmp_path / "theirs")
    model = language_model(name, torch.float32)
    adapter = variants.load_pretrained(model, tmp_path / "theirs")
    seen = inputs["attention_mask"].bool()
    want = oracle(**inputs).logits[:, -LENGTH:]
    torch.testing.assert_close(model(**inputs).logits[seen], want[seen], rtol=1e-4, atol=1e-4)
    whole = {key: value[:1] for key, value in inputs.items()}
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**whole, **how), oracle.generate(**whole, **how))
    variants.save_pretrained(adapter, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(language_model(name, torch.float32), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs).logits[:, -LENGTH:], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_cache_gives_what_one_pass_gives_padding_on_the_left_too(method):
    """Each step of a greedy generation, over rows of two members, is the argmax of the whole text read at once."""
    adapter = filled(method, language_model("llama"), members=2)
    ids = torch.randint(1, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = adapter.model.generate(input_ids=ids, attention_mask=mask, **how)
    for _ in range(4):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = adapter.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(4, 1)], 1)
    assert torch.equal(found, ids)


def test_an_encoders_head_reads_the_text(tmp_path):
    """The pooled token is the text's first, and a prefix is PEFT's on an encoder too."""
    model = tiny("bert").eval()
    adapter = filled("prompt-tuning", model)
    hidden = model.bert(**{k: v for k, v in packed_batch([0, 1, 2]).items() if k != "labels"})
    torch.testing.assert_close(hidden.pooler_output, model.bert.pooler(hidden.last_hidden_state[:, :1]))
    variants.save_pretrained(adapter, tmp_path / "own", member=1)
    assert not (tmp_path / "own" / "adapter_config.json").exists()
    again = variants.load_pretrained(tiny("bert"), tmp_path / "own")
    assert torch.equal(tokens_of(again)[0], tokens_of(adapter)[1])
    oracle = peft.get_peft_model(
        tiny("bert", torch.float32), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    )
    oracle.eval().save_pretrained(tmp_path / "theirs")
    model = tiny("bert", torch.float32).eval()
    variants.load_pretrained(model, tmp_path / "theirs")
    torch.testing.assert_close(outputs(model, batch(0)), outputs(oracle, batch(0)), rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "theirs" / "adapter_model.safetensors")["prompt_embeddings"].shape == (3, 2 * 2 * 32)


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"puts tokens before a text, and ViTForImageClassification reads pixel_values"):
        sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16}
        variants.create("prompt-tuning").attach(ViTForImageClassification(ViTConfig(**sizes, patch_size=8)))
    with pytest.raises(ValueError, match="Sequential has none apart"):
        variants.create("prefix-tuning").attach(nn.Sequential(nn.Linear(3, 2)), head=[])
    with pytest.raises(ValueError, match=r"DebertaV2Model takes no keys and values from outside .*take prompt-tuning"):
        variants.create("prefix-tuning").attach(tiny("deberta"))
    adapter = variants.create("prefix-tuning", tokens=30).attach(tiny("gpt2"))
    with pytest.raises(ValueError, match=r"tokens = 30 and a text of 6 are more than the 32 positions of a GPT2Model"):
        outputs(adapter.model, batch(0))
    with pytest.raises(variants.CannotMerge):
        adapter.merge()
    adapter = variants.create("prefix-tuning", tokens=3).attach(tiny("llama"))
    adapter.model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing drops the keys and values that prefix tuning trains"):
        outputs(adapter.model.train(), batch(0))
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    peft.get_peft_model(tiny("bert", torch.float32), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="in PEFT the head of a BertForSequenceClassification reads the first virtual token"):
        variants.load_pretrained(tiny("bert"), tmp_path)
    variants.save_pretrained(variants.create("prefix-tuning", tokens=3).attach(tiny("bert")), tmp_path / "prefix")
    with pytest.raises(ValueError, match="prefix-tuning puts tokens before every row: use it alone"):
        variants.Bank(tiny("bert")).load("one", tmp_path / "prefix")
