"""Tokenizer artifacts with the default chat template, made once."""

import pytest

from headrace_trainer.formats.chat import with_chat_template
from trainer.data.conftest import s3, s3_server  # noqa: F401
from trainer.formats.builders import KINDS, save


@pytest.fixture(scope="session")
def plain_folders(tmp_path_factory):
    """Kind -> an artifact without a template."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(make(), root / kind) for kind, make in KINDS.items()}


@pytest.fixture(scope="session")
def folders(plain_folders, tmp_path_factory):
    """Kind -> the artifact with the default template."""
    root = tmp_path_factory.mktemp("templates")
    for kind, folder in plain_folders.items():
        (root / kind).mkdir()
        with_chat_template(folder, root / kind)
    return {kind: root / kind for kind in plain_folders}
