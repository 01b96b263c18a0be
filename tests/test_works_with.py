"""The README's tables are those that the tests' own tables give."""

from __future__ import annotations

from pathlib import Path

import pytest
from combinations import ELSEWHERE, Verdict
from settings import SETTINGS, Setting, every_setting, transformers_installed
from works_with import COMMAND, README, TABLES, between_markers, measured_row, updated

from aemim_algorithm.adapters import apply_adapters
from aemim_algorithm.search import find_encoder


@every_setting
def test_the_encoder_is_found(setting: Setting) -> None:
    model = setting.build()
    if "encoder" in setting.arguments:
        with pytest.raises(ValueError, match=rf"found no encoder.*candidates: {setting.encoder}") as error:
            find_encoder(model)
        assert "\n" not in str(error.value)
    else:
        assert find_encoder(model) == setting.encoder
        apply_adapters(model, "both" if setting.class_token else "norm")
        assert find_encoder(model) == setting.encoder


@pytest.mark.skipif(not transformers_installed, reason="transformers is not installed")
@pytest.mark.parametrize("name", TABLES)
def test_the_readme_is_up_to_date(name: str) -> None:
    text = README.read_text(encoding="utf-8")
    table = TABLES[name]()
    assert between_markers(text, name) == table, f"the README's table is out of date: run `{COMMAND}`"


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    text = "before\n<!-- works-with -->\nold\n<!-- /works-with -->\nafter\n"
    assert updated(text, "works-with", "new\n") == text.replace("old", "new")


@pytest.mark.parametrize("verdict", ELSEWHERE, ids=lambda each: each.name)
def test_every_verdict_has_its_test(verdict: Verdict) -> None:
    file, _, function = verdict.test.partition("::")
    assert f"\ndef {function}(" in Path(__file__).with_name(file).read_text(encoding="utf-8")


def test_a_row_is_measured() -> None:
    cells = [cell.strip() for cell in measured_row(SETTINGS[0]).strip("|\n").split("|")]
    assert cells == ["`MAE`", "`encoder`", "`images`", "yes", "no"]
