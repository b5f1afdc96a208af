"""A prompt of 512 tokens, side by side with llama.cpp; options as in side_by_side.py."""

from benchmarks.side_by_side import main

if __name__ == "__main__":
    main(work=("prefill",))
