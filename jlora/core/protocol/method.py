"""The method protocol on one page: what a file in `jlora/methods` gives.

A method is a frozen dataclass of hyperparameters. Its functions are pure and see one matrix: `w [in, out]`, used as
`y = x @ w`. The core folds attention kernels and convolutions to that form, maps over stacked layers and experts, and
knows paths; a method knows none of that. Equal hyperparameters are equal methods, so a method may sit in a pytree as
static data without retracing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, Self

import jax
import optax

from jlora.core.products.acting import Acting
from jlora.core.products.low_rank import Factors
from jlora.core.products.sparse import Sparse
from jlora.core.products.update import Update
from jlora.core.protocol.code import Code
from jlora.core.protocol.event import Event
from jlora.core.protocol.job import KnownToTheJob
from jlora.core.protocol.peft import Peft, PeftKind
from jlora.core.protocol.plain import PlainLoRA
from jlora.core.protocol.renewal import Renewal
from jlora.core.protocol.roles import Folded

Arrays = dict[str, jax.Array]

# The kind of site that a convolution in feature groups is.
GROUPED = "grouped conv"


@dataclass(frozen=True)
class Site(Folded):
    """One adapted leaf: where it is, and which of its axes play which role.

    Attributes:
        keys: the keys that lead to the leaf.
        shape: shape of the leaf.
        dtype: name of its dtype.
        in_axes: axes contracted with the activation, in the leaf's order.
        out_axes: axes that remain in the product.
        batch_axes: axes over which separate matrices are stacked (layers, experts).
        kind: how the function reads it: "dot", "conv", "grouped conv" (in feature groups) or "gather" (an embedding's lookup).
        method: the method that adapts it.
        beside: which of the leaves that the method's `beside` names the tree has.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]
    batch_axes: tuple[int, ...]
    kind: str
    method: Method
    beside: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The `/`-joined path of the leaf."""
        return "/".join(self.keys)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """What a method's functions see of one matrix.

    Attributes:
        w: the base matrix `[in, out]`, in its stored dtype (quantized bases arrive decoded).
        params: the trained arrays that `start` named.
        frozen: the constants that `start` named.
        site: the leaf this is a matrix of; static.
        shared: the arrays that `Method.shared` made for all leaves of the method, trained ones and constants by name.
        beside: the leaves that `Method.beside` names and the tree has, as `[out]`; in `apply` only where that has to add what
            changes.
        key: dropout key, in `Method.apply` alone; None where nothing is dropped.
        context: what the call told the method by the names in `Method.context`, as it was given: no batch axes.
        codes: for `jlora.Fields` the fields of the code in whose form the matrix is kept.
        code: the code; static.
    """

    w: jax.Array
    params: Arrays
    frozen: Arrays
    site: Site = field(metadata={"static": True})
    shared: Arrays = field(default_factory=dict)
    beside: Arrays = field(default_factory=dict)
    key: jax.Array | None = None
    codes: Arrays = field(default_factory=dict)
    code: Code | None = field(default=None, metadata={"static": True})
    context: Arrays = field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Start:
    """What a method starts from: one matrix (`Method.start`), or all its leaves together (`Method.shared`).

    Attributes:
        params: trained arrays by name.
        frozen: constants by name.
    """

    params: Arrays
    frozen: Arrays = field(default_factory=dict)


class OptimizerRule(Protocol):
    """What a method asks of the optimizer beyond learning rates; sites with equal rules share one (one rank budget).

    One that needs the adapters' constants has a second function, `with_constants(frozen)`, which gives the rule for these.
    """

    def wrap(self, tx: optax.GradientTransformation, sites: tuple[Site, ...]) -> optax.GradientTransformation:
        """An optimizer of all trained arrays that applies the rule to those of `sites` and leaves the rest to `tx`."""
        ...


@dataclass(frozen=True)
class Method(KnownToTheJob):
    """Base of all methods. A subclass is a frozen dataclass and overrides what it needs.

    Class attributes:
        family: where the pages list the method: a key of `catalog.FAMILIES`. Each method that comes with jlora states
            its own.
        matrix: False for methods that take the leaf in its own shape (any number of axes, biases too).
        exact_start: False for methods whose start is not exactly the base's output.
        local: roles ("in", "out") along which the method may be cut: the effective weight of a slice is what the
            method gives for the slices of its fields. Lets `shard_map` be entered without forming the weight.
        restarts: False for methods that train values of the weight itself, such as `Full`: a new link of a chain
            (`jlora.restart`) leaves them, and their moments, as they are.
        axes: for each field the role of each of its axes: "in", "out", "rank" or "" (anything else).
        form: the form of update in which the method gives its weight, known before there are arrays; None where the weight
            is always formed. It follows from the most derived class that says anything of its weight: `Factors` where that
            has `factors`, `Sparse` where it has `sparse`, `Acting` where it has `apply`, None where it has `weight` alone,
            whatever its parents have. A class that has an `update` of its own names it.
        mergeable: False for methods that act in a way that no weight can, such as a network beside the product; they have no
            `weight`.
        beside: names of leaves beside the adapted one that the method changes too, such as ("bias",). Where the tree has
            them, `merged_beside` gives them anew, and a lifted function gets these in their place. Where no weight says what
            the method does (`mergeable`), or a key decides it, the function gets the leaf as it is: then `apply` sees it in
            `View.beside`, and adds to its result what changes.
        optional: names of fields that only some matrices have, such as large ones.
        context: names of what a call may tell the method, as in `adapted.on(slot=ids)`; `check_context` refuses what it can't
            take, and `View.context` has what was given.
        tells: names of what the method says at a product, and is then told at the products of its layer's leaves after that: in
            their `View.context`, whichever leaf of the layer said it.
        peft_kind: the method's place in PEFT as a table (see `PeftKind`), where PEFT has the method itself; it counts for the
            class that states it, not for those derived from it.
        CASES: examples of the method for the contract test; every method has some.
    """

    family: ClassVar[str] = ""
    matrix: ClassVar[bool] = True
    exact_start: ClassVar[bool] = True
    local: ClassVar[frozenset[str]] = frozenset()
    restarts: ClassVar[bool] = True
    form: ClassVar[type[Update] | None] = None
    mergeable: ClassVar[bool] = True
    beside: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[frozenset[str]] = frozenset()
    context: ClassVar[frozenset[str]] = frozenset()
    tells: ClassVar[frozenset[str]] = frozenset()
    peft_kind: ClassVar[PeftKind | None] = None
    CASES: ClassVar[tuple[Method, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Finds the class's form, from the most derived class that says anything of its weight.

        Raises:
            TypeError: for an `update` whose form the class does not name, or the reverse.
        """
        super().__init_subclass__(**kwargs)
        last = vars(next(each for each in cls.__mro__ if vars(each).keys() & _WEIGHT))
        if ("update" in last) != ("form" in last):
            raise TypeError(
                f"{cls.__name__} must state both or neither: update(view), and form, the class that it returns"
            )
        given = next((form for name, form in _FORMS.items() if name in last), None)
        cls.form, cls.update = last.get("form", given), last.get("update", Method.update)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """The role of each axis of each field, trained and frozen."""
        raise NotImplementedError(f"{type(self).__name__} must state the axes of its fields")

    @property
    def kept_fields(self) -> tuple[str, ...]:
        """Constants in which a restart keeps what was learned (see `finished`); without any it goes into the base."""
        return ()

    @property
    def links(self) -> int | None:
        """How many links the kept constants have room for (`link` counts the finished ones); None for no limit."""
        return None

    @property
    def renewal(self) -> Renewal:
        """What `jlora.restart` makes of the optimizer's moments where its caller does not say it."""
        return Renewal()

    @property
    def alike(self) -> frozenset[str]:
        """Names of the fields that start the same at all matrices of a shape; all others are drawn for each, or zero."""
        return frozenset()

    @property
    def uses_key(self) -> bool:
        """Whether the method draws random numbers in the forward pass."""
        return False

    @property
    def shared_fields(self) -> tuple[str, ...]:
        """Names of the arrays that all leaves of this method have in common, trained ones and constants (see `shared`)."""
        return ()

    @property
    def needs(self) -> frozenset[str]:
        """What `start` takes by keyword beside the matrix, from `jlora.prepare`: names of `jlora.core.protocol.statistics`."""
        return frozenset()

    @property
    def optimizer_rule(self) -> OptimizerRule | None:
        """What `jlora.optimizer` wraps the optimizer with: rank allocation, a proximal step, a penalty on the factors."""
        return None

    @property
    def event(self) -> Event | None:
        """What the training loop does from the host between some steps (see `run_events`): a chain's next link, a round."""
        return None

    def __str__(self) -> str:
        """The method with its first hyperparameter and those that differ from the defaults."""
        changed = [f for n, f in enumerate(fields(self)) if n == 0 or getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!s}' for f in changed)})"

    def check(self, site: Site) -> None:
        """Refuses a matrix that the method can't adapt.

        Raises:
            ValueError: with what is wanted; the core adds the path and the shape.
        """

    def check_context(self, context: Arrays) -> None:
        """Refuses what a call tells the method, as `adapted.on` gives it: by name, of those in `context`, shape and dtype.

        Raises:
            ValueError: with what is wanted; the core adds the path.
        """

    def shared(self, key: jax.Array, sites: tuple[Site, ...]) -> Start | Arrays:
        """The arrays that all leaves of this method share, given all of them; whole on every device of a mesh.

        A dict holds constants; a `Start` may hold trained arrays too, whose gradients are sums over the leaves. They lie in
        `adapted.params["~shared"]` and `adapted.frozen["~shared"]`, each method's under a name of its own.
        """
        return {}

    def start(self, key: jax.Array, w: jax.Array, site: Site, **statistics: jax.Array) -> Start:
        """The starting arrays for one matrix `w [in, out]`; `statistics` are those that `needs` names."""
        raise NotImplementedError(f"{type(self).__name__} has no start")

    def together(self, key: jax.Array, starts: list[Start], sites: tuple[Site, ...]) -> list[Start]:
        """The starts of all leaves of this method, changed by what they draw in common; batch axes in front."""
        return starts

    def finished(self, view: View) -> Arrays:
        """The constants of `kept_fields` after a restart, for methods that leave the base alone."""
        raise NotImplementedError(f"{type(self).__name__} keeps nothing")

    def weight(self, view: View) -> jax.Array:
        """The effective weight `[in, out]`. It defines the method: every other form must agree with it."""
        raise NotImplementedError(
            f"{type(self).__name__} must give weight(view), the effective weight [in, out], beside factors, sparse, update or "
            "apply: merging and some uses need it. A method that has none says mergeable = False"
        )

    def apply(self, x: jax.Array, product: Callable[[jax.Array], jax.Array], view: View) -> Any:
        """What the matrix does to its input: overriding it makes the method act, where a weight alone can't say it well.

        A method that has a weight too is linear in `x`, and the contract checks that both agree.

        Args:
            x: `[..., in]`, in the function's dtype.
            product: the base's product, `[..., in] -> [..., out]`, as often as wanted; it adds up in float32 at least, and
                takes inputs of more bits than `x` has without losing them.
            view: the matrix, its arrays, and the dropout key.

        Returns:
            `[..., out]`, which the core rounds to the function's dtype; or that and a dict of arrays, what the method says
            beside it, such as a router's scores: `jlora.lift(fn, aux=True)` returns these.
        """
        raise NotImplementedError(f"{type(self).__name__} does not act")

    def active(self, frozen: Arrays) -> jax.Array | None:
        """Which of a leaf's matrices the method changes, truths `[*batch]`; None for all. PEFT's files leave out the others.

        Args:
            frozen: the leaf's constants, batch axes in front.
        """
        return None

    def merged_beside(self, view: View) -> Arrays:
        """The leaves that `beside` names and the tree has, `[out]`, as `merge` puts them into the params."""
        return {}

    def update(self, view: View) -> Update | None:
        """The effective weight as a value of `form`, which owns how it is used: the fast path. None where there is none.

        By default what `factors`, `sparse` or `apply` gives; a method whose form is another one gives that here.
        """
        if self.form is Acting:
            return Acting(view)
        return self.factors(view) if self.form is Factors else self.sparse(view) if self.form is Sparse else None

    def factors(self, view: View) -> Factors | None:
        """The effective weight as factors, for methods that are low-rank. None where there are none."""
        return None

    def sparse(self, view: View) -> Sparse | None:
        """The effective weight as the base and a few entries, for methods that change no others. None where it is not."""
        return None

    @classmethod
    def joined(cls, methods: Sequence[Self]) -> tuple[Self, list[float]] | None:
        """One method for runs trained together whose methods, all of this class, differ in numbers: see `jlora.stack`.

        Asked of a class that defines it, not of those derived from it.

        Returns:
            The method, to whose rank the fields are padded by zeros without changing what they mean, and by what the update of
            each run's is then multiplied (other than 1 for methods that give factors alone). None where they differ in more.
        """
        return None

    def plain(self, view: View) -> PlainLoRA | None:
        """The effective weight as plain LoRA, for methods of which some ranks may be out of use: see `jlora.compact`."""
        return None

    def labels(self, site: Site) -> dict[str, str]:
        """The learning-rate group of each trained field (see `jlora.optimizer`)."""
        return {name: default_label(len(axes)) for name, axes in self.axes.items()}

    def rates(self, site: Site) -> dict[str, float]:
        """Factors of the group's learning rate for fields that learn slower or faster than their group."""
        return {}

    def shared_labels(self, trained: Arrays) -> dict[str, str]:
        """The learning-rate group of each trained array of `shared`, by default that of its number of axes."""
        return {name: default_label(array.ndim) for name, array in trained.items()}

    def shared_rates(self) -> dict[str, float]:
        """`rates` for the trained arrays of `shared`."""
        return {}

    def peft(self, params: Any, frozen: Any, shared: Any) -> Peft | None:
        """The adapter as PEFT has it, from numpy arrays `[*batch, ...]`; None where PEFT has no such thing.

        Asked of a class that defines it, not of those derived from it (see `states_peft`). Without one, a weight `w + a @ b`
        goes out as plain LoRA by `factors`. A method that PEFT has with tensors of its own states `peft_kind` instead.
        """
        return None


#: What a class says its weight by, with the form that it then has.
_FORMS: dict[str, type[Update]] = {"factors": Factors, "sparse": Sparse, "apply": Acting}
_WEIGHT = {*_FORMS, "weight", "update", "form"}


def states_peft(method: Method) -> bool:
    """Whether a method's own class gives its form of PEFT.

    An inherited one is not used: the class may have another weight than its parent, by whatever it overrides. A class whose
    weight is its parent's says so: `peft = LoRA.peft`.
    """
    return "peft" in vars(type(method))


def stated_kind(method: Method | type[Method]) -> PeftKind | None:
    """The place in PEFT that a method's own class states; an inherited one is not used, as with `states_peft`."""
    return vars(method if isinstance(method, type) else type(method)).get("peft_kind")


def default_label(ndim: int) -> str:
    """LoRA+'s rule for a leaf that is no factor: a vector learns as B does and never decays, a matrix as A does."""
    return "vector" if ndim <= 1 else "a"


def factor_labels(site: Site, labels: dict[str, str]) -> dict[str, str]:
    """LoRA+'s rule for the factors of a product: all are in "embedding" where the leaf is looked up, else as they are given."""
    return dict.fromkeys(labels, "embedding") if site.kind == "gather" else labels
