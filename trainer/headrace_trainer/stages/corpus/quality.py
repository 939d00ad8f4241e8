"""Quality filter: the Gopher rules (arXiv 2112.11446, table A1) as implemented by datatrove.

In: a text and its language. Out: the first rule it breaks, named as the manifest's field, or None.
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from headrace_api.stages.corpus import Quality, QualityRules

RULES = {
    "gopher_short_doc": "minWords",
    "gopher_long_doc": "maxWords",
    "gopher_below_avg_threshold": "minMeanWordLength",
    "gopher_above_avg_threshold": "maxMeanWordLength",
    "gopher_too_many_hashes": "maxSymbolToWordRatio",
    "gopher_too_many_ellipsis": "maxSymbolToWordRatio",
    "gopher_too_many_bullets": "maxBulletLineRatio",
    "gopher_too_many_end_ellipsis": "maxEllipsisLineRatio",
    "gopher_below_alpha_threshold": "minAlphabeticWordRatio",
    "gopher_enough_stop_words": "minStopWords",
}
"""datatrove's name of a rule -> the field that sets its bound."""


class Words(WordTokenizer):  # type: ignore[misc]  # datatrove has no types
    """Splits words at white space, as Gopher does.

    datatrove's default, spaCy, treats each comma as a word without letters, so that code samples and tables fail
    ``minAlphabeticWordRatio``; it is also many times slower.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(r"\S+", text)]


class QualityJudge:
    """Applies a manifest's ``quality`` block."""

    def __init__(self, quality: Quality) -> None:
        self._english = None if quality.rules is QualityRules.NONE else _gopher(quality, quality.min_stop_words)
        # The stop words are English: any other language would fail that rule.
        self._others = None if quality.rules is QualityRules.NONE else _gopher(quality, 0)

    def broken_rule(self, text: str, *, language: str) -> str | None:
        """The first rule that ``text`` breaks, or None.

        Args:
            text: not empty or all white space.
            language: its ISO 639 code.
        """
        gopher = self._english if language == "en" else self._others
        if gopher is None:
            return None
        verdict = gopher.filter(Document(text=text, id=""))
        return None if verdict is True else RULES[verdict[1]]


def _gopher(quality: Quality, min_stop_words: int) -> GopherQualityFilter:
    return GopherQualityFilter(
        min_doc_words=quality.min_words,
        max_doc_words=quality.max_words,
        min_avg_word_length=quality.min_mean_word_length,
        max_avg_word_length=quality.max_mean_word_length,
        max_symbol_word_ratio=quality.max_symbol_to_word_ratio,
        max_bullet_lines_ratio=quality.max_bullet_line_ratio,
        max_ellipsis_lines_ratio=quality.max_ellipsis_line_ratio,
        max_non_alpha_words_ratio=quality.min_alphabetic_word_ratio,
        min_stop_words=min_stop_words,
        language=Words(),
    )
