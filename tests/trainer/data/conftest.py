"""An S3 server in this process, and the three data stages over a small corpus, made once."""

from dataclasses import dataclass
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from headrace_api.artifact import ArtifactRef
from headrace_api.run import Storage
from trainer.data.builders import corpus_config, finish, make_context, prose, write_jsonl


@pytest.fixture(scope="session")
def s3_server():
    """The address of an S3 server with the bucket ``bucket``."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A client and the storage block of an empty bucket."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    client = boto3.client("s3", endpoint_url=s3_server, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client, Storage(uri="s3://bucket/run", endpoint=s3_server, region="us-east-1")
    for item in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=item["Key"])


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Artifacts of the three data stages."""

    folder: Path
    corpus: ArtifactRef
    tokenizer: ArtifactRef
    shards: ArtifactRef

    @property
    def storage(self) -> Path:
        return self.folder / "storage"


def run_chain(folder: Path, texts: list[str], *, vocab_size: int = 500, **shards) -> Chain:
    """Corpus, tokenizer and shards over ``texts``."""
    raw = write_jsonl(folder / "raw" / "texts.jsonl", texts)
    corpus = finish(make_context(folder, kind="corpus", config=corpus_config(raw)))
    config = {"from": {"corpus": "corpus"}, "vocabSize": vocab_size}
    tokenizer = finish(make_context(folder, kind="tokenizer", config=config, inputs={"corpus": corpus}))
    inputs = {"corpus": corpus, "tokenizer": tokenizer}
    config = {"from": {"corpus": "corpus", "tokenizer": "tokenizer"}, "validationRatio": 0.1} | shards
    context = make_context(folder, kind="shards", config=config, inputs=inputs)
    return Chain(folder=folder, corpus=corpus, tokenizer=tokenizer, shards=finish(context))


@pytest.fixture(scope="session")
def chain(tmp_path_factory):
    """Three hundred documents, shards of 64 KiB; tests must not write to it."""
    quoting = prose(1) + " The mark <|endoftext|> ends a text, and the log must not end there."
    texts = [*(prose(seed) for seed in range(2, 300)), quoting, prose(300) + " Grüße, 世界 🎉!"]
    return run_chain(tmp_path_factory.mktemp("chain"), texts, shardBytes=2**16)
