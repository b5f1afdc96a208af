import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.report import document, main
from benchmarks.suite import parse, rows
from benchmarks.works import LARGE, SMALL, WORKS

from .measured import decode_block, results, start_block


def test_the_document_holds_tables_and_what_was_compared() -> None:
    text = document(results(decode_block(), start_block()), ["roofline.svg"])
    assert "| decode, depth 16, tok/s |    9.00 |  10.0 |     90% | 5.00 |     50% |  1.80 |       3 | 30-60 |" in text
    assert "2026-01-02: A Processor, 2 threads. miniphi (1.0); peer (2.0)." in text
    assert "* peer: the same file" in text
    assert "](roofline.svg)" in text
    assert "speed.svg" not in text


def test_pictures_are_svg_that_follows_the_colour_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    stored = tmp_path / "results.json"
    stored.write_text(json.dumps(results(decode_block(), start_block()).to_dict()))
    monkeypatch.setattr("sys.argv", ["report", str(stored), "--to", str(tmp_path)])
    main()
    assert "](speed.svg)" in (tmp_path / "performance.md").read_text()
    for name in ("speed.svg", "roofline.svg"):
        svg = (tmp_path / name).read_text()
        words = " ".join(ElementTree.fromstring(svg).itertext())
        assert "decode, depth 16" in words
        assert "prefers-color-scheme: dark" in svg
        assert svg.count("var(--ink)") > 5
        assert svg.lower().count("#1f2328") == 1  # what the light scheme sets


def test_quick_rows_are_short_and_only_chooses() -> None:
    everything = rows(parse([]))
    assert len(everything) == sum(len(work.models) for work in WORKS)
    quick = rows(parse(["--quick"]))
    assert {model for model, _ in quick} == {SMALL, LARGE}
    assert all(work.context <= 512 for _, work in quick)
    assert [work.name for _, work in rows(parse(["--only", "decode-16384"]))] == ["decode-16384"]
    assert (parse([]).repeats, parse(["--quick"]).repeats, parse(["--quick", "--repeats", "3"]).repeats) == (5, 2, 3)
