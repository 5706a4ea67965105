"""One optimizer step of PEFT's LoRA and of its bound in torch, on the Llama of step_time.py.

Started by step_time.py with the Python that has torch, transformers and peft; it says which variants it has, then runs one
step for each name that it reads and answers with the seconds, so that both libraries' steps are interleaved.
"""

import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model(s: dict) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=s["vocab"],
        hidden_size=s["width"],
        intermediate_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["heads"],
        max_position_embeddings=s["length"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False)


class Bound(torch.nn.Module):
    """Only a scale of the input embedding is trained."""

    def __init__(self, net: LlamaForCausalLM, width: int) -> None:
        super().__init__()
        self.net, self.scale = net, torch.nn.Parameter(torch.ones(width))

    def forward(self, tokens):
        embedded = self.net.get_input_embeddings()(tokens) * self.scale
        return self.net(inputs_embeds=embedded, labels=tokens).loss


class Peft(torch.nn.Module):
    def __init__(self, net: LlamaForCausalLM, rank: int, dora: bool) -> None:
        super().__init__()
        self.net = get_peft_model(
            net, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LINEAR, lora_dropout=0.0, use_dora=dora)
        )

    def forward(self, tokens):
        return self.net(input_ids=tokens, labels=tokens).loss


def main() -> None:
    s = json.loads(sys.argv[1])
    tokens = torch.randint(0, s["vocab"], (s["batch"], s["length"]))
    nets = {
        "torch bound": Bound(model(s), s["width"]),
        "PEFT LoRA": Peft(model(s), s["rank"], False),
        "PEFT DoRA": Peft(model(s), s["rank"], True),
    }
    trained = {name: [p for p in net.parameters() if p.requires_grad] for name, net in nets.items()}
    optimizers = {name: torch.optim.AdamW(found, lr=1e-4) for name, found in trained.items()}

    def step(name: str) -> float:
        start = time.perf_counter()
        optimizers[name].zero_grad()
        loss = nets[name](tokens)
        loss.backward()
        optimizers[name].step()
        loss.item()
        return time.perf_counter() - start

    print(json.dumps({"variants": list(nets), "torch": torch.__version__, "threads": torch.get_num_threads()}))
    sys.stdout.flush()
    for line in sys.stdin:
        print(step(line.strip()))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
