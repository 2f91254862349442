"""The names of sites: their layer, their kind of module, their order and their short labels.

A site is a path such as `encoder.layer.0.attention.self.query`. Its first number is the layer, what follows is the
module kind; this holds for BERT, DeBERTa, ALBERT, GPT-2, Llama and T5. A path without a number belongs to no layer.
"""

from collections.abc import Iterable


def split_site(site: str) -> tuple[str, int | None, str]:
    """Path -> (the stack that it is in, its layer, its module kind); without a number ("", None, path)."""
    parts = site.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if at is None or at == len(parts) - 1:
        return "", None, site
    return ".".join(parts[:at]), int(parts[at]), ".".join(parts[at + 1 :])


def site_order(sites: Iterable[str]) -> list[str]:
    """Layer by layer, a layer's modules in the order in which they first come; sites of no layer last."""
    sites = list(dict.fromkeys(sites))
    first = {kind: i for i, kind in reversed(list(enumerate(split_site(site)[2] for site in sites)))}
    stacks = list(dict.fromkeys(split_site(site)[0] for site in sites))

    def key(site: str) -> tuple:
        stack, layer, kind = split_site(site)
        return (layer is None, stacks.index(stack), layer or 0, first[kind])

    return sorted(sites, key=key)


def module_labels(sites: Iterable[str]) -> dict[str, str]:
    """Site -> the shortest end of its module kind that no other kind of the model ends with.

    `attention.self.query` is `query`; `output.dense` stays, for `attention.output.dense` ends so too. Where a model has an
    encoder and a decoder, the name of the stack comes first.
    """
    sites = list(sites)
    kinds = list(dict.fromkeys(split_site(site)[2] for site in sites))
    stacks = {split_site(site)[0] for site in sites if split_site(site)[1] is not None}

    def shortest(kind: str) -> str:
        parts = kind.split(".")
        for length in range(1, len(parts)):
            end = ".".join(parts[-length:])
            if end.isdigit() or end.split(".")[0].isdigit():
                continue
            if not any(other != kind and ("." + other).endswith("." + end) for other in kinds):
                return end
        return kind

    labels = {}
    for site in sites:
        stack, layer, kind = split_site(site)
        several = layer is not None and len(stacks) > 1
        labels[site] = f"{stack.split('.')[0]}: {shortest(kind)}" if several else shortest(kind)
    return labels
