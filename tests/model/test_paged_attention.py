"""Attention on a card, against a dense softmax in float64: Triton's kernels in its interpreter, compiled for cards that
are not here, and on a card that is here."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_attention import dense
from support.interpreter import CARDS, compile_for, interpreted
from torch import Tensor

from pixtral_cli.model.attention import AttendOnCard, AttendPaged, Span
from pixtral_cli.model.config import TextConfig
from pixtral_cli.model.kv_cache import PAGE, KVCache, Layout, decode, encode, pages_for

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FORMS = {"no groups": (3, 3, 16), "pairs": (4, 2, 8), "fours": (8, 2, 32), "sixes": (6, 1, 24), "wide": (4, 4, 80)}
"""Query heads, key heads, head_dim."""
WINDOWS = (None, 1, 5, 2 * PAGE + 3)
LENGTHS = [0, 1, PAGE - 1, PAGE, PAGE + 1, 64, 65, 129, 300]
"""Tokens in the cache: around the ends of pages, of blocks, and of what one program takes."""
LAYER = 1


class Step:
    """New tokens of sequences, each after some in the cache, with the pages strewn; the first `decoding` have one."""

    def __init__(self, form, new, before, decoding, window=None, kept="auto", dtype=torch.float32, device=CPU):
        self.heads, self.kv_heads, self.dim = form
        self.new, self.before, self.decoding, self.window, self.kept = new, before, decoding, window, kept
        self.dtype, self.device = dtype, device
        self.config = TextConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2, num_heads=self.heads,
            num_kv_heads=self.kv_heads, head_dim=self.dim, norm_eps=1e-5, rope_theta=1e4, max_length=999,
            sliding_windows=(None, window), tied_embeddings=False,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(sum(before) + sum(new))
        needed = [pages_for(past + count) for past, count in zip(before, new, strict=True)]
        self.pool = sum(needed) + 3
        order = torch.randperm(self.pool, generator=generator).tolist()
        self.pages = [[order.pop() for _ in range(count)] for count in needed]
        self.scratch = order.pop()
        sizes = [heads * self.dim for heads in (self.heads, self.kv_heads, self.kv_heads)]
        self.sequences = [
            [x.unflatten(1, (-1, self.dim)) for x in joined.split(sizes, 1)]  # q, k, v: views of one matrix
            for joined in (
                torch.randn(past + count, sum(sizes), generator=generator).to(dtype)
                for past, count in zip(before, new, strict=True)
            )
        ]
        for q, _, _ in self.sequences:
            q.mul_(2)  # scores apart from each other

    def cache(self) -> KVCache:
        """With what came before; the rest is not a number, so that whoever reads it shows it."""
        kv_cache = KVCache(self.config, self.dtype, self.device, self.pool, self.kept)
        kv_cache._store.fill_(127 if self.kept == "fp8" else torch.nan)
        if kv_cache._exponents is not None:
            kv_cache._exponents.fill_(100)
        for (_, k, v), pages, past in zip(self.sequences, self.pages, self.before, strict=True):
            slots = torch.tensor(Span(pages, 0, past).new_slots, dtype=torch.long, device=self.device)
            kv_cache.write(LAYER, slots, k[:past].to(self.device), v[:past].to(self.device))
        return kv_cache

    def layout(self, padding: int = 0) -> Layout:
        """With rows for nobody after those that decode."""
        longest = max(map(len, self.pages))
        table = [pages + [self.scratch] * (longest - len(pages)) for pages in self.pages]
        places = [
            (row, past + n)
            for row, (past, count) in enumerate(zip(self.before, self.new, strict=True))
            for n in range(count)
        ]
        places[self.decoding : self.decoding] = [(len(table), 0)] * padding
        prefill = range(self.decoding, len(self.new))
        return Layout(
            page_table=self._on_card([*table, [self.scratch] * longest]),
            rows=self._on_card([row for row, _ in places]),
            positions=self._on_card([position for _, position in places]),
            decoding=self.decoding + padding,
            prefill_rows=self._on_card(list(prefill)),
            before=self._on_card([self.before[row] for row in prefill]),
            starts=self._on_card([sum(self.new[self.decoding : row]) for row in (*prefill, len(self.new))]),
        )

    def _on_card(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def qkv(self, padding: int = 0) -> list[Tensor]:
        joined = torch.cat([torch.cat(each, 1)[past:] for each, past in zip(self.sequences, self.before, strict=True)])
        joined = torch.cat(
            [joined[: self.decoding], joined.new_ones(padding, *joined.shape[1:]), joined[self.decoding :]]
        )
        return list(joined.to(self.device).split([self.heads, self.kv_heads, self.kv_heads], 1))

    def plain(self, kv_cache: KVCache) -> Tensor:
        spans = [Span(*each) for each in zip(self.pages, self.before, self.new, strict=True)]
        return AttendPaged(self.config, kv_cache, spans, self.device)(LAYER, *self.qkv()).cpu()

    def exact(self) -> Tensor:
        """What the new tokens get, in float64."""
        mixed = []
        for (q, *kv), past in zip(self.sequences, self.before, strict=True):
            k, v = kv if self.kept == "auto" else [decode(*encode(x), self.dtype) for x in kv]
            apart = torch.arange(past, len(q))[:, None] - torch.arange(len(q))
            mixed.append(dense(q[past:], k, v, (apart >= 0) & (apart < (self.window or len(q)))))
        return torch.cat(mixed)

    def close(self, found: Tensor, wanted: Tensor) -> None:
        """Float32 up to the order of its sums; bfloat16 weights and results are rounded."""
        assert found.dtype == self.dtype
        sums = 2e-6 if found.device.type == "cpu" else 1e-5  # a card's exponential is a little less exact
        tolerance = sums if self.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(found.cpu().double(), wanted, atol=tolerance, rtol=tolerance)

    def check(self) -> None:
        """Against the definition, and what is then in the store against what the plain path writes."""
        found, wanted = self.cache(), self.cache()
        attend = AttendOnCard(self.config, found, self.layout())
        self.close(attend(LAYER, *self.qkv()), self.exact())
        self.plain(wanted)
        for mine, plain in zip(found.layer(LAYER), wanted.layer(LAYER), strict=True):
            assert mine is None or torch.equal(mine.nan_to_num(5.0), plain.nan_to_num(5.0))


def decoding(form, window, **kwargs) -> Step:
    return Step(form, [1] * len(LENGTHS), LENGTHS, len(LENGTHS), window, **kwargs)


@interpreted
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_tokens_that_decode_may_follow_one_another_in_any_order_of_rows(window, kept):
    """Who comes later sees who comes before, though its row be computed first."""
    new = [1, 3, 8, 2]
    step = Step(FORMS["fours"], new, [100, PAGE - 1, 33, 0], sum(new), window, kept=kept)
    layout = step.layout()
    layout = replace(layout, rows=layout.rows.flip(0), positions=layout.positions.flip(0), successive=True)
    attend = AttendOnCard(step.config, step.cache(), layout)
    step.close(attend(LAYER, *(x.flip(0) for x in step.qkv())).flip(0), step.exact())


def prefilling(form, window, **kwargs) -> Step:
    return Step(form, [20, 1, 33, 7, 70], [0, PAGE, 65, 31, 0], 0, window, **kwargs)


def both(form, window, **kwargs) -> Step:
    return Step(form, [1, 1, 20, 1, 30], [100, 0, 33, 7, 0], 2, window, **kwargs)


STEPS = {"decoding": decoding, "prefill": prefilling, "both": both}
ALL_STEPS = pytest.mark.parametrize("step", STEPS)
EACH_ALONE = pytest.mark.parametrize("step", ["decoding", "prefill"])


@interpreted
@EACH_ALONE
@pytest.mark.parametrize("form", FORMS)
def test_every_grouping_of_heads_attends_as_a_dense_softmax_says(step, form):
    STEPS[step](FORMS[form], None).check()


@interpreted
@EACH_ALONE
@pytest.mark.parametrize("window", WINDOWS[1:])
def test_a_window_hides_what_is_further_back(step, window):
    STEPS[step](FORMS["fours"], window).check()


@interpreted
@ALL_STEPS
@pytest.mark.parametrize(
    ("dtype", "native"), [(torch.float32, False), (torch.bfloat16, True)], ids=["by hand", "natively"]
)
def test_8_bit_keys_and_values_are_those_of_the_plain_path(dtype, native, step):
    """However a card makes numbers of them."""
    from pixtral_cli.model import paged_attention

    card = paged_attention.card(CPU)._replace(native_e4m3=native)
    with patch.object(paged_attention, "card", lambda device: card):
        STEPS[step](FORMS["pairs"], 70, kept="fp8", dtype=dtype).check()


@interpreted
@pytest.mark.parametrize("programs", [1, 3, 64])
def test_any_number_of_programs_shares_the_work_of_decoding(programs):
    from pixtral_cli.model import paged_attention

    step = decoding(FORMS["fours"], None)
    attend = AttendOnCard(step.config, step.cache(), step.layout())
    attend._scratch = paged_attention.scratch(*FORMS["fours"], CPU, programs)
    step.close(attend(LAYER, *step.qkv()), step.exact())


@interpreted
def test_a_long_sequence_is_joined_from_more_pieces_than_are_read_at_one_time():
    from pixtral_cli.model import paged_attention

    step = Step((2, 1, 16), [1], [2500], 1)
    attend = AttendOnCard(step.config, step.cache(), step.layout())
    attend._scratch = paged_attention.scratch(2, 1, 16, CPU, programs=64)
    step.close(attend(LAYER, *step.qkv()), step.exact())


@interpreted
@pytest.mark.parametrize("step", ["decoding", "both"])
def test_rows_that_stand_for_nobody_are_finite_and_change_nothing(step):
    step = STEPS[step](FORMS["fours"], 40)
    kv_cache, padding = step.cache(), 3
    q, k, v = step.qkv(padding)
    found = AttendOnCard(step.config, kv_cache, step.layout(padding))(LAYER, q, k, v)
    rows = slice(step.decoding, step.decoding + padding)
    assert torch.equal(found[rows], v[rows].repeat_interleave(4, 1)), "it sees itself alone"
    step.close(torch.cat([found[: rows.start], found[rows.stop :]]), step.exact())


@interpreted
def test_steps_of_any_lengths_attend_as_a_dense_softmax_says():
    lengths = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 150)), min_size=1, max_size=4)

    @settings(max_examples=6, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, 150), max_size=3), lengths, st.none() | st.integers(1, 80))
    def check(decoded, prompts, window):
        new = [1] * len(decoded) + [count for count, _ in prompts]
        Step(FORMS["pairs"], new, decoded + [past for _, past in prompts], len(decoded), window).check()

    check()


def test_8_bit_numbers_are_the_nearest_of_a_scale_that_holds_the_largest():
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    values = values[~values.isnan()]
    x = torch.randn(30, 4, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-15, 20, 30)[:, None, None]
    x[3] = 0
    x[4, :, 0] = 448  # just holds
    x[5, :, 0] = 449
    codes, exponents = encode(x)
    scale = torch.exp2(exponents.double())[..., None]
    assert (x.double().abs() <= 448 * scale).all()
    assert (x.double().abs().amax(-1, keepdim=True) > 224 * scale)[x.abs().amax(-1) > 0].all(), (
        "a smaller scale would do"
    )
    off = (x.double() / scale - codes.double()).abs()
    nearest = (x.double().flatten()[:, None] / scale.expand_as(x).flatten()[:, None] - values).abs().amin(1)
    assert torch.equal(off.flatten(), nearest)
    assert torch.equal(decode(codes, exponents, torch.bfloat16).double(), codes.double() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cpu_keeps_8_bits_as_well(dtype):
    step = Step(FORMS["fours"], [1, 1, 20, 50], [100, 0, 33, 0], 2, kept="fp8", dtype=dtype)
    step.close(step.plain(step.cache()), step.exact())


# ---- for cards --------------------------------------------------------------------------------------------------

SHARED = {80: 163 << 10, 90: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that a program may have on a card of each capability."""
TYPES = {
    **dict.fromkeys(("page_table", "rows", "positions", "before", "starts"), "*i32"),
    **dict.fromkeys(("part_mixed", "part_peaks", "part_totals"), "*fp32"),
    **dict.fromkeys(("window", "batch", "sequences", "table_stride", "first", "programs"), "i32"),
    **dict.fromkeys(("q_stride", "k_stride", "v_stride"), "i32:16"),
    "scale": "fp32",
}
EVERYWHERE = [
    ("_join", "bf16", False, False), ("_write", "bf16", False, False), ("_write", "bf16", True, False),
    ("_decode", "bf16", True, True), ("_prefill", "bf16", False, True),
]  # fmt: skip
"""Kernel, dtype of activations, whether keys and values are coded, whether there is a window: on every card."""
NEARLY_THOSE = [("_decode", "bf16", False, False), ("_prefill", "bf16", False, False)]
LONGEST = [("_decode", "fp32", False, False), ("_prefill", "bf16", True, True), ("_prefill", "fp32", False, False)]
QUICK = [*((*of, card) for of in EVERYWHERE for card in CARDS), *((*of, 90) for of in NEARLY_THOSE)]
SLOW = [(*of, card) for of in NEARLY_THOSE + LONGEST for card in CARDS if (*of, card) not in QUICK]


