"""DoRA's magnitude around the sites of any low-rank method."""

import pytest
import torch
from rankwise import variants

from tests.contract import attached, losses, rows
from tests.loop import outputs
from tests.tiers import quick
from tests.tiny import tiny

METHODS = [name for name, method in variants.METHODS.items() if "magnitude" in method.settings.model_fields]


@pytest.mark.parametrize("method", quick(METHODS))
def test_any_method_takes_magnitudes_and_is_merged_saved_and_loaded_with_them(method, tmp_path):
    adapter = attached(method, dtype=torch.float32, magnitude=True)
    start = {name: site.magnitude.detach().clone() for name, site in adapter.named_sites()}
    losses(adapter, 8)
    assert all((site.magnitude != start[name]).flatten(1).any(1).all() for name, site in adapter.named_sites())
    adapter.model.eval()
    inputs = rows(adapter)
    n = len(inputs["labels"]) // adapter.members
    live = outputs(adapter.model, inputs)
    largest = live.abs().max().item()
    for member in range(adapter.members):
        own = slice(member * n, (member + 1) * n)
        adapter.merge(member)
        merged = outputs(adapter.model, inputs)[own]
        adapter.unmerge()
        torch.testing.assert_close(merged, live[own], rtol=1e-4, atol=1e-4 * largest)
        variants.save_pretrained(adapter, tmp_path / str(member), member=member)
        model = tiny("bert", torch.float32).eval()
        again = variants.load_pretrained(model, tmp_path / str(member))
        assert {name: rank.item() for name, rank in again.ranks().items()} == {
            name: rank[member].item() for name, rank in adapter.ranks().items()
        }
        found = outputs(model, {key: value[own] for key, value in inputs.items()})
        torch.testing.assert_close(found, live[own], rtol=1e-5, atol=1e-5 * largest)
