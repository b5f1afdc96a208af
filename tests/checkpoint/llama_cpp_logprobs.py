"""Run as a script: print llama.cpp's log-probabilities after a prompt. A crash of llama.cpp then fails one test only.

Usage: llama_cpp_logprobs.py MODEL CONTEXT_LENGTH PROMPTS, where PROMPTS is a JSON list of lists of token ids. Prints
one JSON object, token id -> logprob, for the first prompt whose most likely token is text that llama.cpp will show.
"""

import json
import sys

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.n_ctx = int(sys.argv[2])
    params.n_parallel = 1
    params.warmup = False
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    for prompt in json.loads(sys.argv[3]):
        request = {"prompt": prompt, "n_predict": 1, "logprobs": 50, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(request)["choices"][0]["logprobs"]
        if answer is not None:
            top = {entry["id"]: entry["logprob"] for entry in answer["content"][0]["top_logprobs"]}
            print(json.dumps({"prompt": prompt, "logprobs": top}))
            return


if __name__ == "__main__":
    main()
