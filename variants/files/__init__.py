"""Adapters on disk, in PEFT's files: what is trained here loads in PEFT, and the other way round.

    adapter_config.json         peft_type, r, lora_alpha, target_modules, ...  (the keys that every PEFT knows)
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight ...

any low-rank  a PEFT LORA: lora_A.weight (r, I), lora_B.weight (O, r) of the slots that act, a trained coefficient E
method        folded into A, and lora_magnitude_vector (O,) with use_dora; ranks and alphas (scale * r) of sites that differ
              stand in rank_pattern and alpha_pattern.  A site without a slot that acts is left out; PEFT knows no rank 0,
              so where it has a magnitude, or no site would be left, it holds one slot of zeros.
AdaLoRA       a PEFT ADALORA: lora_A (r', I), lora_B (O, r'), lora_E (r', 1) of the triplets that are kept or have E != 0, so
              that the file equals the live model at any step; r' may be 0.  rank_pattern says which of init_r they were.
              PEFT's scale is alpha / (init_r + 1e-5) at every site: E is multiplied by our scale over that one.
head only     a PEFT LORA whose target_modules is PEFT's own word for none.
(IA)3         a PEFT IA3.  Prefix tuning: a PREFIX_TUNING, where PEFT has a task for the model; prompt tuning of a language
              model: a PROMPT_TUNING.  Both are in our own format elsewhere.
full, BitFit  no PEFT form: adapter_model.safetensors alone, with "format": "rankwise" in its metadata; so bottleneck adapters.

Heads are PEFT's modules_to_save.  What PEFT's keys cannot say (settings, seed, slots kept, E that was folded) is JSON under
"rankwise" in the metadata of the safetensors file, which PEFT does not read; without it a file is read as PEFT would.
A file must hold what its configuration promises: every module that target_modules means, and every head.  Tensors of the base
(an adapted output layer, a vocabulary that was resized) go into the model until the adapter is detached.

    pretrained.py  save_pretrained and load_pretrained
    export.py      plain LoRA for programs that know no other; a whole model with the adapter merged into it
    peft/          PEFT's format: names of tensors, adapter_config.json, writing, reading
    diffusion.py   LoRA files of diffusers' pipelines, both ways
    own.py         the format of methods that PEFT has no form for
    json_text.py   JSON of others, bounded
    facts.py       the "rankwise" metadata
    system.py      what safetensors says of a full disk, as what the system said
    folders.py     a folder read, and written whole or not at all
    state.py       what of an adapter, and of its model, goes into a file
    budget.py      whether training ended before its rank budget was reached
    doors.py       the save_pretrained of a model with an adapter in it
"""
