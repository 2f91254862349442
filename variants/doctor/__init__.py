"""An adapter file of any program examined and made smaller, without torch and without its base model.

    dW = s B diag(E) A        always through the thin factors; a dense (O, I) matrix is never made

    stored.py     a safetensors file, read a tensor at a time and written, with numpy (bfloat16 too)
    kohya.py      the names of Kohya's and diffusers' tensors
    reading.py    any adapter as a list of sites with their factors and scales
    base.py       |W| of a base model's weights, where they are given
    faults.py     what is wrong with the tensors of a site, and its spectrum
    findings.py   the rules, by name: level, meaning, remedy
    examining.py  all that can be said of an adapter
    criteria.py   how many ranks each criterion would keep, and the error that this makes
    writing.py    the adapter at lower ranks as a plain LoRA, PEFT's or Kohya's; the error that was made
    llama_cpp.py  the adapter as the GGUF file that llama.cpp loads

`rankwise ranks` prints the ranks and the same faults of runs and PEFT folders; `rankwise doctor` asks what is wrong with a file
and how small it can be.
"""
