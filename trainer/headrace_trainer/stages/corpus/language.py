"""Which language a text is in, by py3langid: naive Bayes over byte n-grams, a model that ships with the package.

In: a text. Out: an ISO 639 code and its probability.
"""

from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# A few thousand characters decide; the rest of a long document would take a millisecond a kilobyte and change nothing.
_JUDGED_CHARACTERS = 4_000


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """The most probable language of the beginning of ``text``, and its probability in [0, 1]."""
    code, probability = _identifier().classify(text[:_JUDGED_CHARACTERS])
    return str(code), float(probability)


def known_languages() -> list[str]:
    """The codes that ``identify`` can give."""
    return sorted(_identifier().labels)
