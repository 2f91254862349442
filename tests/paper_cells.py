"""A cell of a paper's table on a tiny model: run as `rankwise paper` runs it, and laid beside the published values."""

from pathlib import Path
from typing import Any

from rankwise.experiments import recipes
from rankwise.experiments.cli.paper import _beside
from rankwise.experiments.study import Runner
from rankwise.reports import papers
from rankwise.reports.papers.beside import Line


def run(plan: recipes.Plan, folder: Path, **training: Any) -> dict[str, Any]:
    """result.json of the plan's only run, with these settings of the training changed."""
    changed = plan.study.training.model_copy(update=training)
    runner = Runner(plan.study.model_copy(update={"training": changed}), folder, device="cpu")
    runner.prepare()
    (result,) = runner.run()
    assert result["status"] == "completed" and result["split"] == "test"
    return result


def lines(plan: recipes.Plan, result: dict[str, Any]) -> list[Line]:
    """A line for each column of the published table that the run fills; its score is in each."""
    recipe = recipes.load(plan.recipe)
    made = _beside(recipe, papers.load(recipe.table), plan, [result], [])
    assert all(list(line.scores) == [0] for line in made)
    return made
