"""What the decoder takes and gives, whatever its matrices are joined into and wherever it runs."""

import pytest
import torch
from support import builders
from support.devices import CPU, DEVICES, GPU, loaded
from torch import nn

from pixtral_cli.model.joining import JOINED

IMG = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixtral")
    builders.pixtral(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return loaded(folder)


def ids_with_images():
    ids = torch.randint(14, 320, (12,), generator=torch.Generator().manual_seed(0))
    ids[[2, 3, 7]] = IMG
    return ids


def causal(layer, q, k, v):
    """Attention of one sequence, spelled out."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("nhd,lhd->hnl", q, k) / q.shape[2] ** 0.5
    hidden = torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@torch.inference_mode()
def test_features_take_the_places_of_image_tokens_told_or_not(folder, device):
    model, ids = loaded(folder, device), ids_with_images().to(device)
    features = torch.randn(3, model.config.text.hidden_size).to(device)
    found = model.embed(ids, features, torch.tensor([2, 3, 7], device=device))
    assert torch.equal(found, model.embed(ids, features))
    assert torch.equal(found[[2, 3, 7]], features)
    others = [place for place in range(12) if place not in (2, 3, 7)]
    assert torch.equal(found[others], model.embed(ids)[others])


@torch.inference_mode()
def test_features_and_places_are_as_many(model):
    with pytest.raises(AssertionError, match="3, 2"):
        model.embed(ids_with_images(), torch.zeros(2, model.config.text.hidden_size))


@pytest.mark.parametrize("device", DEVICES, ids=str)
@torch.inference_mode()
def test_joined_matrices_give_what_their_parts_give(folder, model, device):
    joined = loaded(folder, device)
    for layer in [*joined.language_model.layers, *joined.vision_tower.layers]:
        for block in layer.children():
            if hasattr(block, "qkv_proj"):
                block.qkv_proj = in_one(block.q_proj, block.k_proj, block.v_proj)
            if hasattr(block, "gate_up_proj"):
                block.gate_up_proj = in_one(block.gate_proj, block.up_proj)
    ids, positions = ids_with_images(), torch.arange(12)
    picture = torch.randn(3, 32, 48, generator=torch.Generator().manual_seed(1))
    wanted = model(model.embed(ids), positions, causal)
    found = joined(joined.embed(ids.to(device)), positions.to(device), causal)
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(joined.encode_image(picture).cpu(), model.encode_image(picture), atol=1e-4, rtol=0)


def in_one(*parts):
    weight = torch.cat([part.weight for part in parts])
    one = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    one.weight = nn.Parameter(weight, requires_grad=False)
    return one


@pytest.mark.parametrize("device", [GPU])
@torch.inference_mode()
def test_a_pass_over_plain_ids_is_captured_and_replayed_with_others(folder, device):
    """A CUDA graph of embedding, layers and head: nothing in them waits for the card."""
    model = loaded(folder, device, "bfloat16")
    ids, positions = torch.zeros(5, dtype=torch.long, device=device), torch.arange(5, device=device)

    def logits():
        return model.logits(model(model.embed(ids), positions, lambda layer, q, k, v: q))

    logits()  # kernels are compiled before a graph is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = logits()
    for seed in range(2):
        ids.copy_(torch.randint(14, 320, (5,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert torch.equal(captured, logits())


def test_on_a_cpu_no_matrix_is_there_a_second_time(model):
    """What multiplies several together reads them where they are."""
    assert model.device == CPU
    for block in model.language_model.modules():
        for joined, parts in JOINED.items():
            if (together := getattr(block, joined, None)) is not None:
                read = [matrix.bytes for matrix in together._together._matrices]
                assert read == [getattr(block, part).weight.data_ptr() for part in parts]
