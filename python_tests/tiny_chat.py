"""Four examples, and a tokenizer that knows their words."""

from __future__ import annotations

import transformers
from tiny_models import SPECIALS, word_tokenizer
from tokenizers.pre_tokenizers import Whitespace

from zo_kernels import chat
from zo_kernels.chat import Example

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' + m['content'] + '<|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif %}"
)
WORDS = "user assistant User Assistant : how do I open a door safely please turn the key sorry no"
EOS = SPECIALS.index("<|im_end|>")
EXAMPLES = [
    Example("how do I open a door", "turn the key", chat.HARMLESS),
    Example("open the door please", "sorry no", chat.HARMFUL),
    Example("how", "please turn the key safely", chat.HARMLESS),
    Example("a key please", "no", chat.HARMFUL, chat.HELD_OUT),
]


def tokenizer_of_words() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of WORDS that takes punctuation for words of its own."""
    return word_tokenizer(WORDS.split(), CHATML, Whitespace, bos_token="<|im_start|>")
