"""docs/performance.md and its pictures from the JSON of `benchmarks.suite`.

    python -m benchmarks.report RESULTS.json [LATER.json ...] [--to docs]

Rows of a later file replace the same rows of an earlier one.
"""

import argparse
import json
from pathlib import Path

from benchmarks.plot import draw
from benchmarks.results import Results, markdown_table, memory_rows, notes, speed_rows
from benchmarks.works import WORKS
from miniphi.atomic_write import atomic_file

_DOCUMENT = """# Speed

<!-- written by benchmarks/report.py from measurements; change the text there -->

{machine}

{pictures}{tables}
## How this was measured

```
make bench                                                                       # every installed engine, this machine
LLAMA_CPP_LIBRARY=.../libllama.so OPENVINO_PYTHON=.../python python -m benchmarks.suite --json results.json
python -m benchmarks.report results.json                                         # this document and its pictures
```

* **In turn.** Engines run one after the other on the same work, A B C A B C, each in a process of its own with the
  same number of threads; figures are medians over the column *samples*. *ratio* is miniphi's speed over the peer's,
  or the peer's time over miniphi's: above 1, miniphi is ahead.
* **Limits.** Before and after every sample the machine's int8 rate and read bandwidth are measured, by miniphi's own
  kernels with all threads (`miniphi.kernels.Meter`). Other programs change them within seconds, so samples are short: a
  few steps of decoding. *limit* is the speed that they allow: a step reads all weights once and every sequence's part
  of the cache, and does two operations per weight and token and four per cached number pair and query; whichever takes
  longer counts. *reached* is the median share, each sample against the bandwidth beside it, each engine against the
  bytes of its own formats. It can pass 100 % where weights stay in the caches (SmolLM2's mostly do), or where the
  bandwidth changed during a sample. *GB/s* is the span of the bandwidths measured during the row.
* **Same work.** All engines take the same token ids and give the logits of the last one, or choose from them; none
  decodes text. miniphi has NL4 weights (4.25 bits), as `miniphi quantize --type q4` writes them; llama.cpp Q4_0 (4.5
  bits), which it is fastest in; OpenVINO int4 in symmetric groups of 128 (4.125 bits), as its exporter makes it, built
  by `benchmarks/openvino_model.py`. Embeddings and lm_head have 8 bits in all three. SmolLM2's Q4_0 and NL4 come from
  the same shipped weights. Rows with an int8 cache use q8 in miniphi, u8 in OpenVINO, and in llama.cpp whatever is
  fastest: q8_0 with or without flash attention (without it, values stay f16), or f16 where the context is short.
  Elsewhere every engine has its default: f16 in miniphi and llama.cpp, u8 in OpenVINO.
* **Depth.** How a cache came to be full does not change how long reading it takes. miniphi writes one token into
  every block of it; llama.cpp takes copies of a prompt of 512 tokens; OpenVINO runs the prompt once and keeps it in
  its prefix cache.
* **Start.** A new process, its files in the page cache, a prompt of 8 token ids, until its first logits. miniphi maps
  the packed copy that `miniphi.load` keeps of a model, OpenVINO its compiled one. `miniphi generate` is the whole
  command, with tokenizer and template, until its first character is printed.
* **Memory** is the most that the process had resident, mapped parts of the model file included.
"""


def document(results: Results, pictures: list[str]) -> str:
    """Return docs/performance.md."""
    engines = "; ".join(f"{name} ({version})" for name, version in results.engines.items())
    machine = (
        f"Measured on {results.date}: {results.processor}, {results.num_threads} threads. {engines}.\n"
        "These are the figures of one machine; `make bench` gives yours."
    )
    tables = []
    for model, files in results.models.items():
        lines = [f"## {model}", "", *(f"* {engine}: {file}" for engine, file in files.items()), ""]
        lines.append(markdown_table(speed_rows(results, model)))
        memory = memory_rows(results, model)
        if len(memory) > 1:
            lines += ["", markdown_table(memory)]
        if remarks := notes(results, model):
            lines += ["", *(f"* {remark}" for remark in remarks)]
        tables.append("\n".join(lines) + "\n")
    texts = {
        "speed.svg": "Speed of every engine, row by row",
        "roofline.svg": "Roofline: operations per second over operations per byte",
    }
    images = "".join(f"![{texts[name]}]({name})\n\n" for name in pictures)
    return _DOCUMENT.format(machine=machine, pictures=images, tables="\n".join(tables))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs"), metavar="FOLDER")
    args = parser.parse_args()
    first, *later = (Results.from_dict(json.loads(path.read_text("utf-8"))) for path in args.results)
    for other in later:
        first.add(other)
    order = [work.name for work in WORKS]
    first.blocks.sort(key=lambda block: order.index(block.work))
    pictures = [path.name for path in draw(first, args.to)]
    with atomic_file(args.to / "performance.md", overwrite=True) as file:
        file.write(document(first, pictures).encode())


if __name__ == "__main__":
    main()
