"""Taking samples out of batches of any make."""

from __future__ import annotations

from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from aemim_algorithm.samples import first_dimension, take_samples


@dataclass
class Record:
    tensor: Tensor
    text: str


class Pair(NamedTuple):
    first: Any
    second: Any


def test_takes_samples_of_every_structure() -> None:
    tensor, index = torch.arange(6).view(3, 2), torch.tensor([2, 0])
    structure = {"a": tensor, "b": [tensor, "text"], "c": Pair(tensor, 1), "d": torch.zeros(5), "e": None}
    taken = take_samples(structure, index, 3)
    expected = tensor[[2, 0]]
    for value in (taken["a"], taken["b"][0], taken["c"].first):
        assert torch.equal(value, expected)
    assert (taken["b"][1], taken["c"].second, taken["e"]) == ("text", 1, None)
    assert taken["d"].shape == (5,)
    own = UserDict(x=tensor)
    assert torch.equal(take_samples(own, index, 3)["x"], expected)
    assert isinstance(take_samples(own, index, 3), UserDict)
    assert torch.equal(own["x"], tensor)
    record = take_samples(Record(tensor, "text"), index, 3)
    assert torch.equal(record.tensor, expected)
    assert record.text == "text"
    assert first_dimension(("text", {"x": tensor})) == 3
    assert first_dimension((torch.zeros(7), torch.zeros(2, 3, 4, 4))) == 2


def test_labels_of_hidden_patches_are_cut_as_their_mask_is() -> None:
    """Hugging Face's BEiT takes one code for each true entry of the mask, in one flat tensor."""
    mask = torch.tensor([[True, False, True], [False, True, False], [True, True, True], [False, False, True]])
    labels = torch.tensor([10, 12, 21, 30, 31, 32, 42])
    batch = {"labels": labels, "bool_masked_pos": mask, "weights": torch.ones(5)}
    taken = take_samples(batch, torch.tensor([0, 2]), 4)
    assert taken["labels"].tolist() == [10, 12, 30, 31, 32]
    assert torch.equal(taken["bool_masked_pos"], mask[[0, 2]])
    assert taken["weights"].shape == (5,)
    # What the cut labels stand for is what they stood for.
    codes = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42]])
    assert torch.equal(taken["labels"], codes[[0, 2]][taken["bool_masked_pos"]])


def test_labels_that_could_be_of_two_kinds_are_refused() -> None:
    index = torch.tensor([0])
    as_many = {"labels": torch.arange(2), "mask": torch.tensor([[True, True], [False, False]])}
    with pytest.raises(ValueError, match="one for each sample or one for each true entry"):
        take_samples(as_many, index, 2)
    two = {
        "labels": torch.arange(3),
        "one": torch.tensor([[True, False], [True, True]]),
        "other": torch.tensor([[True, True], [True, False]]),
    }
    with pytest.raises(ValueError, match="entries of several masks"):
        take_samples(two, index, 2)
    same = {"labels": torch.arange(2), "mask": torch.tensor([[True, False], [False, True]])}
    assert take_samples(same, index, 2)["labels"].tolist() == [0]
