"""A small diffusion model of digits with the looks it is to learn, and the classifier that judges what it draws."""

import functools
import gzip

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import linalg

import jlora

SIDE, PATCHES, NOTHING, TIMESTEPS, SOLVER = 14, 7, 10, 1000, 20
STYLES = ("plain", "inverted", "striped")
POSES = ("upright", "turned")


class Block(nn.Module):
    """Two convolutions, between them what time and label say; then a mixer of places."""

    width: int

    @nn.compact
    def __call__(self, x, told):
        scale, shift = jnp.split(nn.Dense(2 * self.width, name="told")(told)[:, None, None], 2, axis=-1)
        hidden = nn.Conv(self.width, (3, 3), name="first")(nn.silu(nn.GroupNorm(4)(x)))
        hidden = nn.GroupNorm(4)(hidden) * (1 + scale) + shift
        x = x + nn.Conv(self.width, (3, 3), name="second")(nn.silu(hidden))
        places = jnp.swapaxes(nn.GroupNorm(4)(x).reshape(len(x), -1, self.width), 1, 2)
        mixed = nn.Dense(PATCHES**2, name="mix_out")(nn.silu(nn.Dense(2 * PATCHES**2, name="mix_in")(places)))
        return x + jnp.swapaxes(mixed, 1, 2).reshape(x.shape)


class Denoiser(nn.Module):
    """Images `[rows, 14, 14, 1]`, timesteps and labels, 10 for none, to what the schedule's prediction names."""

    width: int
    blocks: int

    @nn.compact
    def __call__(self, z, t, label):
        angles = t[:, None] * jnp.exp(jnp.linspace(0.0, -7.0, 16))
        time = nn.Dense(2 * self.width, name="time_in")(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1))
        told = nn.Dense(2 * self.width, name="time_out")(nn.silu(time)) + nn.Embed(11, 2 * self.width)(label)
        x = nn.Conv(self.width, (2, 2), (2, 2), name="patch")(z)
        x = x + self.param("place", nn.initializers.normal(0.02), (PATCHES, PATCHES, self.width))
        for number in range(self.blocks):
            x = Block(self.width, name=f"block_{number}")(x, nn.silu(told))
        x = nn.Dense(4, name="out")(nn.silu(nn.GroupNorm(4)(x)))
        return x.reshape(-1, PATCHES, PATCHES, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(z.shape)


@functools.cache
def denoiser(width, blocks):
    """The network as a function of params, lifted, for plain params and adapted ones; its start; and its adapters' spec."""
    module = Denoiser(width, blocks)

    def network(params, z, t, label):
        return module.apply({"params": params}, z, t, label)

    inputs = jnp.zeros((1, SIDE, SIDE, 1)), jnp.zeros(1, int), jnp.zeros(1, int)

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]

    def start(seed):
        """Drawn in numpy, since compiling the network's own start takes as long as training it for a while."""
        rng = np.random.default_rng(seed)

        def leaf(path, like):
            if path[-1].key in ("scale", "bias"):
                return jnp.full(like.shape, path[-1].key == "scale", jnp.float32)
            size = {"kernel": np.prod(like.shape[:-1]) ** -0.5, "embedding": like.shape[-1] ** -0.5, "place": 0.02}
            return jnp.asarray(size[path[-1].key] * rng.standard_normal(like.shape), jnp.float32)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    sites = jlora.sites(lambda params: network(params, *inputs), start(0))
    spec = {"(patch|out)/kernel": jlora.LoRA(4), ".*/kernel": jlora.LoRA(8)}  # 2 x 2 pixels have 4 values
    return jlora.lift(network), start, lambda params, seed: jlora.adapterize(params, spec, jax.random.key(seed), sites)


@functools.cache
def schedule(prediction):
    return jlora.losses.DiffusionSchedule(np.cumprod(1 - np.linspace(1e-4, 0.02, TIMESTEPS)), prediction, SOLVER)


def denoising_loss(fn, params, x0, label, key, prediction):
    """The mean squared error of the prediction; one label in ten is taken away, for guidance."""
    keys, plan = jax.random.split(key, 3), schedule(prediction)
    t = jax.random.randint(keys[0], label.shape, 0, TIMESTEPS)
    noise = jax.random.normal(keys[1], x0.shape)
    label = jnp.where(jax.random.uniform(keys[2], label.shape) < 0.1, NOTHING, label)
    # The velocity is what add_noise makes of noise and minus the image.
    alpha, sigma = (plan.add_noise(one, 1 - one, t) for one in (jnp.ones_like(x0), jnp.zeros_like(x0)))
    wanted = noise if prediction == "epsilon" else alpha * noise - sigma * x0
    return jnp.mean((fn(params, plan.add_noise(x0, noise, t), t, label) - wanted) ** 2)


