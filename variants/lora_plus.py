"""LoRA+: LoRA whose B learns faster than its A.

    A <- A - eta G_A        B <- B - lambda eta G_B        lambda = lr_ratio

A preset: LoRA with lr_ratio = 16.  Hayou et al. 2024 (arXiv 2402.12354), def. 1 and sec. 4, where lambda is about 16 and eta is
tuned; at an embedding too it is B that learns faster, where the release has a rate of its own.
"""

from rankwise.variants.lora import LoRA


class LoRAPlus(LoRA):
    """K members of LoRA+."""

    method = "lora+"
