"""`Pixtral` from end to end: messages and pictures in, the very tokens of transformers out."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from support import builders
from support.processes import wait_until

from pixtral_cli import GenerationOptions, Pixtral, PixtralError
from pixtral_cli.errors import ModelError, RequestError
from pixtral_cli.prompt.image import PreparedImage, prepare

OPTIONS = {"max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """(folder, transformers' processor, transformers' model)"""
    folder = tmp_path_factory.mktemp("pixtral")
    model = builders.pixtral(folder)
    model.generation_config.eos_token_id = None
    return folder, builders.add_processor(folder), model


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def ours(oracle, request):
    return Pixtral.load(oracle[0], quantization_encoding="float32", devices=request.param)


def noise(width, height, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def user(*parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return {"role": "user", "content": content}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "what is this? où ça 🙂"}],
    "picture": [user(noise(70, 40), "what is in the picture?")],
    "pictures": [user("what are", noise(200, 33, 1), "and", noise(16, 100, 2), "?")],
    "large": [user(noise(1300, 500, 3), "?")],
    "turns": [
        user(noise(64, 64, 4), "what is in the picture?"),
        {"role": "assistant", "content": "two of these"},
        user("where is the other one?", noise(20, 90, 5)),
    ],
}


def expected(oracle, messages):
    """(prompt ids, 24 greedy tokens) by transformers alone."""
    _, processor, model = oracle
    parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False)
    return generated(model, processor(text, [part["image"] for part in parts if part["type"] == "image"]))


def generated(model, inputs):
    ids = inputs["input_ids"][0].tolist()
    return ids, model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_gives_the_ids_and_greedy_tokens_of_transformers(oracle, ours, name):
    ids, tokens = expected(oracle, CONVERSATIONS[name])
    reply = ours.chat(CONVERSATIONS[name], **OPTIONS)
    assert reply.prompt_token_ids == ids
    assert reply.token_ids == tokens
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), 24)
    assert reply.usage.image_tokens == sum(ids.count(control) for control in (10, 12, 13))
    assert reply.finish_reason == "length"


def test_a_batch_keeps_its_order_and_every_answer(oracle):
    ours = Pixtral.load(oracle[0], devices="cpu", max_batch_size=3)
    replies = ours.chat_batch(list(CONVERSATIONS.values()), **OPTIONS)
    assert [reply.token_ids for reply in replies] == [expected(oracle, c)[1] for c in CONVERSATIONS.values()]


def test_complete_puts_pictures_first_and_uses_no_template(oracle, ours):
    _, processor, model = oracle
    picture = noise(70, 40)
    ids, tokens = generated(model, processor("<s>[IMG]The above image presents a", [picture]))
    reply = ours.complete("The above image presents a", images=[picture], **OPTIONS)
    assert (reply.prompt_token_ids, reply.token_ids) == (ids, tokens)


def test_streamed_text_is_the_whole_text(ours):
    events = list(ours.stream(CONVERSATIONS["picture"], max_new_tokens=60, ignore_eos=True, temperature=1.5, seed=3))
    reply = events[-1].reply
    assert "".join(event.text for event in events) == reply.text
    assert [event.token_id for event in events] == reply.token_ids
    assert all(event.reply is None and event.finish_reason is None for event in events[:-1])
    whole = b"".join(ours.processor.tokenizer.token_bytes(i) for i in reply.token_ids).decode("utf-8", "replace")
    assert reply.text == whole


def test_an_event_has_a_hash_and_a_dict(ours):
    event, *_ = ours.stream(CONVERSATIONS["text"], **OPTIONS)
    assert {event: "it"}[event] == "it" and vars(event)["text"] == event.text


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(ours):
    def answer(seed):
        return ours.chat(CONVERSATIONS["text"], temperature=1.0, seed=seed, **OPTIONS).token_ids

    assert answer(1) == answer(1) != answer(2)


def test_temperature_alone_switches_top_k_off(ours):
    greedy = ours.chat(CONVERSATIONS["text"], **OPTIONS).token_ids
    assert ours.chat(CONVERSATIONS["text"], temperature=9.0, seed=1, **OPTIONS).token_ids != greedy
    assert ours.chat(CONVERSATIONS["text"], temperature=9.0, top_k=1, seed=1, **OPTIONS).token_ids == greedy
    assert ours.chat(CONVERSATIONS["text"], temperature=0, **OPTIONS).token_ids == greedy


def test_a_stop_string_across_tokens_ends_the_answer_before_it(ours):
    whole = ours.chat(CONVERSATIONS["picture"], max_new_tokens=60, ignore_eos=True, temperature=1.0, seed=5)
    pieces = [ours.processor.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in whole.token_ids]
    start = next(i for i in range(5, 50) if all(p.isascii() and p for p in pieces[i : i + 2]))
    stop = pieces[start][-1] + pieces[start + 1][0]
    cut = ours.chat(CONVERSATIONS["picture"], max_new_tokens=60, ignore_eos=True, temperature=1.0, seed=5, stop=[stop])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.token_ids) <= start + 2


def test_leaving_a_stream_early_frees_the_engine(ours):
    before = ours.engine.counters.generated_tokens
    stream = ours.stream(CONVERSATIONS["picture"], max_new_tokens=2000, ignore_eos=True)
    next(stream)
    stream.close()
    wait_until(lambda: not ours.engine.busy)
    assert ours.engine.table.in_use == 0 and ours.engine.counters.generated_tokens - before < 2000


def test_streams_open_at_once_each_get_what_they_get_alone(ours):
    alone = [ours.chat(CONVERSATIONS[name], **OPTIONS).token_ids for name in ("text", "picture")]
    first, second = (ours.stream(CONVERSATIONS[name], **OPTIONS) for name in ("text", "picture"))
    pairs = [(a.token_id, b.token_id) for a, b in zip(first, second, strict=True)]
    assert [list(tokens) for tokens in zip(*pairs, strict=True)] == alone


def test_a_question_within_a_stream_is_answered_and_the_stream_goes_on(ours):
    alone = ours.chat(CONVERSATIONS["picture"], **OPTIONS).token_ids
    got = []
    for event in ours.stream(CONVERSATIONS["picture"], **OPTIONS):
        ours.chat(CONVERSATIONS["text"], max_new_tokens=2)
        got.append(event.token_id)
    assert got == alone


def test_threads_may_ask_at_once(ours):
    names = list(CONVERSATIONS)
    alone = [ours.chat(CONVERSATIONS[name], **OPTIONS).token_ids for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        replies = list(pool.map(lambda name: ours.chat(CONVERSATIONS[name], **OPTIONS), names))
    assert [reply.token_ids for reply in replies] == alone


def test_a_stream_that_cannot_begin_says_so_when_it_is_asked_for(oracle):
    short = Pixtral.load(oracle[0], devices="cpu", max_length=40)
    with pytest.raises(RequestError, match="context"):
        short.stream(CONVERSATIONS["pictures"])


def test_pictures_become_pixels_only_when_their_turn_comes_and_only_once(oracle, monkeypatch):
    ours = Pixtral.load(oracle[0], quantization_encoding="float32", devices="cpu")
    made = []
    original = PreparedImage.pixels
    monkeypatch.setattr(PreparedImage, "pixels", lambda image: made.append(image) or original(image))
    stream = ours.stream(CONVERSATIONS["pictures"], **OPTIONS)
    assert made == []
    list(stream)
    assert len(made) == 2
    list(ours.stream(CONVERSATIONS["pictures"], **OPTIONS))
    assert len(made) == 2


def test_an_end_token_ends_the_answer_and_shows_nothing(oracle, ours):
    plain = ours.chat(CONVERSATIONS["text"], **OPTIONS)
    folder = oracle[0]
    path = folder / "generation_config.json"
    before = path.read_text()
    end = plain.token_ids[6]
    try:
        path.write_text(f'{{"eos_token_id": [{end}, 319]}}')
        reply = Pixtral.load(folder, devices="cpu").chat(CONVERSATIONS["text"], max_new_tokens=24)
    finally:
        path.write_text(before)
    assert reply.token_ids == plain.token_ids[: plain.token_ids.index(end) + 1]
    assert reply.finish_reason == "stop"


def test_log_probabilities_come_with_tokens_and_alternatives(oracle, ours):
    ids, tokens = expected(oracle, CONVERSATIONS["text"])
    with torch.no_grad():
        wanted = oracle[2](torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    reply = ours.chat(CONVERSATIONS["text"], logprobs=2, **OPTIONS)
    assert [entry.token_id for entry in reply.logprobs] == tokens
    assert reply.logprobs[0].logprob == pytest.approx(float(wanted[tokens[0]]), abs=1e-4)
    assert [top.token_id for top in reply.logprobs[0].top] == wanted.topk(2).indices.tolist()
    assert ours.chat(CONVERSATIONS["text"], **OPTIONS).logprobs is None


def test_an_answer_ends_where_the_context_ends(oracle):
    ours = Pixtral.load(oracle[0], devices="cpu", max_length=40)
    reply = ours.chat(CONVERSATIONS["text"], ignore_eos=True)
    assert reply.usage.prompt_tokens + reply.usage.completion_tokens == 40
    assert reply.finish_reason == "length"


def test_a_prompt_longer_than_the_context_says_both_numbers(oracle, ours):
    short = Pixtral.load(oracle[0], devices="cpu", max_length=40)
    tokens = len(ours.source.chat(CONVERSATIONS["pictures"]).token_ids)
    with pytest.raises(RequestError, match=rf"{tokens} tokens.*40"):
        short.chat(CONVERSATIONS["pictures"])


def test_a_text_model_refuses_pictures(tmp_path):
    builders.mistral(tmp_path)
    builders.add_processor(tmp_path)
    ours = Pixtral.load(tmp_path, devices="cpu")
    assert ours.chat(CONVERSATIONS["text"], **OPTIONS).token_ids
    with pytest.raises(RequestError, match="text model"):
        ours.chat(CONVERSATIONS["picture"])


def test_a_token_that_the_model_does_not_know_is_told(tmp_path):
    builders.mistral(tmp_path, vocab_size=100)
    builders.add_processor(tmp_path)
    with pytest.raises(RequestError, match="100"):
        Pixtral.load(tmp_path, devices="cpu").chat(CONVERSATIONS["text"])


@pytest.mark.parametrize("ends", ['"x"', "{}", "[null]", "1000000000", "[[1]]"])
def test_end_tokens_that_are_none_are_told_while_loading(tmp_path, ends):
    builders.mistral(tmp_path)
    builders.add_processor(tmp_path)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    with pytest.raises(ModelError, match="eos_token_id"):
        Pixtral.load(tmp_path, devices="cpu")


def test_a_temperature_next_to_nothing_is_greedy(ours):
    greedy = ours.chat(CONVERSATIONS["text"], **OPTIONS).token_ids
    assert ours.chat(CONVERSATIONS["text"], temperature=1e-38, seed=1, **OPTIONS).token_ids == greedy


def test_a_tokenizer_of_another_model_is_told_before_a_question(oracle, tmp_path):
    builders.pixtral(tmp_path)
    builders.add_processor(tmp_path)
    builders.edit_config(tmp_path, lambda config: config.update(image_token_index=77))
    with pytest.raises(ModelError, match="77"):
        Pixtral.load(tmp_path, devices="cpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"quantization_encoding": "int7"}, "int7"),
        ({"max_length": 999999}, "999999"),
        ({"max_length": -5}, "max_length"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_ce_batch_size": 0}, "max_ce_batch_size"),
        ({"devices": "tpu"}, "tpu"),
        ({"devices": "gpu-63"}, "GPU|gpu-63"),
    ],
)
def test_what_cannot_be_loaded_as_asked_is_one_sentence(oracle, arguments, sentence):
    with pytest.raises(PixtralError, match=sentence):
        Pixtral.load(oracle[0], **arguments)


OUT_OF_RANGE = [
    {"temperature": -1},
    {"temperature": float("nan")},
    {"top_p": -0.1},
    {"top_k": -2},
    {"min_p": 2},
    {"max_new_tokens": 0},
    {"repetition_penalty": 0},
    {"stop": [""]},
    {"temperature": "0.7"},
    {"top_k": 2.5},
    {"max_new_tokens": 1.5},
    {"stop": [5]},
    {"stop": 5},
    {"seed": 2**65},
    {"logprobs": -1},
    {"logprobs": "x"},
    {"top_p": None},
    {"nosuch": 1},
]


@pytest.mark.parametrize("options", OUT_OF_RANGE, ids=str)
def test_an_option_out_of_range_is_named(ours, options):
    with pytest.raises(RequestError, match=next(iter(options))):
        ours.chat(CONVERSATIONS["text"], **options)


def test_a_top_p_of_nothing_is_greedy_whatever_the_temperature(ours):
    greedy = ours.chat(CONVERSATIONS["text"], max_new_tokens=8).token_ids
    assert ours.chat(CONVERSATIONS["text"], max_new_tokens=8, temperature=5.0, top_p=0).token_ids == greedy


def test_other_ways_to_switch_off_what_chooses_change_nothing(ours):
    options = {"max_new_tokens": 8, "temperature": 2.0, "seed": 3}
    assert GenerationOptions(seed=-1).sampling == GenerationOptions().sampling
    asked = [ours.chat(CONVERSATIONS["text"], **options, top_k=k).token_ids for k in (0, -1)]
    assert asked[0] == asked[1]


def test_a_picture_in_low_detail_is_seen_smaller_and_by_itself(ours):
    """Of one picture, the features in low detail and in full are not taken for each other's."""
    image = Image.effect_noise((96, 1200), 90).convert("RGB")

    def answer(**detail):
        part = {"type": "image_url", "image_url": {"url": image, **detail}}
        reply = ours.chat([{"role": "user", "content": [part]}], max_new_tokens=8, logprobs=True)
        return reply.usage.image_tokens, [entry.logprob for entry in reply.logprobs]

    def same(one, other):  # on a card a prompt that is cached is computed in other sums
        return one[0] == other[0] and one[1] == pytest.approx(other[1], abs=1e-5)

    full, low, high = answer(), answer(detail="low"), answer(detail="high")
    assert same(full, high) and same(full, answer(detail="auto")) and same(low, answer(detail="low"))
    assert low[0] < full[0] and not same((0, low[1]), (0, full[1]))


