"""Known defects of other reward-model trainers, and the test that excludes each one here.

Traps of the method:

| trap | test |
|---|---|
| a reference batch of one: mu_B = d, the filter never fires | test_margins::test_trap_a_reference_batch_of_one_never_fires_and_is_refused, test_train::test_trap_a_reference_batch_too_small_stops_before_the_first_step |
| a filter that never passes a pair, silently | test_traps::test_trap_a_filter_that_never_fires_is_reported |
| broadcasting: [pairs, 1] - [pairs] is [pairs, pairs] | test_losses::test_trap_shapes_that_would_broadcast_are_refused, test_losses::test_the_losses_equal_those_of_a_loop |
| the loss divided by the number of pairs below the mean: another learning rate in every step | test_traps::test_trap_the_loss_divides_by_all_pairs_of_the_batch |
| margins read from the first row only | test_data::test_trap_a_margin_missing_in_any_row_is_named_by_its_line |
| a margin that is a list | test_traps::test_trap_a_margin_is_one_number_per_pair |
| a negative mu_B relaxes the loss | test_margins::test_trap_a_negative_mean_does_not_relax_the_loss |
| the margin feeds on itself | test_traps::test_trap_an_uncapped_margin_feeds_on_itself, test_traps::test_trap_a_spread_that_doubles_while_accuracy_is_flat_is_reported |
| mu_B as the mean of the ranks' means, or with pairs counted twice | test_distributed::test_two_processes_train_as_one_does |
| mu_B depends on length: batches grouped by length | test_traps::test_trap_batches_are_drawn_by_the_seed_and_not_by_length |
| wrong labels are below the mean too | test_evaluation::test_metrics_by_hand (accuracy by strength shows it; the target margin has no lower bound) |
| batch margins in evaluation or serving | test_traps::test_trap_evaluation_uses_no_batch_and_no_target_margin |
| losses of different presets compared | test_traps::test_trap_every_preset_logs_the_same_bt_nll |
| sigmoid(d) read as a probability | test_traps::test_trap_confidence_is_sigmoid_of_the_margin_over_t |
| the paper's "up to" figure presented as ours | test_traps::test_trap_no_figure_of_the_paper_is_presented_as_ours |

Problems of users of other trainers:

| trap | test |
|---|---|
| the last token found by the first pad: wrong with left padding, no pad token, or pad = EOS | test_reward_model::test_padding_settings_do_not_touch_a_reward |
| the reward read next to EOS | test_traps::test_trap_the_reward_is_read_at_the_end_marker, test_reward_model::test_rewards_are_those_of_transformers_own_forward |
| training with a pad token that is missing or EOS | test_reward_model::test_training_needs_a_padding_token_that_is_not_eos |
| no EOS | test_encoding::test_without_a_template_it_is_prompt_response_and_one_eos, test_encoding::test_a_chat_template_is_followed_to_its_end_marker |
| serving encodes differently from training | test_same_reward::test_trainer_library_and_server_give_a_pair_the_same_reward, test_reward_model::test_another_template_fails_the_golden_samples |
| two BOS, or none | test_encoding::test_there_is_exactly_one_bos_where_the_tokenizer_has_one |
| a template with today's date | test_encoding::test_a_template_that_prints_the_date_prints_the_same_one_every_day |
| pairs equal after encoding: ln 2, no gradient | test_data::test_trap_pairs_equal_after_encoding_are_excluded |
| long pairs dropped silently | test_data::test_pairs_without_a_training_signal_are_excluded_and_counted_by_reason |
| a response cut at its end | test_encoding::test_a_response_over_the_limit_is_never_cut, test_data::test_cut_prompts_are_counted_and_responses_are_kept |
| the head lost from LoRA checkpoints, random when loaded | test_lora::test_trap_the_head_survives_and_the_merged_checkpoint_gives_the_trained_rewards, test_reward_model::test_a_checkpoint_without_its_head_is_refused |
| a head with two labels | test_reward_model::test_two_labels_are_refused, test_cli::test_a_run_that_cannot_be_trained_stops_with_the_cure |
| the head drawn before the seed is set, or never | test_reward_model::test_training_starts_from_the_same_head_for_the_same_seed |
| a data seed without effect | test_traps::test_trap_batches_are_drawn_by_the_seed_and_not_by_length |
| log(sigmoid(d)) is infinite | test_losses::test_huge_differences_stay_finite |
| training continues after a NaN | test_traps::test_trap_a_reward_that_is_not_finite_stops_the_run_and_names_its_rows |
| a bfloat16 head makes ties | test_traps::test_trap_rewards_in_bfloat16_would_tie, test_forward::test_bfloat16_keeps_a_float32_head |
| the reward depends on its batch | test_reward_model::test_a_reward_does_not_depend_on_its_neighbours_or_on_the_budget |
| rewards far from 0 with little spread, on an unknown scale | test_traps::test_trap_the_checkpoint_records_the_mean_and_spread_of_its_rewards_and_their_meaning |
| LoRA and activation checkpointing: no gradients | test_traps::test_trap_lora_under_activation_checkpointing_trains_every_matrix |
| a trained model that no server can load | test_train::test_a_run_writes_a_checkpoint_that_serves_its_measured_rewards |
| accuracy stuck at 0.5 | test_train::test_every_preset_overfits_64_pairs |
| a documented margin option that does not exist | test_margins::test_presets_by_hand |

No test: `metric_for_best_model`. No metric chooses a step; the last step is exported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marginrm import RewardModel
from marginrm.calibration import calibrate
from marginrm.encoding import Encoder
from marginrm.errors import DataError, NonFiniteRewardError
from marginrm.forward.module import RewardModule
from marginrm.loading import load_for_training
from marginrm.texts.preferences import parse_pair
from marginrm_training.checkpoint.model_card import model_card
from marginrm_training.checkpoint.recalibrate import recalibrated
from marginrm_training.config import LoraSection, TrainConfig, load_config
from marginrm_training.data.collate import PairCollator
from marginrm_training.data.splits import EncodedPair, encode_pairs
from marginrm_training.evaluation.pairs import evaluate, score_pairs
from marginrm_training.method.losses import margin_loss
from marginrm_training.method.margins import PRESETS, Reference, target_margins
from marginrm_training.run.lora import with_lora
from marginrm_training.run.step_log import StepLog
from marginrm_training.run.train import tune_for_training
from marginrm_training.run.trainer import MarginTrainer
from support.models import CHATML_TEMPLATE, tiny_checkpoint
from support.training import config_file, rows

ROOT = Path(__file__).parents[2]


def test_the_table_names_tests_that_exist() -> None:
    named = re.findall(r"(test_\w+)::(test_\w+)", __doc__ or "")
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*/test_*.py")}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in texts.get(file, "")]
    assert len(named) > 40
    assert missing == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traps")
    tiny_checkpoint(root / "base", "gpt_neox")
    return root


Trainer = tuple[MarginTrainer, RewardModule, list[EncodedPair]]


@pytest.fixture
def trainer(folder: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(preset: str = "paper", seed: int = 0, lora: bool = False, checkpointing: bool = False) -> Trainer:
        config = load_config(config_file(folder, 64, method={"preset": preset}))
        config = changed(config, seed=seed, checkpointing=checkpointing)
        module, encoder = load_for_training(config.model.path, seed=0)
        if lora:
            module = with_lora(module, LoraSection(rank=4), encoder.max_length)
        pairs = encoded([row | {"margin": 0.5} for row in rows(64)], encoder, preset)
        training = MarginTrainer(module, pairs, config, tmp_path / "steps", progress=False)
        tune_for_training(training, module)
        return training, module, pairs

    return make


def changed(config: TrainConfig, *, seed: int, checkpointing: bool) -> TrainConfig:
    model = config.model.model_copy(update={"gradient_checkpointing": checkpointing})
    return config.model_copy(update={"seed": seed, "model": model})


def encoded(content: list[dict[str, Any]], encoder: Encoder, preset: str = "bt") -> list[EncodedPair]:
    parsed = [parse_pair(row, f"rows:{index}") for index, row in enumerate(content, 1)]
    return encode_pairs("train", parsed, encoder, PRESETS[preset]).pairs


def test_trap_a_filter_that_never_fires_is_reported() -> None:
    line = {"fire_rate": 0.0, "d_std": 1.0, "accuracy": 0.7}
    assert any("plain Bradley-Terry" in warning for warning in StepLog().warnings(line, filtered=True, unbounded=True))
    assert StepLog().warnings(line, filtered=False, unbounded=False) == []
    assert StepLog().warnings(line | {"fire_rate": 0.1}, filtered=True, unbounded=True) == []


def test_trap_a_spread_that_doubles_while_accuracy_is_flat_is_reported() -> None:
    log = StepLog()
    quiet = {"fire_rate": 0.5, "d_std": 1.0, "accuracy": 0.7}
    assert log.warnings(quiet, filtered=True, unbounded=True) == []
    assert log.warnings(quiet | {"d_std": 1.9}, filtered=True, unbounded=True) == []
    assert "from 1.00 to 2.10" in log.warnings(quiet | {"d_std": 2.1}, filtered=True, unbounded=True)[0]
    gain = quiet | {"d_std": 5.0, "accuracy": 0.8}
    assert log.warnings(gain, filtered=True, unbounded=True) == []


def test_trap_only_margins_without_a_cap_can_feed_on_themselves() -> None:
    assert {name for name, method in PRESETS.items() if method.unbounded} == {"margin_unfiltered", "paper"}
    log = StepLog()
    line = {"fire_rate": 1.0, "d_std": 0.2, "accuracy": 0.7}
    assert [log.warnings(line | {"d_std": spread}, filtered=False, unbounded=False) for spread in (0.2, 2.0)] == [
        [],
        [],
    ]


def test_trap_the_loss_divides_by_all_pairs_of_the_batch(trainer: Callable[..., Trainer]) -> None:
    training, module, pairs = trainer("paper")
    with torch.no_grad():
        loss, outputs = training.compute_loss(module, training.data_collator(pairs[:16]), return_outputs=True)
    d = (outputs["rewards"][0::2] - outputs["rewards"][1::2]).tolist()
    mu = sum(d) / 16
    fired = [x < mu for x in d]
    assert 0 < sum(fired) < 16
    asked = [max(mu, 0.0) if below else 0.0 for below in fired]
    each = [math.log1p(math.exp(m - x)) for m, x in zip(asked, d, strict=True)]
    assert float(loss) == pytest.approx(sum(each) / 16, abs=1e-5)


def test_trap_a_margin_is_one_number_per_pair(folder: Path) -> None:
    row = rows(1)[0]
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: .*margin"):
        parse_pair(row | {"margin": [0.5]}, "pairs.jsonl:7")
    module, encoder = load_for_training(folder / "base", seed=0)
    pairs = encoded([one | {"margin": 1} for one in rows(8)], encoder, "column")
    given = PairCollator(module)(pairs)["batch"].labels
    assert given is not None
    assert (given.dtype, given.shape) == (torch.float32, (8,))


def test_trap_an_uncapped_margin_feeds_on_itself() -> None:
    def mean_d(preset: str) -> float:
        """Trains one weight w on separable pairs, d = w * x."""
        x = torch.linspace(0.5, 1.5, 16)
        weight = torch.zeros(1, requires_grad=True)
        for _ in range(400):
            d = weight * x
            targets = target_margins(PRESETS[preset], d, Reference.of(d))
            (gradient,) = torch.autograd.grad(margin_loss(d, targets.margins).mean(), weight)
            weight = (weight - gradient).detach().requires_grad_()
        return float((weight.detach() * x).mean())

    plain, capped, paper, unfiltered = map(mean_d, ("bt", "margin", "paper", "margin_unfiltered"))
    assert plain < capped < plain + 1.5  # a cap of 1 adds about 1
    assert paper > 2 * capped
    assert unfiltered > paper


def test_trap_batches_are_drawn_by_the_seed_and_not_by_length(trainer: Callable[..., Trainer]) -> None:
    def order(seed: int) -> list[tuple[str, ...]]:
        return [batch["batch"].sources for batch in trainer(seed=seed)[0].get_train_dataloader()]

    first, again, other = order(1), order(1), order(2)
    assert first == again
    assert first != other
    assert {place for batch in first for place in batch} == {place for batch in other for place in batch}
    training, _, pairs = trainer()
    lengths = {pair.pair.source: len(pair.chosen.ids) for pair in pairs}
    spread = [{lengths[place] for place in batch["batch"].sources} for batch in training.get_train_dataloader()]
    assert all(len(batch) > 1 for batch in spread)


def test_trap_evaluation_uses_no_batch_and_no_target_margin(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder / "base", dtype="float32")
    pairs = encoded(rows(12), model.encoder)
    together = score_pairs(model, pairs).d
    permuted = score_pairs(model, pairs[::-1]).d[::-1]
    alone = [float(score_pairs(model, [pair]).d[0]) for pair in pairs]
    assert permuted == pytest.approx(together, abs=1e-5)
    assert alone == pytest.approx(together, abs=1e-5)
    mean = sum(math.log1p(math.exp(-d)) for d in together) / len(together)
    assert evaluate(score_pairs(model, pairs), pairs, 1.0)["bt_nll"] == pytest.approx(mean)


def test_trap_every_preset_logs_the_same_bt_nll(trainer: Callable[..., Trainer]) -> None:
    logged, losses = [], []
    for preset in PRESETS:
        training, module, pairs = trainer(preset)
        with torch.no_grad():
            losses.append(float(training.compute_loss(module, training.data_collator(pairs[:16]))))
        logged.append(training.step_log.sums["bt_nll"])
    assert logged == pytest.approx([logged[0]] * len(logged), abs=1e-6)
    assert max(losses) - min(losses) > 0.05


def test_trap_confidence_is_sigmoid_of_the_margin_over_t(folder: Path, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "gpt_neox")
    model = RewardModel.from_pretrained(path, dtype="float32")
    pairs = encoded(rows(8), model.encoder)
    recalibrated(model, "x", calibrate(score_pairs(model, pairs).d.tolist(), temperature=4.0), pairs).save(path)
    again = RewardModel.from_pretrained(path, dtype="float32").compare("What?", "Red, yellow and blue.", "No.")
    assert abs(again.margin) > 0.01
    assert again.confidence == pytest.approx(1 / (1 + math.exp(-again.margin / 4.0)), abs=1e-6)


def test_trap_no_figure_of_the_paper_is_presented_as_ours() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        # A section that a benchmark wrote holds measurements.
        written = re.sub(
            r"<!-- results: begin.*?results: end -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        assert "6.31" not in written, page


@pytest.mark.parametrize("template", [None, CHATML_TEMPLATE])
def test_trap_the_reward_is_read_at_the_end_marker(tmp_path: Path, template: str | None) -> None:
    model = RewardModel.from_pretrained(tiny_checkpoint(tmp_path, "llama", chat_template=template), dtype="float32")
    groups = [[model.encoder.encode("What?", text) for text in ("Red.", "Blue and green.")] for _ in range(2)]
    row: Any = model.module.collate(groups)
    read = row.ids[0, row.last].tolist()
    end = {None: "<|endoftext|>", CHATML_TEMPLATE: "\n"}[template]  # ChatML ends its turn with a line feed
    assert [model.encoder.tokenizer.decode([token]) for token in read] == [end] * 4
    assert read == [response.ids[-1] for group in groups for response in group]


def test_trap_a_reward_that_is_not_finite_stops_the_run_and_names_its_rows(trainer: Callable[..., Trainer]) -> None:
    training, module, pairs = trainer()

    def poison(_: object, __: object, rewards: Tensor) -> Tensor:
        return rewards + torch.tensor([0.0] * 6 + [math.nan] + [0.0] * 25)

    module.register_forward_hook(poison)
    with pytest.raises(NonFiniteRewardError, match=r"Step 0: the rewards of rows:4 are not finite"):
        training.compute_loss(module, training.data_collator(pairs[:16]))


def test_trap_rewards_in_bfloat16_would_tie(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model", "llama")
    weights = load_file(path / "model.safetensors")
    weights["score.weight"] *= 40.0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    model = RewardModel.from_pretrained(path, dtype="bfloat16")
    rewards = torch.tensor(model.score("Count.", [f"Red, yellow and blue, {number}." for number in range(200)]))
    assert rewards.abs().max() > 8
    assert len(rewards.unique()) > 190
    assert len(rewards.bfloat16().unique()) < 190  # the rewards that a bfloat16 head can distinguish


def test_trap_the_checkpoint_records_the_mean_and_spread_of_its_rewards_and_their_meaning(folder: Path) -> None:
    model = RewardModel.from_pretrained(folder / "base", dtype="float32")
    pairs = encoded(rows(8), model.encoder)
    rewards = score_pairs(model, pairs)
    metrics = evaluate(rewards, pairs, 1.0)
    both = [*rewards.chosen, *rewards.rejected]
    mean = sum(both) / 16
    assert metrics["reward_mean"] == pytest.approx(mean)
    assert metrics["reward_std"] == pytest.approx(math.sqrt(sum((x - mean) ** 2 for x in both) / 16))
    card = model_card(recalibrated(model, "x", calibrate(rewards.d.tolist()), pairs))
    assert "only differences between responses to one prompt, from this checkpoint" in card


# peft 0.21 uses a name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_trap_lora_under_activation_checkpointing_trains_every_matrix(trainer: Callable[..., Trainer]) -> None:
    training, module, _ = trainer(lora=True, checkpointing=True)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    training.train()
    moved = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    taught = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert any("lora_" in name for name in taught)
    assert moved == taught
