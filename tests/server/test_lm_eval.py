"""lm-eval, as people run it, gets from the server the numbers that transformers computes from the same weights."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from pixtral_cli.tiny import FOLDER

CHOICES = ["left", "right", "in the middle of the picture"]
QUESTIONS = [
    {"question": "Where is the red star?", "choices": CHOICES, "answer": 1},
    {"question": "There is a star, and it is", "choices": CHOICES[::-1], "answer": 2},
    {"question": "Hi!", "choices": ["left", "you are", "é 🧀"], "answer": 0},
]
TEXTS = [
    {"page": "The red star is left of the blue circle. " * 30},
    {"page": "I am a small model, and I see shapes."},
]
ASKED = [{"question": text} for text in ("Hello!", "What can you do?", "Who are you?")]
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "talk": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "I",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DATA = {"choose": QUESTIONS, "read": TEXTS, "talk": ASKED}
EVALUATE = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
tasks = TaskManager(include_path=sys.argv[1], include_defaults=False)
always = {"task_manager": tasks, "log_samples": True, "bootstrap_iters": 0}
found = [simple_evaluate(**always, **run) for run in json.loads(sys.argv[2])]
print(json.dumps([{"results": each["results"], "samples": each["samples"]} for each in found], default=str))
"""


@pytest.fixture(scope="module")
def found(server, tmp_path_factory):
    """What each run gives: of tokens with BOS, of texts with BOS, of tokens without it, and in a chat."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, task in TASKS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in DATA[name]))
        files = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **files, **task}))
    args = {"model": "tiny", "tokenizer": str(FOLDER), "tokenizer_backend": "huggingface"}
    completions = {**args, "base_url": server.url + "/v1/completions", "num_concurrent": 4}
    chat = {"model": "tiny", "base_url": server.url + "/v1/chat/completions"}
    reading = {"model": "local-completions", "tasks": ["choose", "read"]}
    runs = [
        {**reading, "model_args": {**completions, "add_bos_token": True}, "batch_size": 2},
        {**reading, "model_args": {**completions, "add_bos_token": True, "tokenized_requests": False}},
        {**reading, "model_args": completions},
        {"model": "local-chat-completions", "model_args": chat, "tasks": ["talk"], "apply_chat_template": True},
    ]
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(folder), json.dumps(runs)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OPENAI_API_KEY": "none"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def oracle():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@torch.no_grad()
def loglikelihood(oracle, before, after):
    """Of tokens that come after others, and whether each is the likeliest."""
    logits = oracle(input_ids=torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    wanted = torch.tensor(after)
    return float(logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("run", [0, 1, 2])
def test_choices_have_the_likelihoods_that_transformers_gives_them(found, oracle, tokenizer, run):
    ids = lambda text: tokenizer(text, add_special_tokens=run < 2).input_ids  # noqa: E731
    right, greedy_ones = 0, 0
    for place, doc in enumerate(QUESTIONS):
        sample = next(each for each in found[run]["samples"]["choose"] if each["doc_id"] == place)
        before = ids(doc["question"])
        wanted = [
            loglikelihood(oracle, before, ids(f"{doc['question']} {choice}")[len(before) :])
            for choice in doc["choices"]
        ]
        told = [(float(score), greedy in (True, "True")) for ((score, greedy),) in sample["resps"]]
        assert [score for score, _ in told] == pytest.approx([score for score, _ in wanted], abs=1e-3)
        assert [greedy for _, greedy in told] == [greedy for _, greedy in wanted]
        greedy_ones += sum(greedy for _, greedy in wanted)
        right += max(range(3), key=lambda choice: wanted[choice][0]) == doc["answer"]
    assert greedy_ones == (1 if run < 2 else 0)
    assert found[run]["results"]["choose"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


@pytest.mark.parametrize("run", [0, 1, 2])
def test_perplexities_are_those_of_transformers(found, oracle, tokenizer, run):
    ids = lambda text: tokenizer(text, add_special_tokens=run < 2).input_ids  # noqa: E731
    total = sum(loglikelihood(oracle, [1], ids(text["page"]))[0] for text in TEXTS)
    words = sum(len(text["page"].split(" ")) for text in TEXTS)
    size = sum(len(text["page"].encode()) for text in TEXTS)
    told = found[run]["results"]["read"]
    assert told["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-4)
    assert told["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-4)
    assert told["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-4)


def test_chats_are_answered_as_transformers_does(found, oracle, tokenizer):
    for place, doc in enumerate(ASKED):
        messages = [{"role": "user", "content": doc["question"]}]
        prompt = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        whole = oracle.generate(**prompt, max_new_tokens=12, do_sample=False)[0]
        wanted = tokenizer.decode(whole[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        sample = next(each for each in found[3]["samples"]["talk"] if each["doc_id"] == place)
        assert sample["resps"] == [[wanted.split("\n\n")[0]]]
