"""The text side of a synthetic bundle: a tokenizer of single bytes and a plain chat template."""

from __future__ import annotations

_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTE_IDS = 256
EOS_IDS = (256, 258)

GENERATION_CONFIG = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.95,
    "eos_token_id": list(EOS_IDS),
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
}
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte value, as byte-level tokenizers spell them: byte b is item b."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


TOKENS = (*byte_alphabet(), *_SPECIALS)  # token id = position


def tokenizer_json() -> str:
    """A byte-level BPE without merges: ids 0..255 are the bytes, then the special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: index for index, token in enumerate(TOKENS[:256])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    text = tokenizer.to_str(pretty=True)
    assert isinstance(text, str)
    return text
