"""Sixteen rows with an adapter each: the engine beside PEFT's `adapter_names`, by turns, in one process.

    python experiments/serving/against_peft.py

Needs torch, transformers and peft (`pip install -e ".[parity]"`). The same adapters answer the same prompts on both sides, and
how many texts are equal is told. Rounds are taken by turns, and seconds of the processor compared, those of all threads.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import peft
import torch
import transformers
import work

import jlora
from jlora import models
from jlora.serving import AdapterStore, Engine

PROMPT = 32


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=models.STORIES260K, help="directory of a Llama")
    parser.add_argument("--rows", type=int, default=16, help="rows, each with an adapter of its own")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "against_peft.md", help="file of the results"
    )
    options = parser.parse_args()
    model, params = models.load(options.model)
    adapters = work.adapters(model, params, options.rows, options.rank)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, model.config.vocab_size, PROMPT).tolist() for _ in adapters]
    sides = {
        "jlora": ours(options, model, params, adapters, prompts),
        "PEFT": theirs(options, model, adapters, prompts),
    }
    texts = {name: answer() for name, answer in sides.items()}
    equal = sum(one == other for one, other in zip(*texts.values(), strict=True))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(options.rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            start, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            found[name].append((time.perf_counter() - start, time.process_time() - cpu))
    pairs = list(zip(found["PEFT"], found["jlora"], strict=True))
    clock, cpu = ([peft[n] / mine[n] for peft, mine in pairs] for n in (0, 1))
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    lines = [
        "# Beside PEFT's `adapter_names`",
        "",
        f"Written by `experiments/serving/against_peft.py`. A Llama of {size:,} parameters in float32, {options.rows} rows "
        f"with a LoRA of rank {options.rank} each at q, k, v and o, prompts of {PROMPT} tokens, {options.tokens} tokens each, "
        f"greedy. JAX {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}, "
        f"{torch.get_num_threads()} threads each, {options.rounds} rounds by turns beside other work.",
        "",
        f"{equal} of {options.rows} texts are equal. PEFT takes {statistics.median(cpu):.1f} times the processor time of the "
        f"engine ({min(cpu):.1f} to {max(cpu):.1f}), and {statistics.median(clock):.1f} times the seconds ({min(clock):.1f} to "
        f"{max(clock):.1f}).",
    ]
    options.out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


def ours(options: argparse.Namespace, model, params, adapters, prompts):
    """The engine's answers: a function."""
    leaves = ".*/(q|k|v|o)_proj/kernel"
    store = AdapterStore(model, params, slots=options.rows, rank=options.rank, leaves=leaves, gains=False)
    for name, adapted in adapters.items():
        store.add(name, adapted)
    engine = Engine(
        model,
        params,
        rows=options.rows,
        length=PROMPT + options.tokens,
        chunk=PROMPT,
        adapters=store,
        queue=options.rows,
    )
    engine.start()

    def answer() -> list[list[int]]:
        load = [work.Asked(prompt, name, options.tokens) for prompt, name in zip(prompts, adapters)]
        work.together(engine, load)
        return [list(each.ids) for each in load]

    return answer


def theirs(options: argparse.Namespace, model, adapters, prompts):
    """PEFT's answers: a function."""
    base = transformers.LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    wrapped = None
    with tempfile.TemporaryDirectory() as top:
        for name, adapted in adapters.items():
            folder = Path(top) / name
            jlora.save_peft(folder, adapted, models.peft_names(model))
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(base, folder, adapter_name=name)
            else:
                wrapped.load_adapter(folder, adapter_name=name)
    wrapped.eval()
    ids = torch.tensor(prompts)
    greedy = {
        "do_sample": False,
        "max_new_tokens": options.tokens,
        "min_new_tokens": options.tokens,
        "eos_token_id": None,
    }

    @torch.no_grad()
    def answer() -> list[list[int]]:
        told = wrapped.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=list(adapters), pad_token_id=0, **greedy
        )
        return told[:, ids.shape[1] :].tolist()

    return answer


if __name__ == "__main__":
    main()
