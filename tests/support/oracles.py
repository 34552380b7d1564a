"""The same questions to transformers' models and to ours: prompts, pictures, logits and tokens."""

import torch

from pixtral_cli.engine.request import ImageInput, Request
from pixtral_cli.model.attention import AttendPaged, Span
from pixtral_cli.model.kv_cache import KVCache, pages_for

IMG, IMG_BREAK, IMG_END = 10, 12, 13


def text_ids(length, seed):
    return torch.randint(14, 320, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def image_ids(rows, columns):
    ids = ([IMG] * columns + [IMG_BREAK]) * rows
    return [*ids[:-1], IMG_END]


def picture(rows, columns, seed, side=16):
    """Pixels of rows x columns image tokens, each a square of that side."""
    return torch.randn(3, rows * side, columns * side, generator=torch.Generator().manual_seed(seed))


def prompt_with(grids, side=16):
    """Text and pictures of these grids in turn -> (ids, pictures)."""
    ids, pictures = [1], []
    for index, grid in enumerate(grids):
        ids += text_ids(3, index) + image_ids(*grid)
        pictures.append(picture(*grid, index, side))
    return ids + text_ids(4, 99), pictures


def hf_pictures(pictures):
    """As transformers' processor batches pictures: padded to the largest, with their sizes."""
    height, width = (max(p.shape[axis] for p in pictures) for axis in (1, 2))
    padded = [torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures]
    return {
        "pixel_values": torch.stack(padded),
        "image_sizes": torch.tensor([[p.shape[1], p.shape[2]] for p in pictures]),
    }


@torch.inference_mode()
def our_logits(model, ids, images=()):
    features = torch.cat([model.encode_image(p) for p in images]) if images else None
    pages = list(range(1, pages_for(len(ids)) + 1))[::-1]  # in no order
    cache = KVCache(model.config.text, model.dtype, model.device, len(pages) + 1)
    attend = AttendPaged(model.config.text, cache, [Span(pages, 0, len(ids))], model.device)
    hidden = model(model.embed(torch.tensor(ids), features), torch.arange(len(ids)), attend)
    return model.logits(hidden)


def asked(ids, pictures=(), side=16):
    """A request for 24 tokens."""
    images = [ImageInput(p.numpy().tobytes(), p.shape[1] * p.shape[2] // side**2, lambda p=p: p) for p in pictures]
    return Request(tuple(ids), 24, images=tuple(images))


def our_tokens(engine, requests):
    places = {engine.submit(request): [] for request in requests}
    while engine.busy:
        for event in engine.step():
            places[event.request_id].append(event.token_id)
    return list(places.values())


def assert_answers_as(ours, hf, processor, messages):
    """That the answer, of 24 tokens, has transformers' prompt, tokens and log-probabilities."""
    pictures = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text, pictures)
    ids, vocabulary = inputs["input_ids"][0].tolist(), hf.config.get_text_config().vocab_size
    hf.generation_config.eos_token_id = None  # as ignore_eos
    with torch.no_grad():
        expected = hf.generate(
            **inputs, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    reply = ours.chat(messages, max_new_tokens=24, ignore_eos=True, logprobs=vocabulary)
    assert reply.prompt_token_ids == ids
    assert reply.token_ids == expected.sequences[0, len(ids) :].tolist()
    for entry, logits in zip(reply.logprobs, expected.logits, strict=True):
        found = {top.token_id: top.logprob for top in entry.top}
        logprobs = torch.tensor([found[token] for token in range(vocabulary)])
        torch.testing.assert_close(logprobs, logits[0].log_softmax(-1), atol=1e-4, rtol=0)


def hf_tokens(hf, ids, **pictures):
    hf.generation_config.eos_token_id = None  # as ignore_eos
    out = hf.generate(torch.tensor([ids]), **pictures, max_new_tokens=24, do_sample=False)
    return out[0, len(ids) :].tolist()