@pytest.mark.parametrize(
    ("name", "dtype", "coded", "windowed", "card"),
    [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_every_kernel_compiles_for_every_card_and_fits_it(name, dtype, coded, windowed, card):
    """For 32 heads of 128, 8 key heads."""
    paged_attention = pytest.importorskip("pixtral_cli.model.paged_attention")
    form = torch.float32 if dtype == "fp32" else torch.bfloat16
    types = {**TYPES, **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")}
    types |= dict.fromkeys(("keys", "values"), "*u8" if coded else f"*{dtype}")
    types |= dict.fromkeys(("key_exponents", "value_exponents"), "*i8") if coded else {}
    blocks = paged_attention.Blocks(0, 0, 4, 3)
    if name in ("_decode", "_prefill"):
        blocks = getattr(paged_attention, f"{name[1:]}_blocks")(form, 128, SHARED[card])
    given = {
        "K": 8, "KP": 16, "G": 4, "D": 128, "DP": 128, "BP": 64, "ROWS": blocks.rows, "BLOCK": blocks.keys,
        "LEAST": paged_attention.LEAST_BLOCKS, "WINDOWED": windowed, "CODES": coded, "NATIVE": card >= 89,
        "CHAINED": card >= 90, "key_exponents": None, "value_exponents": None,
    }  # fmt: skip
    kernel = getattr(paged_attention, name)
    types = {name: of for name, of in types.items() if name in kernel.arg_names}
    constants = {name: of for name, of in given.items() if name in kernel.arg_names and name not in types}
    compiled = compile_for(card, kernel, types, constants, blocks.warps, blocks.stages)
    assert compiled.metadata.shared <= SHARED[card]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "window", "kept", "dtype"),
    [
        ((32, 8, 128), None, "auto", torch.bfloat16),
        ((32, 8, 128), 35, "auto", torch.bfloat16),
        ((32, 8, 128), None, "fp8", torch.bfloat16),
        ((32, 8, 128), None, "auto", torch.float32),
        ((6, 1, 24), 19, "fp8", torch.float32),
    ],
)
@ALL_STEPS
def test_a_card_attends_as_a_dense_softmax_says(step, form, window, kept, dtype):
    STEPS[step](form, window, kept=kept, dtype=dtype, device=CUDA).check()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_attends_for_other_lengths(dtype):
    """Captured while all rows stand for nobody; replayed for sequences that are short and long, twice each."""
    form = (32, 8, 128)
    step = Step(form, [1] * 5, [5000, 17, 0, 900, 64], 5, None, dtype=dtype, device=CUDA)
    kv_cache, wanted = step.cache(), step.layout()
    static = replace(wanted, rows=torch.full_like(wanted.rows, 5), positions=torch.zeros_like(wanted.positions))
    attend, (q, k, v) = AttendOnCard(step.config, kv_cache, static), step.qkv()
    attend(LAYER, q, k, v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(LAYER, q, k, v)
    for order in (range(5), [3, 1, 4, 0, 2]):
        places = torch.tensor(list(order), device=CUDA)
        static.rows.copy_(wanted.rows[places])
        static.positions.copy_(wanted.positions[places])
        for static_one, given_one in zip((q, k, v), step.qkv(), strict=True):
            static_one.copy_(given_one[places])
        for _ in range(2):
            out.zero_()
            graph.replay()
            step.close(out, step.exact()[places.cpu()])
