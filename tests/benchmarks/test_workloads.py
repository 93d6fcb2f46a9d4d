"""Texts, samples and models of the benchmarks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks import models
from benchmarks.harness.command import app_of
from benchmarks.harness.texts import Sample, TokenizedGroup, load_texts, shared_prefix
from benchmarks.harness.workloads import LONG_PROMPT, LONG_RESPONSE, WORKLOADS, Samples
from benchmarks.throughput.scorers.hugging_face import HuggingFace


def group(*lengths: int) -> TokenizedGroup:
    ids = tuple((7,) * length for length in lengths)
    return TokenizedGroup("p", tuple(map(str, lengths)), ids, (None,) * len(lengths))


def test_a_shared_prefix():
    assert shared_prefix(((1, 2, 3), (1, 2, 4, 5), (1, 2, 3, 3))) == 2
    assert shared_prefix(((1, 2), (1, 2, 3))) == 2


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=6), st.integers(1, 40))
def test_a_subset_has_that_many_responses_in_their_order(lengths, limit):
    sample = Sample(tuple(group(*some) for some in lengths))
    everything = [(g.prompt, r) for g in sample.groups for r in g.responses]
    found = [(g.prompt, r) for g in sample.subset(limit).groups for r in g.responses]
    assert len(found) == sample.subset(limit).responses == min(limit, len(everything))
    remaining = iter(everything)
    assert all(response in remaining for response in found)


def test_a_subset_is_spread_over_the_groups():
    assert [g.responses for g in Sample((group(1, 2), group(3, 4))).subset(2).groups] == [("1",), ("3",)]


def test_a_sample_survives_its_way_to_the_worker():
    original = Sample((TokenizedGroup("p", ("a", "b"), ((1, 2), (3,)), ((0, 1), None)),), classify=True, clients=8)
    assert Sample.from_json(json.loads(json.dumps(original.to_json()))) == original


@pytest.mark.parametrize("name", ["pairs", "bon-short", "bon-long", "n-1"])
def test_samples_share_no_text_and_are_the_same_each_time(name, samples, tiny, texts):
    workload = WORKLOADS[name]
    found = [samples.sample(workload, number) for number in (2, 0, 1)]
    assert [len(sample.groups) for sample in found] == [workload.groups] * 3
    assert {len(g.responses) for sample in found for g in sample.groups} == {workload.candidates}
    sequences = [ids for sample in found for ids in sample.ids]
    assert len(set(sequences)) == len(sequences)
    assert Samples(tiny, texts).sample(workload, 1) == found[2]


def test_long_texts_have_the_stated_lengths(samples):
    framing = 16  # tokens of the chat template, and tokens that differ at the joints of the texts
    for found in samples.sample(WORKLOADS["bon-long"], 0).groups:
        assert {abs(len(ids) - LONG_PROMPT - LONG_RESPONSE) <= framing for ids in found.ids} == {True}
        assert abs(shared_prefix(found.ids) - LONG_PROMPT) <= framing


def test_a_trainer_sends_one_response_in_a_request(samples):
    sample = samples.sample(WORKLOADS["trainer"], 0)
    assert (len(sample.groups), sample.responses, sample.clients, sample.turns) == (128, 128, 8, 1)
    assert sample.classify
    prompts = [g.prompt for g in sample.groups]
    assert len(set(prompts[:8])) == 8  # round robin over the prompts
    assert prompts == prompts[:8] * 16
    grouped = [g.prompt for g in samples.sample(WORKLOADS["trainer-grouped"], 0).groups]
    assert [grouped.index(prompt) for prompt in dict.fromkeys(grouped)] == list(range(0, 128, 16))
    assert not set(prompts) & set(grouped)  # a server's prefix cache has seen neither


def test_a_chat_is_one_conversation_after_each_turn(samples):
    sample = samples.sample(WORKLOADS["chat"], 0)
    assert (len(sample.groups), sample.turns) == (32, 8)
    conversation = sample.groups[:8]
    for before, after in pairwise(conversation):
        assert after.prompt[:-1] == [*before.prompt, {"role": "assistant", "content": before.responses[0]}]
        assert shared_prefix((before.ids[0], after.ids[0])) >= len(before.ids[0]) - 1
    assert conversation[0].prompt != sample.groups[8].prompt


def test_too_many_rounds_are_refused(samples):
    with pytest.raises(ValueError, match="the texts hold only"):
        samples.sample(WORKLOADS["bon-short"], 10_000)


def test_a_data_folder_without_the_files_is_refused():
    with pytest.raises(FileNotFoundError, match="unset MARGINRM_DATA"):
        load_texts(Path("/no/such/folder"))


def test_the_shape_of_minilm_reads_pairs_of_texts(texts, tmp_path):
    folder = models.build(models.MINILM_SHAPE, tmp_path, texts.passages[:300])
    samples = Samples(folder, texts)
    assert samples.architecture == "encoder"
    sample = samples.sample(WORKLOADS["pairs"], 0).subset(3)
    for found in sample.groups:
        for ids, type_ids in zip(found.ids, found.type_ids, strict=True):
            assert (ids[0], ids[-1], ids.count(3)) == (2, 3, 2)  # [CLS] prompt [SEP] response [SEP]
            assert type_ids == tuple(sorted(type_ids))
            assert set(type_ids) == {0, 1}
    contender = HuggingFace(folder, dtype="float32", batch=3, order="length")
    assert len(set(contender.run(contender.prepare(sample)))) == 3


def test_a_model_can_be_written_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MARGINRM_DATA", raising=False)
    result = CliRunner().invoke(app_of(models.main), ["tiny", "--folder", str(tmp_path)], catch_exceptions=False)
    assert result.output.strip().endswith("tiny")
    assert (tmp_path / "tiny" / "model.safetensors").is_file()
    assert CliRunner().invoke(app_of(models.main), ["huge"]).exit_code == 2