def test_the_older_parameter_names_load_as_the_newer(oracle, ours, tmp_path):
    """`language_model.model…`, `vision_tower…`, as the published pixtral-12b has them."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(oracle[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    older = {
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }

    def rename(name):
        known = [prefix for prefix in older if name.startswith(prefix)]
        return older[known[0]] + name.removeprefix(known[0]) if known else name

    save_file({rename(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    reply = Pixtral.load(tmp_path, devices="cpu").chat(CONVERSATIONS["picture"], **OPTIONS)
    assert reply.token_ids == ours.chat(CONVERSATIONS["picture"], **OPTIONS).token_ids


def test_a_large_picture_is_let_go_of_before_the_next_is_opened(ours, monkeypatch):
    large, alive, most = Image.new("RGB", (3000, 200), "teal"), [], []

    @contextmanager
    def opened(source):
        picture = large.copy()
        alive.append(weakref.ref(picture))
        most.append(sum(each() is not None for each in alive))
        yield picture

    expected = prepare(large, "hf", ours.processor.spec).pixels()
    monkeypatch.setattr(ours.processor, "open_image", opened)
    content = [{"type": "image", "image": f"{number}.png"} for number in range(4)]
    prompt = ours.source.chat([{"role": "user", "content": content}])
    assert most == [1] * 4
    for picture in ours.jobs(prompt, GenerationOptions())[0][0].images:
        torch.testing.assert_close(picture.pixels(), expected, rtol=0, atol=0)
