"""Latent consistency distillation, by which a diffusion model needs a few steps alone; and the sampler for what it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlora.core.tree.adapted import Adapted
from jlora.losses.diffusion import DiffusionSchedule

Denoiser = Callable[[Any, jax.Array, jax.Array, Any], jax.Array]
"""An `Adapted` or plain params, `z [rows, ...]`, timesteps `[rows]` and a condition to the model's output `[rows, ...]`."""


class Draws(NamedTuple):
    """What chance decides in one evaluation of the loss.

    Attributes:
        noise: ε, of the shape of x0.
        step: int `[rows]`, the number of the solver's step that is distilled, from 0.
        guidance: `[rows]`, w.
    """

    noise: jax.Array
    step: jax.Array
    guidance: jax.Array


def consistency_distillation(
    fn: Denoiser,
    adapted: Adapted,
    x0: jax.Array,
    condition: Any,
    unconditional: Any,
    key: jax.Array,
    schedule: DiffusionSchedule,
    *,
    guidance: tuple[float, float] | None = (3.0, 15.0),
    huber: float | None = 1e-3,
    target: Any = None,
    teacher: Any = None,
) -> jax.Array:
    """The loss of LCM-LoRA: one step of a guided solver must not change what the model says the end of its path is.

    For every row a timestep `t` of the solver's is drawn, a guidance `w` and noise; `t' = max(t - k, 0)`:

    - `z_t = α_t x0 + σ_t ε`
    - the teacher's output is guided, `c + w (c - u)` with its outputs `c` under the condition and `u` without, and takes one
      step of DDIM to `z_t'`
    - the loss is the mean over rows and entries of `d(f(z_t, t) - f(z_t', t'))`, `f(z, t) = c_skip(t) z + c_out(t) x0(z, t)`

    `d(e)` is the pseudo-Huber `√(e² + huber²) - huber`, or `e²`. Neither the teacher nor the target has a gradient. The
    teacher is the base itself, whatever the adapters' start, so there is no second copy of a model. Guidance enters through it
    alone, so that the trained model is sampled without.

    Args:
        fn: a function of params, `z`, timesteps and a condition to the output that the schedule's `prediction` names: a
            lifted one. It is called four times.
        adapted: what is trained, with the params that are differentiated: `adapted.replace(params=p)`.
        x0: `[rows, ...]`, images, or latents.
        condition: what `fn` takes, for these rows.
        unconditional: the same for no condition, such as the empty prompt; not read without guidance.
        key: of the draws.
        schedule: the model's noise schedule.
        guidance: the ends between which `w` is drawn, evenly; `w + 1` is what others call guidance scale, so that 0 is none.
            None leaves it out, and one call of `fn`.
        huber: the constant of the pseudo-Huber loss; None for the squared error.
        target: params by which `f(z_t', t')` is taken, such as `adapted.replace(params=average)` with an exponential moving
            average of the trained params; by default the adapted ones themselves.
        teacher: params of the teacher; by default `adapted.base`.

    Returns:
        One number, in float32 at least.

    Raises:
        ValueError: for guidance without `unconditional` or with its ends the wrong way round, a `huber` that is not positive,
            and an output that has not the shape of x0.

    Example:
        >>> params = {"in": jnp.ones((6, 8)) / 8, "out": jnp.ones((8, 4))}
        >>> def model(params, z, t, condition):
        ...     inputs = jnp.concatenate([z, t[:, None] / 1000, condition[:, None]], axis=1)
        ...     return jnp.tanh(inputs @ params["in"]) @ params["out"]
        >>> adapted = jlora.adapterize(params, {"in": jlora.LoRA(rank=2), "out": jlora.LoRA(rank=2)})
        >>> schedule = jlora.losses.DiffusionSchedule(jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000)))
        >>> x0, labels, none = jnp.ones((2, 4)), jnp.array([1.0, 2.0]), jnp.zeros(2)
        >>> def loss(trained, key):
        ...     now = adapted.replace(params=trained)
        ...     return jlora.losses.consistency_distillation(jlora.lift(model), now, x0, labels, none, key, schedule)
        >>> gradients = jax.grad(loss)(adapted.params, jax.random.key(0))

    Reference:
        Luo et al. 2023, arXiv:2311.05556 (LCM-LoRA) and arXiv:2310.04378 (LCM), whose Algorithm 1 has an average as its target;
        the defaults are those of the authors' script for LoRA.
    """
    if guidance is not None and unconditional is None:
        raise ValueError("guidance needs what stands for no condition: give unconditional, or guidance=None")
    if guidance is not None and not guidance[0] <= guidance[1]:
        raise ValueError(f"guidance must be the least and the largest w, got {guidance}")
    if huber is not None and not huber > 0:
        raise ValueError(f"huber must be above 0, or None for the squared error, got {huber}")
    drawn = draws(key, x0, schedule, (0.0, 0.0) if guidance is None else guidance)
    without = None if guidance is None else unconditional
    sides = adapted.base if teacher is None else teacher, adapted if target is None else target
    student, wanted = both_ends(fn, adapted, *sides, x0, condition, without, drawn, schedule)
    error = student - wanted
    return jnp.mean(error**2 if huber is None else jnp.sqrt(error**2 + huber**2) - huber)


