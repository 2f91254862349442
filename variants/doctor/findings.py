"""What can be wrong with an adapter: rules by name, each with its level, its meaning and what helps.

Levels are SARIF's: an error makes the adapter wrong or unloadable, a warning costs something or surprises, a note informs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    level: str  # "error", "warning" or "note"
    meaning: str
    remedy: str


AGAIN = "save or copy the adapter again"
RULES = {
    "not-finite": Rule("error", "A tensor holds NaN or infinity.", "take an earlier checkpoint; lower the rate, or clip"),
    "missing-factor": Rule("error", "A site has A without B, or B without A.", AGAIN),
    "factors-do-not-fit": Rule("error", "The rows of A are not the columns of B.", AGAIN),
    "unreadable-type": Rule("error", "A factor is stored in a type that is not read here.", "save it in float32 or bfloat16"),
    "rank-contradiction": Rule("error", "The configuration says another rank than the tensors have.",
                               "copy the adapter_config.json that was saved with the weights"),
    "pattern-without-effect": Rule("warning", "A rank_pattern or alpha_pattern matches no site of the file.",
                                   "mend the pattern: it must match the end of a module's name"),
    "head-missing": Rule("error", "No head of modules_to_save has tensors in the file.", AGAIN),
    "head-unmatched": Rule("warning", "One of several heads of modules_to_save has no tensors in the file.",
                           "harmless where the model has no module of that name; else save the adapter again"),
    "scale-zero": Rule("error", "alpha is 0, so that the update is zero whatever was trained.", "mend lora_alpha"),
    "scale-not-finite": Rule("error", "alpha is NaN or infinite.", "mend alpha: the log of the training has it"),
    "scale-negative": Rule("warning", "alpha is negative: the update is subtracted.", "mend lora_alpha if that is not meant"),
    "scale-large": Rule("warning", "The update is multiplied by 16 or more.",
                        "compare alpha with that of training; alpha/r is 1 or 2 in most recipes"),
    "scales-differ": Rule("note", "Sites are scaled differently.", "add an alpha_pattern if that is not meant"),
    "alpha-missing": Rule("note", "The file holds no alpha, which programs then take for r: scale 1.",
                          "compare with the alpha of training"),
    "zero-update": Rule("warning", "dW is zero: the site does nothing.", "train it, or take the site out (--fix)"),
    "dead-ranks": Rule("warning", "A row of A, column of B or coefficient is zero.", "drop them: --fix --by exact"),
    "dependent-ranks": Rule("warning", "Ranks that are linear combinations of others.", "drop them: --fix --by exact"),
    "magnitude-missing": Rule("error", "use_dora is set, and a site has no magnitude.", AGAIN),
    "magnitude-unexpected": Rule("error", "A site has a magnitude, and use_dora is not set: PEFT passes it over.",
                                 'set "use_dora": true, or save the adapter again'),
    "magnitude-not-positive": Rule("warning", "A magnitude of DoRA is zero or negative, where |W| cannot be.",
                                   "train at a lower rate, or without weight decay on magnitudes"),
    "magnitude-drift": Rule("warning", "DoRA's magnitudes are far from |W|.", "look whether that is the base; lower the rate"),
    "base-unknown": Rule("warning", "--base holds no weight of a site.", "give the model that the adapter was trained on"),
    "base-changed": Rule("warning", "The start of the adapter changed the base weight, which the file is relative to.",
                         "convert it in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"),
    "acts-otherwise": Rule("warning", "A setting makes it another function than s B A.", "use PEFT for this adapter"),
    "stray-tensor": Rule("warning", "A tensor that is no part of an update, of a head or of the base.",
                         "look where it comes from: most programs pass it over"),
    "site-missing": Rule("note", "A module that target_modules names has no tensors, or none in some layers.",
                         "harmless where the model has no such module there; else save or copy the adapter again"),
    "whole-tensors": Rule("note", "Whole tensors of the model are trained beside the updates.",
                          "none: they are kept as they are, and are in no rank and no error here"),
    "unfinished": Rule("warning", "Training ended above its rank budget.", "train on, or cut it: --fix --by total"),
    "oversized": Rule("note", "Far fewer ranks would make almost the same update.", "choose a criterion for --fix"),
    "one-site-rules": Rule("note", "One site holds most of the energy of all updates.",
                           "compare its scale, its rate and its norm with the others'"),
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One thing to be said of an adapter, or of one of its sites."""

    rule: str
    message: str
    site: str | None = None

    @property
    def level(self) -> str:
        return RULES[self.rule].level

    @property
    def remedy(self) -> str:
        return RULES[self.rule].remedy

    @property
    def sentence(self) -> str:
        return self.message if self.site is None else f"{self.site}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        return {"rule": self.rule, "level": self.level, "site": self.site, "message": self.message, "remedy": self.remedy}


def sarif(findings: Sequence[Finding], uri: str, version: str) -> dict[str, Any]:
    """The findings in SARIF 2.1.0 (OASIS), as code scanners of CI services read them."""
    used = list(dict.fromkeys(finding.rule for finding in findings))
    rules = [
        {
            "id": name,
            "shortDescription": {"text": RULES[name].meaning},
            "help": {"text": RULES[name].remedy},
            "defaultConfiguration": {"level": RULES[name].level},
        }
        for name in used
    ]
    results = []
    for finding in findings:
        location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri}}}
        if finding.site is not None:
            location["logicalLocations"] = [{"fullyQualifiedName": finding.site, "kind": "module"}]
        results.append(
            {
                "ruleId": finding.rule,
                "ruleIndex": used.index(finding.rule),
                "level": finding.level,
                "message": {"text": finding.sentence},
                "locations": [location],
                "properties": {"remedy": finding.remedy},
            }
        )
    driver = {"name": "rankwise doctor", "version": version, "rules": rules}
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
