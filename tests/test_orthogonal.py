"""The orthogonal start beside its equation, beside PEFT, and as the identity that it is."""

import peft
import pytest
import torch
from rankwise import variants
from rankwise.variants.orthogonal import orthogonal
from torch import Generator, nn

IN, OUT = 9, 7


@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_factors_are_in_orthogonal_halves_of_the_slots(rank):
    A, B = orthogonal(OUT, IN, rank, Generator().manual_seed(0))
    assert A.shape == (rank, IN) and B.shape == (OUT, rank)
    assert (B @ A).abs().max() < 1e-15
    assert torch.linalg.matrix_rank(A) == min((rank + 1) // 2, IN) and torch.linalg.matrix_rank(B) == rank // 2


def test_factors_are_as_large_as_pefts():
    """Both are a standard normal of r/2 rows turned by orthonormal rows: |A|^2 = r/2 I / 100 on average."""
    mine, theirs = [], []
    for seed in range(40):
        A, B = orthogonal(64, 48, 6, Generator().manual_seed(seed))
        mine.append([A.square().sum(), B.square().sum()])
        torch.manual_seed(seed)
        model = peft.get_peft_model(
            nn.Sequential(nn.Linear(48, 64)), peft.LoraConfig(r=6, target_modules=["0"], init_lora_weights="orthogonal")
        )
        state = peft.get_peft_model_state_dict(model)
        theirs.append([value.double().square().sum() for value in state.values()])
    mine, theirs = (torch.tensor(rows).mean(0) for rows in (mine, theirs))
    expected = torch.tensor([3 * 48 / 100, 3 * 64 / 100])
    assert torch.allclose(mine, expected.to(mine), rtol=0.1) and torch.allclose(theirs, expected.to(theirs), rtol=0.1)


def test_both_factors_learn_from_the_first_step_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    x = torch.randn(6, IN, dtype=torch.float64)
    before = model(x)
    adapter = variants.create("orthogonal", members=3, rank=[4, 3, 1], alpha=[7.0, 3.0, 5.0])
    adapter.attach(model, ["0"], head=[], calibration=(x,))
    assert torch.allclose(model(x), before, rtol=1e-13)
    model(x).square().sum().backward()
    site = adapter.site("0")
    assert site.A.grad[0].any() and site.A.grad[1].any() and not site.A.grad[2].any()  # at rank 1 it is LoRA's start
    assert all(site.B.grad[k].any() for k in range(3))


def test_pefts_files_are_plain_lora(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    oracle = peft.get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config)
    oracle.save_pretrained(tmp_path)
    model = nn.Sequential(nn.Linear(IN, OUT))
    model.load_state_dict(
        {k.replace("base_layer.", ""): v for k, v in oracle.base_model.model.state_dict().items() if "lora" not in k}
    )
    adapter = variants.load_pretrained(model, tmp_path)
    x = torch.randn(3, IN)
    assert adapter.method == "lora" and torch.allclose(model(x), oracle(x), rtol=1e-5)
