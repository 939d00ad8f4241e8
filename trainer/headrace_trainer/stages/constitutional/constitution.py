"""The principles: read from a file or the manifest, and drawn for a pass over a prompt.

In: the ``constitution`` block. Out: a ``ConstitutionFile``, checked, and its digest; principles by number and pass.
"""

from pydantic import ValidationError

from headrace_api.artifact import canonical_digest
from headrace_api.base import FieldError
from headrace_api.plain_yaml import read_documents
from headrace_api.run import Storage
from headrace_api.stages.constitutional import Constitution, ConstitutionFile, Principle
from headrace_api.words import describe
from headrace_trainer.errors import UserError
from headrace_trainer.formats.files import list_files, local_copy
from headrace_trainer.formats.packs import permutation
from headrace_trainer.rules import check_rule
from headrace_trainer.stage import StageContext

FIELD = "constitutional.constitution"
_MOST_BYTES = 1 << 20


def read_constitution(ctx: StageContext, block: Constitution) -> ConstitutionFile:
    """The principles of the manifest, or of the file that it names.

    Raises:
        UserError: the file is missing, is no constitution, or has another version; or a rule cannot be used.
    """
    if block.uri is None:
        assert block.version is not None, "checked with the manifest"
        found = ConstitutionFile(version=block.version, principles=block.principles)
    else:
        found = _read(block.uri, ctx.resolved.storage, ctx)
        if block.version is not None and block.version != found.version:
            raise UserError(
                f"{FIELD}.version: {block.version!r}: {block.uri} has version {found.version!r}: name that one, "
                "or the file that has yours"
            )
    for principle in found.principles:
        if principle.rule is not None:
            check_rule(principle.rule.rule, field=f"{FIELD}: {principle.name}")
    return found


def digest_of(constitution: ConstitutionFile) -> str:
    """Of everything that it says."""
    return canonical_digest(constitution.dump())


def drawn(constitution: ConstitutionFile, *, seed: int, number: int, index: int) -> Principle:
    """The principle of a pass over a prompt, a function of the arguments alone; passes repeat none before all were drawn.

    Args:
        constitution: the principles.
        seed: of the run.
        number: of the prompt.
        index: of the pass.
    """
    principles = constitution.principles
    order = permutation(len(principles), key=f"{seed}:{number}:principles")
    return principles[int(order[index % len(principles)])]


def _read(uri: str, storage: Storage, ctx: StageContext) -> ConstitutionFile:
    field = f"{FIELD}.uri: {uri!r}"
    files = list_files(uri, storage, field=f"{FIELD}.uri")
    if len(files) > 1:
        raise UserError(f"{field}: is a folder of {len(files)} files: name one file")
    if files[0].bytes > _MOST_BYTES:
        raise UserError(f"{field}: {files[0].bytes:,} bytes: a constitution has at most {_MOST_BYTES:,}: shorten it")
    with local_copy(files[0], storage, scratch=ctx.scratch) as path:
        data = path.read_bytes()
    try:
        documents = read_documents(data.decode("utf-8-sig"))
        if len(documents) != 1:
            raise UserError(f"{field}: holds {len(documents)} documents: write one, with version and principles")
        return ConstitutionFile.model_validate(documents[0])
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: byte {error.start} is not UTF-8: save it as UTF-8 text") from error
    except FieldError as error:
        raise UserError(f"{field}: {error.field}: {error.value}: {error.remedy}") from error
    except ValidationError as error:
        raise UserError(f"{field}: {describe(error.errors()[0], ConstitutionFile)}") from error
