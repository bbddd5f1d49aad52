"""Tiny byte-level tokenizers with the special tokens and the chat templates' structure of the supported families."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHOWN = "{% for part in message['content'] %}{% if part['type'] == 'video' %}<video>__{% endif %}{% endfor %}"
_ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + _SHOWN.replace("__", "")
    + "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ '\n' + part['text'] }}"
    "{% else %}{% generation %}{{ '\n' + part['text'] }}{% endgeneration %}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_NEXT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _SHOWN.replace("__", "{{ '\n' }}")
    + "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% if message['role'] != 'assistant' %}{{ part['text'] + ' ' }}"
    "{% else %}{% generation %}{{ part['text'] + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image_pad|>",
)
_KINDS = {
    "qwen": (_QWEN_SPECIAL, _QWEN_TEMPLATE, "<|im_end|>", None),
    "onevision": (
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<video>", "<image>"),
        _ONEVISION_TEMPLATE,
        "<|im_end|>",
        None,
    ),
    "next": (("<s>", "</s>", "<video>", "<image>"), _NEXT_TEMPLATE, "</s>", "<s>"),
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of one of the three template styles: 256 bytes, then its special tokens."""
    special, template, eos, bos = _KINDS[kind]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=special[0])
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=special[0])
    made.chat_template = template
    return made
