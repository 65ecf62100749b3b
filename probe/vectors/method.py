"""The contract of a method, and what is the same for all that add something at a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import torch
from torch import Tensor

from probe.data.example import Episode
from probe.errors import UsageError, did_you_mean
from probe.models.model import Model
from probe.trace.edit import Edit, Edited, Output
from probe.trace.steer import steer

if TYPE_CHECKING:
    from pathlib import Path

    from probe.vectors.teacher import Teacher
    from probe.vectors.training import Training
    from probe.vectors.vector import Head, InContextVector

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Method:
    """How a vector is found and what it does; subclasses are tables of options.

    Attributes
    ----------
    name
        In files and on the command line.
    rows
        The positions where it acts (:meth:`probe.InContextVector.edits`).
    changes_weights
        Whether it has other weights (:meth:`adapted`) in place of edits.
    """

    name: ClassVar[str]
    rows: ClassVar[str] = "all"
    changes_weights: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name, with the options that are not the default ones."""
        usual = asdict(type(self)())
        changed = [f"{name}={value}" for name, value in asdict(self).items() if value != usual[name]]
        return " ".join([self.name, *changed])

    def edits(self, parameters: Parameters, *, scale: float = 1.0, heads: Sequence[Head] | None = None) -> list[Edit]:
        """What the parameters change in a forward, in every layer."""
        raise NotImplementedError

    def adapted(self, model: Model, parameters: Parameters, *, scale: float, layers: Sequence[int] | None) -> Model:
        """The model with other weights, for methods that change weights; the given one stays as it is."""
        raise NotImplementedError

    def constants(self, parameters: Parameters, *, scale: float = 1.0) -> list[Constant]:
        """What the edits are where they do not depend on what is read, and so could be merged into biases."""
        raise UsageError(
            f"What {self.label} does depends on what is read, or on where: it cannot be merged into weights. What can "
            "is m2iv, i2cl and mimic:size=constant; inject others."
        )

    def acting(self, parameters: Parameters) -> list[int]:
        """The layers in which the parameters change something."""
        return sorted({edit.layer for edit in self.edits(parameters)})

    def acting_heads(self, parameters: Parameters) -> list[Head]:
        """The heads in which the parameters change something, for methods that act on heads."""
        raise UsageError(f"{self.name} acts on whole layers, not on single heads; choose layers.")

    def random(self, parameters: Parameters, generator: torch.Generator) -> dict[str, Tensor]:
        """The same parameters with their directions drawn at random.

        Every vector (a layer's, or a head's) keeps its norm, and all else stays: alphas, and what MimIC sizes its
        shifts with.
        """

        def draw(value: Tensor) -> Tensor:
            noise = torch.randn(value.shape, generator=generator)
            drawn: Tensor = noise / noise.norm(dim=-1, keepdim=True) * value.norm(dim=-1, keepdim=True)
            return drawn

        return {name: draw(value) if name.split("_")[0] == "v" else value for name, value in sorted(parameters.items())}

    def fit(
        self,
        model: Model,
        episodes: Sequence[Episode],
        *,
        training: Training | None = None,
        teacher: Teacher | None = None,
        directory: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> InContextVector:
        """Find the parameters.

        Parameters
        ----------
        model
            Stays as it is.
        episodes
            With demonstrations: a model that reads them is the teacher.
        training
            How: batches, seed, share of the episodes that validate; for trained methods also steps and step sizes.
        teacher
            What was read before, to be used again by other methods.
        directory
            Where training keeps its state, so that it goes on where it stopped.
        progress
            Called with what is done and what there is to do.
        """
        raise NotImplementedError


@dataclass
class Steps:
    """How far a method that reads its episodes itself has come.

    Attributes
    ----------
    tell
        Called with what is done and what there is to do.
    total, done
        Episodes to read, and read.
    """

    tell: Callable[[int, int], None] | None
    total: int
    done: int = 0

    def add(self, n: int) -> None:
        """So many episodes more."""
        self.done += n
        if self.tell and n:
            self.tell(self.done, self.total)


@dataclass(frozen=True)
class Objective:
    """What a trained method is to make small: a weighted sum.

    Attributes
    ----------
    kl
        Weight of KL(teacher ‖ student), mean over the positions that predict the answer's tokens and its end: a vector
        that has not learned to stop goes on talking.
    temperature
        Of both distributions; the term is multiplied by its square.
    ce
        Weight of the cross-entropy of the gold answer, mean over its tokens and the one that ends it.
    align
        Weight of the mean square distance to the teacher's states, over layers, the query's and the answer's positions,
        and features.
    align_site
        Of these states.
    reduction
        ``mean`` over features and positions (as MimIC's code), or ``sum`` over them, mean over layers (as its paper).
    synergy
        Weight of M²IV's synergistic term: the cross-correlation of what attention and the MLP write should be diagonal.
    off_diagonal
        Weight of what is off its diagonal, within that term.
    released
        As the released codes of LIVE and MimIC have it: distributions are compared at the positions *of* the answer's
        tokens, which leaves out the prediction of the first, with 1e-6 added to the probabilities; and cross-entropy
        runs over all that the student reads.
    """

    kl: float = 0.0
    temperature: float = 1.0
    ce: float = 0.0
    align: float = 0.0
    align_site: Output = "mlp_output"
    reduction: Literal["mean", "sum"] = "mean"
    synergy: float = 0.0
    off_diagonal: float = 5e-3
    released: bool = False

    def __post_init__(self) -> None:
        if min(self.kl, self.ce, self.align, self.synergy, self.off_diagonal) < 0 or self.temperature <= 0:
            raise UsageError("Weights of losses are 0 or more, and a temperature is more than 0.")
        if not any((self.kl, self.ce, self.align, self.synergy)):
            raise UsageError("All losses have weight 0: there is nothing to learn from. Give one of them a weight.")
        check_site(self.align_site, get_args(Output))
        if self.reduction not in ("mean", "sum"):
            raise UsageError(f"There is no reduction {self.reduction!r}; choose mean or sum.")

    @property
    def site(self) -> Output | None:
        """Of the teacher's states that are needed."""
        return self.align_site if self.align else None

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of those with a weight."""
        return tuple(name for name in ("kl", "ce", "align", "synergy") if getattr(self, name))

    def weigh(self, values: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of terms."""
        return torch.stack([getattr(self, name) * value for name, value in values.items()]).sum()


@dataclass(frozen=True)
class Trained(Method):
    """A method whose parameters are learned by gradient descent, the model frozen."""

    @property
    def objective(self) -> Objective:
        """What is to become small."""
        raise NotImplementedError

    def check(self, model: Model) -> None:
        """Refuse a model that the method cannot act on, before anything is read.

        Raises
        ------
        UsageError
            If it cannot.
        """

    extracted: ClassVar[tuple[str, ...]] = ()
    """Names of parameters that are read off the model (:meth:`extract`) and not trained."""

    def extract(self, model: Model, episodes: Sequence[Episode], batch_size: int) -> dict[str, Tensor]:
        """These parameters, float32 on the CPU; most methods have none."""
        return {}

    def start(self, model: Model, generator: torch.Generator) -> dict[str, Tensor]:
        """The parameters before training, float32 on the CPU."""
        raise NotImplementedError

    def step_size(self, name: str) -> float:
        """How fast a parameter learns, unless told otherwise."""
        raise NotImplementedError

    def student(self, model: Model, parameters: Parameters) -> Callable[[], Model]:
        """What gives the model with the parameters in it, as they are when it is called."""
        return lambda: steer(model, self.edits(parameters), self.label)

    def fit(
        self,
        model: Model,
        episodes: Sequence[Episode],
        *,
        training: Training | None = None,
        teacher: Teacher | None = None,
        directory: Path | None = None,
        progress: Callable[[int, int], None] | None = None,
        begin: InContextVector | None = None,
    ) -> InContextVector:
        """Train; see :mod:`probe.vectors.training`.

        Parameters
        ----------
        model, episodes, training, teacher, directory, progress
            As for :meth:`Method.fit`.
        begin
            A vector whose parameters to begin with, in place of those of :meth:`start`: one of this method, or of
            another that has the same.
        """
        from probe.vectors.training import train

        return train(
            self,
            model,
            episodes,
            training=training,
            teacher=teacher,
            directory=directory,
            progress=progress,
            begin=begin,
        )


@dataclass(frozen=True)
class Constant:
    """``factor * value + shift`` at every position, whatever is read.

    Attributes
    ----------
    site, layer
        Where.
    shift
        As a position's value: ``[hidden]``, or at heads ``[head, head_dim]``.
    factor
        A number, if not 1.
    """

    site: Edited
    layer: int
    shift: Tensor
    factor: Tensor | None = None

    def edit(self) -> Edit:
        """What it changes; in float32 at least, whatever the model's type. Adding zeros changes no bit."""

        def fn(value: Tensor, _: object) -> Tensor:
            own = widen(value) if self.factor is None else self.factor.to(value.device) * widen(value)
            return (own + self.shift.to(value.device)).to(value.dtype)

        return Edit(self.site, self.layer, fn)


def turned(value: Tensor, generator: torch.Generator) -> Tensor:
    """Vectors ``[…, n, width]`` in random directions that keep their lengths and the angles between the n of them."""
    _, coordinates = torch.linalg.qr(value.mT)  # of the n vectors in their own span, [rank, n]
    noise = torch.randn(*value.shape[:-2], value.shape[-1], coordinates.shape[-2], generator=generator)
    found: Tensor = torch.linalg.qr(noise).Q @ coordinates
    return found.mT.contiguous()


def widen(value: Tensor) -> Tensor:
    """In float32, or in float64 if it is."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def all_heads(value: Tensor) -> list[Head]:
    """Of parameters ``[layer, head, …]``."""
    return [(layer, head) for layer in range(value.shape[0]) for head in range(value.shape[1])]


def check_self_attention(model: Model) -> None:
    """Refuse layers without self-attention, for methods that act on heads."""
    if missing := sorted(set(range(model.n_layers)) - set(model.choose_layers(None))):
        raise UsageError(
            f"The layers {', '.join(map(str, missing))} of {model.name} have cross-attention alone, where no head "
            "attends to demonstrations; choose a method that acts on layers, such as live."
        )


def head_factors(heads: Sequence[Head] | None, n_layers: int, n_heads: int, scale: float) -> dict[int, Tensor]:
    """How strongly each head of a layer is acted on, ``[head]``, by the layers in which any is."""
    check_heads(heads, n_layers, n_heads)
    chosen = torch.full((n_layers, n_heads), scale if heads is None else 0.0)
    for layer, head in heads or ():
        chosen[layer, head] = scale
    acting = range(n_layers) if heads is None else sorted({layer for layer, _ in heads})
    return {layer: chosen[layer] for layer in acting}


def check_heads(heads: Sequence[Head] | None, n_layers: int, n_heads: int) -> None:
    """Refuse heads that do not exist."""
    wrong = [(a, b) for a, b in heads or () if not (0 <= a < n_layers and 0 <= b < n_heads)]
    if wrong:
        raise UsageError(
            f"There are layers 0 to {n_layers - 1} with heads 0 to {n_heads - 1}; asked for "
            f"{', '.join(f'{a}.{b}' for a, b in wrong)}."
        )


def refuse_heads(method: Method, heads: Sequence[Head] | None) -> None:
    """For methods that act on whole layers."""
    if heads is not None:
        raise UsageError(f"{method.name} acts on whole layers, not on single heads; choose layers.")


def check_site(site: str, known: Sequence[str]) -> None:
    """Refuse a site that does not exist."""
    if site not in known:
        raise UsageError(f"There is no site {site!r} here; {did_you_mean(site, tuple(known))}")
