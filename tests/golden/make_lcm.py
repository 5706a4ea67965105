"""Writes `lcm.npz`: latent consistency distillation and sampling by diffusers' schedulers, PEFT's LoRA and torch's Adam.

For `tests/test_latent_consistency.py`. Run with a Python that has jlora, torch, PEFT and diffusers (`pip install
diffusers`): `python tests/golden/make_lcm.py`. A network of two layers on `z [rows, 6]`, the timestep and a condition; the
teacher's step is that of `DDIMScheduler`, the scalings and the sampler those of `LCMScheduler`. What chance decides is drawn by
jlora, so that the tests can call what users call. Factors are written transposed, as `a [in, r]` and `b [r, out]`.
"""

from pathlib import Path
from unittest import mock

import jax
import numpy as np
import torch
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.schedulers import scheduling_lcm
from peft import LoraConfig, get_peft_model

from jlora.losses import DiffusionSchedule
from jlora.losses.latent_consistency import draws

TIMES, SOLVER, ROWS, WIDTH, HIDDEN, RANK, STEPS, RATE = 100, 10, 8, 6, 16, 2, 5, 3e-3
GUIDANCE, HUBER, DECAY = (1.0, 4.0), 1e-2, 0.8
#: Prediction, constant of the Huber loss, whether the target is an average, ends of the guidance.
CASES = {
    "epsilon": ("epsilon", HUBER, False, GUIDANCE),
    "sample": ("sample", None, False, GUIDANCE),
    "v_prediction": ("v_prediction", HUBER, True, GUIDANCE),
    "unguided": ("epsilon", HUBER, False, None),
}


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(WIDTH + 3, HIDDEN, bias=False)
        self.down = torch.nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, z, t, condition):
        return self.down(torch.tanh(self.up(torch.cat([z, t[:, None] / TIMES, condition], dim=1))))


def network(rng, base):
    """The network with PEFT's LoRA, whose b is not 0: alpha is PEFT's own 8, as in the authors' script."""
    found = Network()
    for name, weight in base.items():
        getattr(found, name).weight.data = torch.tensor(weight.T)
    found = get_peft_model(found, LoraConfig(r=RANK, target_modules=["up", "down"]))
    for name, param in found.named_parameters():
        if "lora" in name:
            param.data = torch.tensor(0.3 * rng.standard_normal(param.shape), dtype=torch.float32)
    return found


def factors(model):
    return {
        f"{layer}_{side}": getattr(getattr(model.base_model.model, layer), f"lora_{side.upper()}")["default"]
        .weight.detach().numpy().T.copy()
        for layer in ("up", "down")
        for side in ("a", "b")
    }  # fmt: skip


def original_of(ddim, output, t, z):
    """x0 and the sample one step earlier, row by row."""
    found = [ddim.step(o[None], int(at), row[None]) for o, at, row in zip(output, t, z)]
    return torch.cat([f.pred_original_sample for f in found]), torch.cat([f.prev_sample for f in found])


def consistency(lcm, ddim, output, t, z):
    scalings = [lcm.get_scalings_for_boundary_condition_discrete(float(at)) for at in t]
    skip, out = (torch.tensor(each, dtype=torch.float32)[:, None] for each in zip(*scalings))
    return skip * z + out * original_of(ddim, output, t, z)[0]


def distilled(case, base, x0, condition, alphas):
    prediction, huber, averaged, guidance = CASES[case]
    ddim = DDIMScheduler(TIMES, prediction_type=prediction, clip_sample=False, set_alpha_to_one=False)
    lcm = LCMScheduler(TIMES, prediction_type=prediction, original_inference_steps=SOLVER)
    ddim.alphas_cumprod = lcm.alphas_cumprod = torch.tensor(alphas)
    ddim.final_alpha_cumprod = ddim.alphas_cumprod[0]
    ddim.set_timesteps(SOLVER)
    model, average = (network(np.random.default_rng(1), base) for _ in range(2))
    started = factors(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], RATE)
    schedule, losses = DiffusionSchedule(alphas, prediction, SOLVER), []
    images, conditions = torch.tensor(x0), torch.tensor(condition)
    for number in range(STEPS):
        drawn = draws(jax.random.key(number), jax.numpy.asarray(x0), schedule, guidance or (0.0, 0.0))
        noise, w = torch.tensor(np.array(drawn.noise)), torch.tensor(np.array(drawn.guidance))[:, None]
        stride = TIMES // SOLVER
        late = torch.tensor(np.array(drawn.step), dtype=torch.long) * stride + stride - 1
        early = (late - stride).clamp(min=0)
        z = ddim.add_noise(images, noise, late)
        with torch.no_grad():
            with model.disable_adapter():
                output = model(z, late, conditions)
                if guidance:
                    output = output + w * (output - model(z, late, torch.zeros_like(conditions)))
            stepped = original_of(ddim, output, late, z)[1]
            wanted = consistency(
                lcm, ddim, (average if averaged else model)(stepped, early, conditions), early, stepped
            )
        error = consistency(lcm, ddim, model(z, late, conditions), late, z) - wanted
        loss = (error**2).mean() if huber is None else (torch.sqrt(error**2 + huber**2) - huber).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for held, new in zip(average.parameters(), model.parameters()):
            held.data = DECAY * held.data + (1 - DECAY) * new.data
        losses.append(loss.item())
    return model, {**{f"start_{k}": v for k, v in started.items()}, **factors(model), "losses": np.array(losses)}, lcm


def sampled(model, lcm, noise, condition, steps):
    """The loop of diffusers' pipeline, with JAX's noise."""
    fresh = iter([jax.random.normal(key, noise.shape) for key in jax.random.split(jax.random.key(9), steps)])
    drawn = lambda *_, **__: torch.tensor(np.array(next(fresh)))
    lcm.set_timesteps(steps)
    z = torch.tensor(noise)
    with torch.no_grad(), mock.patch.object(scheduling_lcm, "randn_tensor", drawn):
        for t in lcm.timesteps:
            output = model(z, t.expand(len(z)), torch.tensor(condition))
            z, x = lcm.step(output, t, z, return_dict=False)
    return x.numpy()


def main():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    base = {"up": draw(WIDTH + 3, HIDDEN) / 3, "down": draw(HIDDEN, WIDTH) / 4}
    x0, condition, noise = draw(ROWS, WIDTH), draw(ROWS, 2), draw(ROWS, WIDTH)
    alphas = LCMScheduler(TIMES, beta_start=0.001, beta_end=0.12).alphas_cumprod.numpy()
    written = {**base, "x0": x0, "condition": condition, "noise": noise, "alphas": alphas}
    for case in CASES:
        model, found, lcm = distilled(case, base, x0, condition, alphas)
        written |= {f"{case}_{name}": value for name, value in found.items()}
        for steps in (1, 4):
            written[f"{case}_sampled_{steps}"] = sampled(model, lcm, noise, condition, steps)
    for solver, steps in ((50, 4), (50, 7), (40, 40), (30, 1)):
        lcm = LCMScheduler(1000, original_inference_steps=solver)
        lcm.set_timesteps(steps)
        written[f"times_{solver}_{steps}"] = lcm.timesteps.numpy()
    np.savez_compressed(Path(__file__).parent / "lcm.npz", **written)


if __name__ == "__main__":
    main()
