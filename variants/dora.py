"""DoRA: train the size and the direction of each weight row separately.

    y = m / |W + dW|  *  (W x + dW x)  +  b         dW = s B A

m (K, O) starts at |W|, so the model is unchanged at the start.  Liu et al. 2024, eq. (5); the norm is held constant in
the backward pass (sec. 4.3).  |W + dW| is the norm of each output row, and the bias is not scaled, as in PEFT.  W is the weight
as a matrix (O, I): the rows of an embedding's are its dimensions, those of a convolution's its output channels.

Departures: the norm comes from thin products (lowrank/products.py).  Dropout acts on the low-rank branch's input
alone; PEFT drops it in (m/|W + dW| - 1) W x too.  A row whose W + dW is zero has gain 1 where PEFT has 0/0.
"""

from rankwise.variants.adalora import AdaLoRA
from rankwise.variants.lora import LoRA


class DoRA(LoRA):
    """K members of DoRA."""

    method = "dora"
    exact_gradient = False  # the norm is detached


class AdaLoRADoRA(AdaLoRA):
    """AdaLoRA's triplets on the direction, DoRA's magnitudes apart: ranks are pruned, magnitudes are not."""

    method = "adalora+dora"
    exact_gradient = False
