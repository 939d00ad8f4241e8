"""KTO without a model: which answers are mismatched, sides of pairs as examples, and figures of each kind."""

from typing import Any

import numpy as np
import pytest

from headrace_trainer.formats.dataset import is_held_back
from headrace_trainer.formats.packs import Document
from headrace_trainer.formats.records import CompletionRecord, PairRecord, Place, sides

PLACE = Place(file="a.jsonl", number=1)


def document(*tokens: int, asked: int) -> Document:
    return Document(tokens=np.array(tokens), mask=np.arange(len(tokens)) >= asked)


def test_each_prompt_gets_the_answer_of_the_one_before() -> None:
    from headrace_trainer.engine.unpaired import mismatched

    documents = [document(1, 2, 11, asked=2), document(3, 12, 13, asked=1), document(4, 5, 6, 14, asked=3)]
    found = mismatched(documents, longest=5)
    assert [d.tokens.tolist() for d in found] == [[1, 2, 14], [3, 11], [4, 5, 6, 12, 13]]
    assert [d.mask.tolist() for d in found] == [[False, False, True], [False, True], [False] * 3 + [True] * 2]
    assert mismatched(documents, longest=4)[2].tokens.tolist() == [4, 5, 6, 12], "cut to the model's length"


def test_a_pair_is_a_wanted_and_an_unwanted_example_on_the_same_side_of_the_split() -> None:
    one, other = sides(PairRecord(place=PLACE, prompt="Two? ", chosen="Yes", rejected="No"))
    assert isinstance(one, CompletionRecord) and isinstance(other, CompletionRecord)
    assert (one.completion, one.label, other.completion, other.label) == ("Yes", True, "No", False)
    for n in range(200):
        both = sides(PairRecord(place=PLACE, prompt=f"{n}? ", chosen="Yes", rejected="No"))
        assert len({is_held_back(side, fraction=0.3) for side in both}) == 1


def test_each_kinds_figures_are_means_over_that_kind() -> None:
    from headrace_trainer.engine.unpaired import UnpairedPreference

    objective: Any = UnpairedPreference(beta=0.1, wanted_weight=1, unwanted_weight=1, fixed=False)
    means = {
        "rewards/chosen": 0.3,
        "rewards/rejected": -0.2,
        "rewards/accuracies": 0.75,
        "logps/chosen": -6.0,
        "logps/rejected": -1.0,
        "wanted": 0.75,
    }
    found = objective.figures(means)
    assert found == pytest.approx(
        {
            "rewards/accuracies": 0.75,
            "rewards/chosen": 0.4,
            "rewards/rejected": -0.8,
            "rewards/margins": 1.2,
            "logps/chosen": -8.0,
            "logps/rejected": -4.0,
        }
    )
    only_wanted = objective.figures(means | {"wanted": 1.0})
    assert set(only_wanted) == {"rewards/accuracies", "rewards/chosen", "logps/chosen"}
