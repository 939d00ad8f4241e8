"""Records -> token documents, by the tokenizer artifact's chat template: ``template`` renders, ``tokens`` tokenizes apart
what is trained on, ``encode`` does it for each shape of record.
"""

from headrace_trainer.formats.chat.encode import Encoded, Encoder
from headrace_trainer.formats.chat.template import DEFAULT_TEMPLATE, ChatTemplate, Rendered, with_chat_template
from headrace_trainer.formats.chat.tokens import Piece, Pieces, TextTokenizer

__all__ = [
    "DEFAULT_TEMPLATE",
    "ChatTemplate",
    "Encoded",
    "Encoder",
    "Piece",
    "Pieces",
    "Rendered",
    "TextTokenizer",
    "with_chat_template",
]
