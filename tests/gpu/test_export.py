"""A model trained on the GPU, loaded by transformers and vLLM."""

from pathlib import Path

import pytest

from benchmarks.gpu import pieces
from benchmarks.gpu.processes import FreshProcesses
from benchmarks.training import Training
from headrace_api.model import Architecture

TOKENS = 24


@pytest.fixture(scope="module")
def fresh() -> FreshProcesses:
    return FreshProcesses(on_gpu=True)


@pytest.fixture(scope="module")
def exported(fresh: FreshProcesses, tmp_path_factory: pytest.TempPathFactory) -> Path:
    training = Training(
        architecture=Architecture(layers=4, hidden_size=256, heads=4, kv_heads=2, ffn_hidden_size=512),
        vocab_size=256,
        length=256,
        global_batch=32,
        micro_batch=32,
        steps=200,
        learning_rate=2e-3,
    )
    return Path(fresh(pieces.train_and_export, training, str(tmp_path_factory.mktemp("export"))))


def test_transformers_continues_source_text_with_source_text(fresh: FreshProcesses, exported: Path) -> None:
    continued = fresh(pieces.greedy_by_transformers, str(exported), TOKENS)
    assert [len(tokens) for tokens in continued] == [TOKENS] * len(pieces.PROMPTS)
    text = bytes(token for tokens in continued for token in tokens)
    assert sum(chr(byte).isprintable() or byte == 10 for byte in text) > 0.95 * len(text)


def test_vllm_gives_the_tokens_of_transformers(fresh: FreshProcesses, exported: Path) -> None:
    assert pieces.has_vllm(), "install vLLM beside the project: what is exported is to be served by it"
    expected = fresh(pieces.greedy_by_transformers, str(exported), TOKENS)
    found = fresh(pieces.greedy_by_vllm, str(exported), TOKENS)["tokens"]
    # In bf16 two tokens may be equally likely, and a continuation differs from there on.
    first = [(ours[0], theirs[0]) for ours, theirs in zip(found, expected, strict=True)]
    assert all(ours == theirs for ours, theirs in first)
