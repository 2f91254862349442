"""What a run will take, before anything is trained or downloaded: parameters, bytes, products, time.

shapes.py    a model's configuration, without its weights
step.py      one training step on tensors that have shapes and no values: what is alive at its fullest moment
rate.py      how fast this machine multiplies
fleet.py     many machines and one writer, event by event (no torch)
table.py     the rows of `rankwise plan`, what fits, and what a rank costs
shapes/      configurations of models that need no download to be planned for
"""