def ddim(fn, params, noise, label, times, count, guidance, plan):
    """Samples by DDIM: from each of the first `count` timesteps to the next, and from the last to 0."""

    def step(number, z):
        t, after = (jnp.broadcast_to(each, label.shape) for each in (times[number], times[number + 1]))
        twice = (
            jnp.concatenate([z, z]),
            jnp.concatenate([t, t]),
            jnp.concatenate([label, jnp.full_like(label, NOTHING)]),
        )
        under, free = jnp.split(fn(params, *twice), 2)
        x0, eps = plan.predicted(under + guidance * (under - free), z, t)
        return jnp.where((after > 0)[:, None, None, None], plan.add_noise(x0, eps, after), x0)

    return jax.lax.fori_loop(0, count, step, noise)


@functools.cache
def mnist(folder):
    """MNIST as (images [rows, 28, 28] in 0 to 1, labels), of training and of test."""

    def read(name, skip):
        return np.frombuffer(gzip.decompress((folder / "mnist" / name).read_bytes()), np.uint8)[skip:]

    parts = (
        (read(f"{part}-images-idx3-ubyte.gz", 16), read(f"{part}-labels-idx1-ubyte.gz", 8))
        for part in ("train", "t10k")
    )
    return [(images.reshape(-1, 28, 28) / np.float32(255), labels.astype(np.int32)) for images, labels in parts]


def drawn(images, style="plain", pose="upright"):
    """Images `[rows, 28, 28]` at half the size, from -1 to 1, in a style and a pose."""
    x = images.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)) * 2 - 1
    x = np.rot90(x, axes=(1, 2)) if pose == "turned" else x
    stripes = np.where(np.arange(SIDE) % 4 < 2, 0.0, -1.0)[:, None]
    x = -x if style == "inverted" else np.maximum(x, stripes) if style == "striped" else x
    return np.ascontiguousarray(x[..., None], np.float32)


class Judge(nn.Module):
    """Which digit, style and pose an image shows, and the features before."""

    @nn.compact
    def __call__(self, x):
        for width in (16, 32):
            x = nn.relu(nn.Conv(width, (3, 3), (2, 2))(x))
        features = nn.Dense(32)(nn.relu(nn.Dense(64)(x.reshape(len(x), -1))))
        return features, [nn.Dense(count)(nn.relu(features)) for count in (10, len(STYLES), len(POSES))]


@functools.cache
def judge(folder, steps):
    """The trained judge: images to what they show `[rows, 3]` and features; and how often it is right on the test set."""
    module, (images, labels) = Judge(), mnist(folder)[0]
    params = module.init(jax.random.key(0), jnp.zeros((1, SIDE, SIDE, 1)))
    tx, rng = optax.adam(2e-3), np.random.default_rng(0)

    @jax.jit
    def step(params, state, x, wanted):
        def loss(params):
            heads = module.apply(params, x)[1]
            losses = [optax.softmax_cross_entropy_with_integer_labels(h, wanted[:, n]) for n, h in enumerate(heads)]
            return jnp.mean(sum(losses))

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    def rows_of(images, labels, each):
        """All looks, `each` rows of every one."""
        parts, wanted = [], []
        for style in range(len(STYLES)):
            for pose in range(len(POSES)):
                which = rng.integers(len(labels), size=each)
                parts.append(drawn(images[which], STYLES[style], POSES[pose]))
                wanted.append(np.stack([labels[which], np.full(each, style), np.full(each, pose)], axis=1))
        return np.concatenate(parts), np.concatenate(wanted)

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state, *rows_of(images, labels, 24))

    @jax.jit
    def see(x):
        features, heads = module.apply(params, x)
        return jnp.stack([jnp.argmax(head, axis=-1) for head in heads], axis=1), features

    x, wanted = rows_of(*mnist(folder)[1], 500)
    return see, np.mean(np.asarray(see(x)[0]) == wanted, axis=0).round(4).tolist()


def frechet(features, real):
    """The Fréchet distance of two sets of features `[rows, size]`, taken as Gaussians."""
    (mean, cov), (other, cov2) = ((each.mean(0), np.cov(each.T)) for each in (np.float64(features), np.float64(real)))
    root = linalg.sqrtm(cov @ cov2).real
    return float(((mean - other) ** 2).sum() + np.trace(cov + cov2 - 2 * root))
