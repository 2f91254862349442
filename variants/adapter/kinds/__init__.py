"""The kinds of frozen weight that a site can stand at, a file each; variants/adapter/linears.py finds the kind of a module.

Whatever a module stores, a kind shows it as one matrix W (O, I), and a low-rank change of it is B A with A (R, I), B (O, R):

    linear.py       nn.Linear     W (O, I) as stored
                    Conv1D        GPT-2's: stored (I, O)
    embedding.py    nn.Embedding  stored (I, O): I entries of the vocabulary, O features.  Each token looks up a column of A
    convolution.py  nn.Conv1d     stored (O, C, w), I = C*w.  A is a convolution as the base's, B one of size 1
                    nn.Conv2d     stored (O, C, h, w), I = C*h*w.  The same, B of size 1 x 1
    experts.py      an expert of a mixture: a matrix of a parameter (E, O, I), or (E, I, O)
    quantised.py    Linear4bit    bitsandbytes': codes and scales of which W is made for each product
                    Linear8bitLt

Legend: K member, N rows or tokens, I in, O out, R rank slots.

To add a kind: write a class here that says how it is recognised (`holds`, `shape`), its matrix (`matrix`, `stored`), its
forward pass with K members (`adapted`) and, where they differ from a linear's, what is refused (`fault`), where A and B
start (`start`) and how PEFT stores the factors (`factors`, `factor_shapes`); then name it in KINDS, in
variants/adapter/linears.py.  No other file changes.
"""
