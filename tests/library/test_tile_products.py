"""Products by the kernel for matrix tiles (AMX): those of float64, for any size, and the same bits for a row everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from marginrm.amx.products import multiply, pack
from marginrm.forward.module import RewardModule
from marginrm.loading import load_for_scoring
from marginrm.tuning import packed_weights
from marginrm.tuning.compile_ahead import Skeleton, build
from marginrm.tuning.packed_weights import PackedLinear
from support.forward import groups_of, one_by_one
from support.models import DECODERS, ENCODERS, tiny_checkpoint
from support.tiles import needs_tiles

pytestmark = needs_tiles
BFLOAT16 = 2**-8  # half of the distance between two bfloat16 numbers, relative


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size))).bfloat16()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("rows", "given", "result"),
    [
        *((1, 32, 32), (5, 7, 3), (33, 100, 70), (257, 576, 1536), (640, 64, 1000)),
        *((300, 1030, 515), (129, 2100, 96), (70, 9000, 40), (0, 64, 64)),
    ],
    ids=str,
)
@pytest.mark.parametrize("biased", [True, False])
def test_a_product_of_any_size_is_that_of_float64(rows: int, given: int, result: int, biased: bool) -> None:
    inputs = numbers(rows, given + 5)[:, :given]  # rows that are parts of longer ones
    weight, bias = numbers(result, given), numbers(result) if biased else None
    found = multiply(pack(weight), bias, inputs, result)
    expected = inputs.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.shape == (rows, result)
    # float32 sums of `given` terms, then one rounding
    torch.testing.assert_close(found.double(), expected, rtol=BFLOAT16, atol=1e-5 * given**0.5)


def test_leading_dimensions_stay_and_columns_may_lie_apart() -> None:
    weight, inputs = numbers(40, 64), numbers(2, 64, 3).transpose(1, 2)
    found = multiply(pack(weight), None, inputs, 40)
    torch.testing.assert_close(found, nn.functional.linear(inputs, weight))


@pytest.mark.usefixtures("threads")
def test_a_row_has_the_same_bits_whatever_is_computed_beside_it() -> None:
    weight, inputs = pack(numbers(96, 1100)), numbers(700, 1100)
    whole = multiply(weight, None, inputs, 96)
    for first, last in ((0, 1), (31, 33), (5, 400), (699, 700)):
        assert torch.equal(multiply(weight, None, inputs[first:last], 96), whole[first:last])


def test_other_dtypes_and_sizes_are_refused() -> None:
    weights = pack(numbers(96, 64))
    with pytest.raises(TypeError, match=r"got torch\.float32, torch\.bfloat16"):
        multiply(weights, None, torch.zeros(1, 64), 96)
    for inputs, columns, bias in ((128, 96, 96), (64, 4096, 4096), (64, 96, 1)):
        with pytest.raises(ValueError, match="do not give"):
            multiply(weights, numbers(bias), numbers(3, inputs), columns)
    layer = nn.Linear(64, 96, bias=False, dtype=torch.bfloat16)
    packed = PackedLinear.convert(layer, packed_weights.packed_weight(layer, {(64, 96)}))
    assert packed.tiled
    with pytest.raises(ValueError, match="inputs have 40 numbers"), torch.inference_mode():
        packed(numbers(3, 40))


def test_a_bias_may_have_steps() -> None:
    weight, bias, inputs = numbers(40, 64), numbers(80)[::2], numbers(3, 64)
    torch.testing.assert_close(multiply(pack(weight), bias, inputs, 40), nn.functional.linear(inputs, weight, bias))


def loaded(path: Path, monkeypatch: pytest.MonkeyPatch, worth: float) -> RewardModule:
    monkeypatch.setattr(packed_weights, "_WORTH_IT", worth)
    return load_for_scoring(path, dtype="bfloat16", device="cpu")[0]


def layers_in_tiles(module: RewardModule) -> list[PackedLinear]:
    return [part for part in module.backbone.modules() if isinstance(part, PackedLinear) and part.tiled]


@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_a_model_takes_them_if_its_trial_says_so_and_rewards_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    path = tiny_checkpoint(tmp_path, family)
    tiled, plain = loaded(path, monkeypatch, 0.0), loaded(path, monkeypatch, float("inf"))
    assert layers_in_tiles(tiled)
    assert "products by matrix tiles (AMX) for" in tiled.forward_reason
    assert not layers_in_tiles(plain)
    groups = groups_of(plain.base.config.vocab_size, typed=family == "bert")
    with torch.inference_mode():
        found, expected = (module(module.collate(groups)) for module in (tiled, plain))
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.02)
    own = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(found, one_by_one(own, groups), atol=0.03, rtol=0.03)


def test_a_kernel_with_other_results_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = packed_weights.products.multiply
    monkeypatch.setattr(packed_weights.products, "multiply", lambda weights, *rest: right(weights.roll(1, 2), *rest))
    module = loaded(tiny_checkpoint(tmp_path, "llama"), monkeypatch, 0.01)
    assert not layers_in_tiles(module)
    assert re.search(r"for 0 of (\d) shapes of weights, since results differ for \1\b", module.forward_reason)


@pytest.mark.parametrize("slow", [0.0, 1.0])
def test_the_process_that_compiles_ahead_has_weights_of_the_same_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float
) -> None:
    tile_speed = packed_weights._tile_speed
    monkeypatch.setattr(packed_weights, "_speed", lambda _: slow)  # then only layers in tiles are packed
    monkeypatch.setattr(
        packed_weights, "_tile_speed", lambda same: tile_speed(same) if same[0].in_features == 32 else None
    )
    module = loaded(tiny_checkpoint(tmp_path, "qwen3"), monkeypatch, 0.01)
    assert any(type(part) is nn.Linear for part in module.backbone.modules()) == (slow == 0)
    skeleton = Skeleton.of(module)
    assert skeleton is not None
    assert Skeleton.from_json(skeleton.to_json().decode()) == skeleton
    forms = [
        [part.packed.shape for part in one.backbone.modules() if isinstance(part, PackedLinear)]
        for one in (module, build(skeleton))
    ]
    assert forms[0] == forms[1]
