"""Tiny random checkpoints in the real forms, written by transformers. The oracle's model comes back with the folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Ministral3Config,
    Ministral3ForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads, as in NeMo
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "sliding_window": None,
    "max_position_embeddings": 4096,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "image_size": 1024,
    "patch_size": 16,
}


def pixtral(folder: Path, **text) -> LlavaForConditionalGeneration:
    """A Pixtral of three layers each side, saved into `folder`."""
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**VISION),
        text_config=MistralConfig(**{**TEXT, **text}),
        image_token_index=10,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _save(LlavaForConditionalGeneration, config, folder)


def mistral3(folder: Path, merge: int = 2, tied: bool = False, text=None, **vision) -> Mistral3ForConditionalGeneration:
    """A Mistral 3 of three layers each side, with the text model that the config `text` says. As published, a config
    says nothing of ties, whatever the file holds."""
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**{**VISION, "patch_size": 14, "image_size": 1540, **vision}),
        text_config=text or MistralConfig(**TEXT),
        image_token_index=10,
        spatial_merge_size=merge,
        tie_word_embeddings=tied,
    )
    model = _save(Mistral3ForConditionalGeneration, config, folder)

    def as_published(config):
        del config["tie_word_embeddings"]
        del config["text_config"]["tie_word_embeddings"]

    edit_config(folder, as_published)
    return model


CLIP = {**VISION, "num_hidden_layers": 4, "hidden_act": "quick_gelu", "image_size": 28, "patch_size": 14}
LLAMA = {key: value for key, value in TEXT.items() if key != "sliding_window"}


def llava(folder: Path, text=None, tower=(), **changes) -> LlavaForConditionalGeneration:
    """A LLaVA whose images are two by two patches; its tower has four layers, the decoder three of Llama's."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**{**CLIP, **dict(tower)}),
        text_config=text or LlamaConfig(**LLAMA),
        **{"image_token_index": 10, **changes},
    )
    return _save(LlavaForConditionalGeneration, config, folder)


def mistral(folder: Path, **changes) -> MistralForCausalLM:
    return _save(MistralForCausalLM, MistralConfig(**{**TEXT, **changes}), folder)


def ministral(folder: Path, **changes) -> MinistralForCausalLM:
    """One layer of full attention, then sliding ones."""
    kinds = ["full_attention"] + ["sliding_attention"] * (TEXT["num_hidden_layers"] - 1)
    config = MinistralConfig(**{**TEXT, "sliding_window": 7, "layer_types": kinds, **changes})
    return _save(MinistralForCausalLM, config, folder)


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,  # so that a short text goes far beyond
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}


def ministral3(folder: Path, rope=YARN, **changes) -> Ministral3ForCausalLM:
    """Positions that YaRN scales, and queries that grow with them."""
    return _save(Ministral3ForCausalLM, ministral3_config(rope, **changes), folder)


def ministral3_config(rope=YARN, **changes) -> Ministral3Config:
    return Ministral3Config(**{**TEXT, "rope_parameters": dict(rope), **changes})


DEVSTRAL2 = {**YARN, "factor": 64.0, "mscale_all_dim": 0, "llama_4_scaling_beta": 0}
"""The attention factor is applied, and queries do not grow."""
TEXT_FAMILIES = {
    "nemo": mistral,
    "tied": lambda folder: mistral(folder, tie_word_embeddings=True),
    "sliding": lambda folder: mistral(folder, sliding_window=9),
    "ministral": ministral,
    "ministral 3": ministral3,
    "devstral 2": lambda folder: ministral3(folder, DEVSTRAL2),
    "ungrouped": lambda folder: mistral(folder, num_key_value_heads=8, head_dim=8),
}
"""Each saves a model of text into a folder, and gives transformers' own."""


SEEING_FAMILIES = {
    "pixtral": pixtral,
    "mistral 3": mistral3,
    "ministral 3": lambda folder: mistral3(folder, text=ministral3_config()),
}
"""The same of models that see."""


def _save(kind: type, config, folder: Path):
    torch.manual_seed(0)
    model = kind(config).float().eval()
    with torch.no_grad():  # wide enough that logits differ visibly
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, edit) -> None:
    """Rewrite config.json after `edit(config)` has changed the dictionary in place."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


CONTROLS = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CALLS] "
    "[IMG] <pad> [IMG_BREAK] [IMG_END]"
).split()
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST]
{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}[IMG]{% endif %}{% endfor %}{% endif %}[/INST]
{%- else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""


class HfProcessor:
    """transformers' tokenizer and PIL image processor, put together as `processing_pixtral.py` does.

    transformers' own PixtralProcessor cannot be imported without torchvision, which has no build for the CPU.
    """

    def __init__(self, tokenizer, image_processor, token_size=16):
        self.tokenizer, self.image_processor, self.token_size = tokenizer, image_processor, token_size

    def __call__(self, text, pictures):
        """Inputs for `generate`: each [IMG] of `text` takes the next picture."""
        square = {"height": self.token_size, "width": self.token_size}
        inputs = self.image_processor(pictures, return_tensors="pt", patch_size=square) if pictures else {}
        for height, width in inputs["image_sizes"] if pictures else ():
            rows, columns = int(height) // self.token_size, int(width) // self.token_size
            marks = ("<patches>" * columns + "[IMG_BREAK]") * rows
            text = text.replace("[IMG]", marks.removesuffix("[IMG_BREAK]") + "[IMG_END]", 1)
        ids = self.tokenizer(text.replace("<patches>", "[IMG]"), add_special_tokens=False)["input_ids"]
        return {"input_ids": torch.tensor([ids]), **inputs}


def add_processor(folder: Path, patch: int = 16, merge: int = 1, longest: int = 1024) -> HfProcessor:
    """Give the checkpoint a byte-level tokenizer of TEXT's vocabulary, a chat template and a picture recipe."""
    tokenizer = _add_tokenizer(folder, CONTROLS, CHAT_TEMPLATE)
    pictures = PixtralImageProcessorPil(size={"longest_edge": longest}, patch_size={"height": patch, "width": patch})
    pictures.save_pretrained(folder)
    return HfProcessor(tokenizer, pictures, patch * merge)


VICUNA_TEMPLATE = """{% for message in messages %}{% if message['role'] != 'system' %}
{{- message['role'].upper() + ': ' }}{% endif %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}
{%- for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""
"""The turns of LLaVA-1.5."""


def add_llava_processor(folder: Path, strategy: str = "default", kind=LlavaImageProcessorPil, **pictures):
    """The same for a LLaVA: transformers' own processor, which is saved into the folder."""
    tokenizer = _add_tokenizer(folder, [{"[IMG]": "<image>"}.get(name, name) for name in CONTROLS], VICUNA_TEMPLATE)
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, **pictures}
    processor = LlavaProcessor(
        kind(**sizes),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return HfLlavaProcessor(processor)


class HfLlavaProcessor:
    """transformers' own, asked as HfProcessor is."""

    def __init__(self, whole: LlavaProcessor):
        self.whole, self.tokenizer = whole, whole.tokenizer

    def __call__(self, text, pictures):
        return dict(self.whole(images=pictures or None, text=text, return_tensors="pt"))


def _add_tokenizer(folder: Path, controls, template: str) -> PreTrainedTokenizerFast:
    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT["vocab_size"],
        special_tokens=list(controls),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    whole.train_from_iterator(["what is in the picture? where is the other one? what are these two?"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer
