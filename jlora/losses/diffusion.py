"""What the outputs of a diffusion model mean: its noise schedule, and the arithmetic that goes with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, eq=False)
class DiffusionSchedule:
    """The noise schedule of a diffusion model: `z_t = α_t x0 + σ_t ε`, `α_t² = alphas_cumprod[t]`, `σ_t² = 1 - α_t²`.

    A constant, which a compiled function closes over. Prediction types have the names of Hugging Face's diffusers.

    Attributes:
        alphas_cumprod: `[timesteps]`, falling, between 0 and 1; its length is the number of timesteps of training.
        prediction: what the model's output is: "epsilon" is ε, "sample" is x0, "v_prediction" is `α ε - σ x0`.
        solver_steps: N, the number of steps of the DDIM solver; its timesteps are `k - 1, 2k - 1, …, N k - 1` with
            `k = timesteps // N`.
        sigma_data: of the boundary scalings: the deviation of the data.
        timestep_scaling: of the boundary scalings: what a timestep is multiplied by.

    Raises:
        ValueError: for a schedule that is not one axis of falling numbers between 0 and 1, or with ends from which the
            prediction tells nothing (α = 0 with "epsilon", σ = 0 with "sample" at a timestep of the solver), another
            prediction, and numbers out of range.

    Example:
        >>> schedule = jlora.losses.DiffusionSchedule(jnp.cumprod(1 - jnp.linspace(1e-4, 0.02, 1000)))
        >>> z = schedule.add_noise(jnp.ones((2, 4)), jnp.zeros((2, 4)), jnp.array([19, 999]))
    """

    alphas_cumprod: Any
    prediction: str = "epsilon"
    solver_steps: int = 50
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        # In numpy, since tables that are squared and rooted in 32 bits lose what is near 1.
        alphas = np.asarray(self.alphas_cumprod, np.float64)
        object.__setattr__(self, "alphas_cumprod", alphas)
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {self.prediction!r}")
        if alphas.ndim != 1 or not alphas.size:
            raise ValueError(f"alphas_cumprod must be [timesteps], got shape {alphas.shape}")
        if not (alphas.max() <= 1 and alphas.min() >= 0 and (np.diff(alphas) <= 0).all()):
            raise ValueError("alphas_cumprod must fall from at most 1 to at least 0: it is Π (1 - β), not β")
        if not 1 <= self.solver_steps <= alphas.size:
            raise ValueError(f"solver_steps must be from 1 to the {alphas.size} timesteps, got {self.solver_steps}")
        if not self.sigma_data > 0 or not self.timestep_scaling > 0:
            raise ValueError(
                f"sigma_data and timestep_scaling must be above 0, got {self.sigma_data} and {self.timestep_scaling}"
            )
        used = alphas[self.solver_timesteps]
        if self.prediction == "epsilon" and used.min() == 0:
            raise ValueError('alphas_cumprod ends at 0, where "epsilon" tells nothing of x0; use "v_prediction"')
        if self.prediction == "sample" and used.max() == 1:
            raise ValueError(
                'alphas_cumprod is 1 at a timestep of the solver, where "sample" tells nothing of the noise'
            )

    @property
    def solver_timesteps(self) -> np.ndarray:
        """`[solver_steps]`, rising; the last is the last but what does not divide by their number."""
        return np.arange(1, self.solver_steps + 1) * self.stride - 1

    @property
    def stride(self) -> int:
        """k, the timesteps that one step of the solver goes."""
        return len(self.alphas_cumprod) // self.solver_steps

    def sampling_timesteps(self, steps: int) -> np.ndarray:
        """`[steps]` of the solver's timesteps, falling from the last, about evenly; those of diffusers' `LCMScheduler`.

        Raises:
            ValueError: for more steps than the solver has, or none.
        """
        if not 1 <= steps <= self.solver_steps:
            raise ValueError(f"steps must be from 1 to the solver's {self.solver_steps}, got {steps}")
        return self.solver_timesteps[::-1][np.arange(steps) * self.solver_steps // steps]

    def add_noise(self, x0: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """`α_t x0 + σ_t noise`. Of the x0 and the noise that a model predicts at a later timestep it makes DDIM's step (η = 0).

        Args:
            x0: `[rows, ...]`.
            noise: of the same shape.
            timesteps: int `[rows]`.
        """
        alpha, sigma = self._levels(timesteps, x0)
        return alpha * x0 + sigma * noise

    def predicted(self, output: jax.Array, z: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a model's output says of `z`: x0 and ε.

        Args:
            output: of the model, `[rows, ...]`.
            z: `[rows, ...]`, what the model was given.
            timesteps: int `[rows]`, of z.
        """
        alpha, sigma = self._levels(timesteps, z)
        if self.prediction == "epsilon":
            return (z - sigma * output) / alpha, output
        if self.prediction == "sample":
            return output, (z - alpha * output) / sigma
        return alpha * z - sigma * output, sigma * z + alpha * output

    def boundary_scalings(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`c_skip = d² / ((s t)² + d²)` and `c_out = s t / √((s t)² + d²)`, which are 1 and 0 at timestep 0.

        `d` is `sigma_data`, `s` is `timestep_scaling`.
        """
        scaled = self.timestep_scaling * jnp.asarray(timesteps, jnp.float32)
        square = scaled**2 + self.sigma_data**2
        return self.sigma_data**2 / square, scaled / jnp.sqrt(square)

    def consistency(self, output: jax.Array, z: jax.Array, timesteps: jax.Array) -> jax.Array:
        """The consistency function `f(z, t) = c_skip(t) z + c_out(t) x0(z, t)` of a model's output; `z` itself at timestep 0.

        Args:
            output: of the model, `[rows, ...]`.
            z: `[rows, ...]`, what the model was given.
            timesteps: int `[rows]`, of z.
        """
        skip, out = (_over_rows(each, z) for each in self.boundary_scalings(timesteps))
        return skip * z + out * self.predicted(output, z, timesteps)[0]

    def _levels(self, timesteps: jax.Array, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        """α and σ, to be multiplied by what has the shape of `like`."""
        tables = np.sqrt(self.alphas_cumprod), np.sqrt(1 - self.alphas_cumprod)
        alpha, sigma = (_over_rows(jnp.asarray(table, jnp.float32)[timesteps], like) for table in tables)
        return alpha, sigma


def _over_rows(values: jax.Array, like: jax.Array) -> jax.Array:
    """`[rows]` with axes behind it."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
