import json

import pytest

from benchmarks.results import Block, Results, markdown_table, memory_rows, notes, speed_rows

from .measured import FAST, SLOW, decode_block, results, sample, start_block


def test_ratios_are_of_medians_and_above_one_where_ours_is_ahead() -> None:
    assert decode_block().median("miniphi") == 9.0
    assert decode_block().median("peer") == 5.0
    assert decode_block().ratio("peer") == pytest.approx(9 / 5)
    assert start_block().ratio("peer") == pytest.approx(2.0)


def test_each_sample_is_held_against_the_bandwidth_beside_it() -> None:
    block = decode_block()
    assert block.share("miniphi") == pytest.approx(0.9)  # of 9/10, 8/10 and 18/20
    assert block.limit("miniphi") == pytest.approx(10.0)
    block.samples = [sample("miniphi", 12.0, SLOW, FAST)]
    assert block.share("miniphi") == pytest.approx(12 / 15)
    assert block.bandwidths() == (30e9, 60e9)


def test_what_was_not_measured_has_no_figure() -> None:
    block = Block(model="tiny", work="decode", label="decode", unit="tok/s")
    assert (block.median("miniphi"), block.ratio("peer"), block.share("miniphi"), block.limit("peer")) == (None,) * 4
    assert block.bandwidths() is None
    assert start_block().share("miniphi") is None
    heading, row = speed_rows(results(block), "tiny")
    assert len(heading) == len(row)
    assert row == ["decode, tok/s", *[""] * 6, "0", ""]


def test_the_table_has_medians_limits_shares_and_ratios() -> None:
    rows = speed_rows(results(decode_block(), start_block()), "tiny")
    assert rows[0] == ["work", "miniphi", "limit", "reached", "peer", "reached", "ratio", "samples", "GB/s"]
    assert rows[1] == ["decode, depth 16, tok/s", "9.00", "10.0", "90%", "5.00", "50%", "1.80", "3", "30-60"]
    assert rows[2] == ["first token, s", "0.50", "", "", "1.00", "", "2.00", "1", "30-30"]
    assert speed_rows(results(decode_block()), "another")[1:] == []


def test_memory_is_the_highest_of_an_engines_processes() -> None:
    rows = memory_rows(results(decode_block(), start_block()), "tiny")
    assert rows == [["peak memory, GB", "miniphi", "peer"], ["decode, depth 16", "2.10", "3.00"]]


def test_absent_engines_failures_and_choices_are_told() -> None:
    block = decode_block()
    block.missing["peer"] = "it crashed"
    block.variants["peer"] = "flash attention False"
    assert notes(results(block), "tiny") == [
        "other: not measured: it is not installed",
        "decode, depth 16: no figure of peer: it crashed",
        "decode, depth 16: peer with flash attention False",
    ]


def test_json_holds_everything() -> None:
    before = results(decode_block(), start_block())
    assert Results.from_dict(json.loads(json.dumps(before.to_dict()))) == before


def test_later_rows_replace_earlier_ones_and_keep_the_others() -> None:
    first, later = results(decode_block(), start_block()), results(decode_block())
    later.blocks[0].samples = [sample("miniphi", 1.0)]
    later.engines["other"] = "3.0"
    later.models = {"tiny": {"miniphi": "other weights"}}
    first.add(later)
    assert [(block.work, block.median("miniphi")) for block in first.blocks] == [("start", 0.5), ("decode", 1.0)]
    assert first.absent == {}
    assert first.engines["other"] == "3.0"
    assert first.models == {"tiny": {"miniphi": "other weights", "peer": "the same file"}}


def test_a_table_is_aligned_and_its_rule_says_where_numbers_are() -> None:
    lines = markdown_table([["work", "n"], ["a", "10"], ["longer", "7"]]).splitlines()
    assert lines == ["| work   |  n |", "|--------|---:|", "| a      | 10 |", "| longer |  7 |"]
