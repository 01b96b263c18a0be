"""Parallelism as a recipe names it, in Composer's form."""

from __future__ import annotations

from pathlib import Path

import pytest
from composer.utils import FSDP2Config

from aemim_algorithm.recipes.registry import build_parts
from aemim_algorithm.recipes.schema import RecipeError, load_recipe

RECIPE = Path(__file__).parents[2] / "yamls/quickstart.yaml"


@pytest.mark.filterwarnings("ignore:FSDP2 Config/APIs are experimental")
@pytest.mark.parametrize(("given", "degree"), [("null", None), ("{data_parallel_replicate_degree: 2}", 2)])
def test_shards_are_replicated_as_often_as_the_recipe_says(given: str, degree: int | None) -> None:
    """Composer makes the device mesh of the degrees that it finds in the config."""
    config = build_parts(load_recipe(RECIPE, [f"parallelism={{fsdp2: {given}}}"])).parallelism["fsdp"]
    assert isinstance(config, FSDP2Config)
    assert (config.data_parallel_replicate_degree, config.data_parallel_shard_degree) == (degree, -1)


def test_one_kind_at_a_time() -> None:
    with pytest.raises(RecipeError, match="expected one of fsdp2, fsdp"):
        build_parts(load_recipe(RECIPE, ["parallelism={fsdp: null, fsdp2: null}"]))
