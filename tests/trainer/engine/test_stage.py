"""The whole stage on two nodes that share nothing but an S3 server: shards in, a committed model out."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer

from headrace_api.artifact import Artifact, ArtifactRef
from headrace_api.contract import ResolvedStage
from headrace_api.run import Storage
from headrace_trainer.formats.model_card import read_card
from headrace_trainer.inputs import fetch
from headrace_trainer.storage import open_store, open_uri
from trainer.data.builders import corpus_config, finish, make_context, prose, write_jsonl
from trainer.engine.gangs import Ended, gang
from trainer.engine.test_model import read_tensors


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="runs")
        yield Storage(uri="s3://runs/one", endpoint=endpoint)
    server.stop()


@pytest.fixture(scope="module")
def shards(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> ArtifactRef:
    folder = tmp_path_factory.mktemp("data")
    texts = write_jsonl(folder / "texts.jsonl", (prose(i, sentences=12) for i in range(300)))
    corpus = finish(make_context(folder, kind="corpus", config=corpus_config(texts), storage=storage))
    config: dict[str, Any] = {"from": {"corpus": "corpus"}, "vocabSize": 500}
    inputs = {"corpus": corpus}
    tokenizer = finish(make_context(folder, kind="tokenizer", config=config, storage=storage, inputs=inputs))
    config = {"from": {"corpus": "corpus", "tokenizer": "tokenizer"}, "validationRatio": 0.1}
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    return finish(make_context(folder, kind="shards", config=config, storage=storage, inputs=inputs))


def resolved(
    storage: Storage, shards: ArtifactRef, *, attempt: int, name: str = "base", **parallelism: int
) -> ResolvedStage:
    shape = {"layers": 2, "hiddenSize": 32, "heads": 4, "kvHeads": 2, "ffnHiddenSize": 64}
    pretrain = {
        "from": {"shards": "shards"},
        "model": shape,
        "tokens": 12 * 8 * 32,
        "sequenceLength": 32,
        "globalBatchSize": 8,
        "precision": "fp32",
        "parallelism": parallelism or {"tensor": 2},
        "schedule": {"learningRate": 1e-2},
        "checkpoint": {"every": 5},
        "validation": {"samples": 4},
    }
    return ResolvedStage.model_validate(
        {
            "run": "two-nodes",
            "stage": {"name": name, "compute": {"nodes": 2}, "pretrain": pretrain},
            "attempt": attempt,
            "seed": 3,
            "hash": "b" * 64,
            "inputs": {"shards": shards},
            "storage": storage,
            "outputUri": f"{storage.uri}/{name}",
        }
    )


def run_node(rank: int, world: int, stage: ResolvedStage, folder: Path, stop: bool = False, broken: str = "") -> Any:
    """One rank on a node of its own; it cannot store keys that end with ``broken``."""
    from headrace_trainer.errors import StorageError
    from headrace_trainer.stage import StageContext, run_stage

    scratch = folder / f"node-{rank}-attempt-{stage.attempt}"
    ctx = StageContext(resolved=stage, scratch=scratch, rank=rank, world=world, index=rank)
    if stop and rank == 1:
        (scratch / "stop").touch()
    put_file = ctx.store.put_file

    def put_or_fail(key: str, path: Path) -> None:
        if broken and key.endswith(broken):
            raise StorageError(f"{key}: 503 slow down")
        put_file(key, path)

    get_file, fetched = ctx.store.get_file, []

    def get_and_tell(key: str, path: Path) -> None:
        fetched.append(key.rpartition("/")[2])
        get_file(key, path)

    ctx.store.put_file, ctx.store.get_file = put_or_fail, get_and_tell  # type: ignore[method-assign]
    outcome = run_stage(ctx)
    return outcome, sorted(fetched)


def test_two_nodes_train_stop_resume_and_commit(tmp_path: Path, storage: Storage, shards: ArtifactRef) -> None:
    stopped = gang(run_node, 2, resolved(storage, shards, attempt=1), tmp_path, True)
    assert [e.error for e in stopped] == ["Stopped", "Stopped"], stopped

    ended: list[Ended] = gang(run_node, 2, resolved(storage, shards, attempt=2), tmp_path)
    assert [e.error for e in ended] == ["", ""], ended
    outcome, _ = ended[0].value
    assert outcome.metrics["steps"] == 12

    found = Artifact.model_validate_json(open_store(storage).get_bytes("base/artifact.json"))
    assert found.digest == outcome.artifact_digest
    paths = {f.path for f in found.files}
    assert {"model.json", "history.jsonl", "tokenizer/tokenizer.json", "checkpoint/metadata.json"} <= paths
    assert {"checkpoint/__0_0.distcp", "checkpoint/__1_0.distcp"} <= paths

    uri = f"{storage.uri}/base"
    ref = ArtifactRef(uri=uri, digest=found.digest, kind=found.kind)
    folder = fetch(open_uri(uri, storage), ref, cache=tmp_path / "cache")
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == list(range(1, 13))
    assert history[-1]["validation_loss"] < history[0]["loss"]
    card, tensors = read_card(folder), read_tensors(folder / "checkpoint")
    assert tensors["embedding.word_embeddings.weight"].shape == (card.padded_vocab_size, 32)
    assert not any(key.startswith("optimizer") for key in tensors)


def test_checkpoints_leave_nothing_on_the_node(tmp_path: Path, storage: Storage, shards: ArtifactRef) -> None:
    stage = resolved(storage, shards, attempt=1, name="tidy")
    ended = gang(run_node, 2, stage, tmp_path)
    assert [e.error for e in ended] == ["", ""], ended
    assert not [p for p in tmp_path.rglob("*.distcp") if "output" not in p.parts]


def test_an_upload_that_failed_is_repeated_and_nothing_is_trained_again(
    tmp_path: Path, storage: Storage, shards: ArtifactRef
) -> None:
    failed = gang(run_node, 2, resolved(storage, shards, attempt=1, name="late"), tmp_path, False, "late/model.json")
    assert failed[0].error == "StorageError"
    ended = gang(run_node, 2, resolved(storage, shards, attempt=2, name="late"), tmp_path)
    assert [e.error for e in ended] == ["", ""], ended
    metrics = ended[0].value[0].metrics
    assert metrics["steps"] == 12
    assert metrics["validationLoss"] > 0
    assert "tokensPerSecond" not in metrics  # no step was run


@pytest.mark.parametrize("parallelism", [{"pipeline": 2}, {"tensor": 1}], ids=["PP2", "DP2"])
def test_a_node_fetches_only_the_files_that_its_ranks_read(
    tmp_path: Path, storage: Storage, shards: ArtifactRef, parallelism: dict[str, int]
) -> None:
    name = f"fetch-{'-'.join(parallelism)}"
    stopped = gang(run_node, 2, resolved(storage, shards, attempt=1, name=name, **parallelism), tmp_path, True)
    assert [e.error for e in stopped] == ["Stopped", "Stopped"], stopped
    ended = gang(run_node, 2, resolved(storage, shards, attempt=2, name=name, **parallelism), tmp_path)
    assert [e.error for e in ended] == ["", ""], ended
    small = [".metadata", "common.pt", "history.jsonl", "metadata.json"]
    for rank, (_, fetched) in enumerate(e.value for e in ended):
        assert fetched == sorted([*small, f"__{rank}_0.distcp"])