def draws(key: jax.Array, x0: jax.Array, schedule: DiffusionSchedule, guidance: tuple[float, float]) -> Draws:
    """Noise, and for every row a step of the solver and a guidance."""
    keys, rows = jax.random.split(key, 3), x0.shape[:1]
    return Draws(
        jax.random.normal(keys[0], x0.shape, x0.dtype),
        jax.random.randint(keys[1], rows, 0, schedule.solver_steps),
        jax.random.uniform(keys[2], rows, minval=guidance[0], maxval=guidance[1]),
    )


def both_ends(
    fn: Denoiser,
    student: Any,
    teacher: Any,
    target: Any,
    x0: jax.Array,
    condition: Any,
    unconditional: Any,
    drawn: Draws,
    schedule: DiffusionSchedule,
) -> tuple[jax.Array, jax.Array]:
    """`f(z_t, t)` of the student and, without a gradient, `f(z_t', t')` of the target after the teacher's step."""
    late = jnp.asarray(schedule.solver_timesteps)[drawn.step]
    early = jnp.maximum(late - schedule.stride, 0)
    z = schedule.add_noise(x0, drawn.noise, late).astype(x0.dtype)
    output = _output(fn, teacher, z, late, condition)
    if unconditional is not None:
        w = drawn.guidance.reshape(-1, *[1] * (x0.ndim - 1))
        output = output + w * (output - _output(fn, teacher, z, late, unconditional))
    stepped = schedule.add_noise(*schedule.predicted(output, z, late), early).astype(x0.dtype)
    stepped = jax.lax.stop_gradient(stepped)
    wanted = schedule.consistency(_output(fn, target, stepped, early, condition), stepped, early)
    return schedule.consistency(_output(fn, student, z, late, condition), z, late), jax.lax.stop_gradient(wanted)


def lcm_sample(
    fn: Denoiser,
    params: Any,
    noise: jax.Array,
    condition: Any,
    key: jax.Array,
    schedule: DiffusionSchedule,
    *,
    steps: int = 4,
) -> jax.Array:
    """Samples of a latent consistency model in a few steps: go to the end of the path, add noise again, and so on.

    `x = f(z, t)`, then `z = α_t' x + σ_t' ε` at the next timestep with fresh noise; after the last it is `x`. Other samplers,
    such as DDIM, are not for such a model.

    Args:
        fn: as for `consistency_distillation`.
        params: an `Adapted`: LCM-LoRA, or its sum with adapters of a style (`jlora.combine([style, lcm], [0.8, 1.0])`).
        noise: `[rows, ...]`, the start, of deviation 1.
        condition: what `fn` takes, for these rows.
        key: of the noise of all later steps; not read for one step.
        schedule: the one of the distillation.
        steps: how many times `fn` is called.

    Returns:
        `[rows, ...]`, x0.

    Raises:
        ValueError: for more steps than the schedule's solver has, or none, and an output that has not the shape of the noise.

    Example:
        >>> params = {"in": jnp.ones((5, 8)) / 8, "out": jnp.ones((8, 4))}
        >>> def model(params, z, t, condition):
        ...     return jnp.tanh(jnp.concatenate([z, t[:, None] / 1000], axis=1) @ params["in"]) @ params["out"]
        >>> adapted = jlora.adapterize(params, {"in": jlora.LoRA(rank=2), "out": jlora.LoRA(rank=2)})
        >>> schedule = jlora.losses.DiffusionSchedule(jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000)))
        >>> noise = jax.random.normal(jax.random.key(0), (2, 4))
        >>> images = jlora.losses.lcm_sample(jlora.lift(model), adapted, noise, None, jax.random.key(1), schedule)

    Reference:
        Luo et al. 2023, arXiv:2310.04378, Algorithm 3; timesteps and steps are those of diffusers' `LCMScheduler`.
    """
    times = jnp.asarray(schedule.sampling_timesteps(steps))

    def step(z: jax.Array, now: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        t, after, own = (jnp.broadcast_to(now[0], z.shape[:1]), jnp.broadcast_to(now[1], z.shape[:1]), now[2])
        x = schedule.consistency(_output(fn, params, z, t, condition), z, t).astype(z.dtype)
        return schedule.add_noise(x, jax.random.normal(own, z.shape, z.dtype), after).astype(z.dtype), x

    # What the last step adds noise to is dropped, so that all steps are one program.
    _, found = jax.lax.scan(step, noise, (times, jnp.append(times[1:], 0), jax.random.split(key, steps)))
    return found[-1]


def _output(fn: Denoiser, params: Any, z: jax.Array, timesteps: jax.Array, condition: Any) -> jax.Array:
    output = fn(params, z, timesteps, condition)
    if output.shape != z.shape:
        raise ValueError(f"the model gave shape {output.shape} for inputs of shape {z.shape}: wanted the same")
    return output.astype(jnp.promote_types(output.dtype, jnp.float32))
