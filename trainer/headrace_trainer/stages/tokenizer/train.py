"""Train a byte-level BPE tokenizer like GPT-2's: split with its regular expression, merge the most frequent pairs.

In: texts. Out: a ``Tokenizer``, equal for equal texts. Every string round-trips, since all 256 bytes are tokens.
"""

import hashlib
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from headrace_trainer.errors import UserError
from headrace_trainer.formats.documents import Document
from headrace_trainer.formats.tokenizer import END_OF_TEXT

# A pair that occurs once would make the tokenizer memorise one document.
_LEAST_FREQUENCY = 2


def byte_level_bpe(model: models.BPE) -> Tokenizer:
    """A tokenizer that applies ``model`` after GPT-2's pre-tokenization."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Learn ``vocab_size`` tokens; id 0 is the end of text.

    Raises:
        UserError: the texts have too few repeated pairs for that many tokens.
    """
    tokenizer = byte_level_bpe(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_LEAST_FREQUENCY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(
            f"tokenizer.vocabSize: {vocab_size}: the corpus supports at most {found} tokens; "
            f"set vocabSize to {found} or less, or give the corpus stage more text"
        )
    return tokenizer


def sample_texts(documents: Iterable[Document], *, part: float, max_bytes: int) -> Iterator[str]:
    """A sample of texts from the whole corpus, chosen by the hash of their ids.

    Args:
        documents: in any order, which is kept.
        part: the fraction of the corpus to sample, in (0, 1].
        max_bytes: where to stop, in UTF-8 bytes; the text that crosses it is still included.
    """
    given = 0
    for document in documents:
        if given >= max_bytes:
            return
        if part >= 1 or _uniform(document.id) < part:
            given += len(document.text.encode())
            yield document.text


def _uniform(key: str) -> float:
    """A number in [0, 1) derived from ``key`` alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48
