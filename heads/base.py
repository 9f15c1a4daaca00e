"""What a head must offer: a config that builds it, logits from features, and a loss.

Adding a head is one new file in `heads/models`: subclass `HeadConfig` and `Head`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor, nn

from featcache.backbones.prompt_tower import PromptTower
from featcache.config import Config
from featcache.manifest import Task
from heads.losses.base import Loss, LossConfig

if TYPE_CHECKING:
    from heads.run_folder import LoadedRun

Shape = Literal["cosine", "constant", "linear", "one_cycle", "plateau"]
"""Of a learning-rate schedule; see `heads.optim.ScheduleConfig`."""

Features = tuple[Tensor, ...]
"""A batch as a head reads it: one tensor of B rows for each array that its config names, in order.

Features are float32 as stored, not normalised; masks (`…_mask`) are bool. `text/projected` has one
vector a row, (B, D): of the row's caption, or the mean of its captions, each brought to length 1. A
row without a caption has zeros there, and in the joint encoder's arrays: a missing modality.
"""


@dataclass(frozen=True)
class FeatureSpec:
    """What a head is told about the cache it will be trained on.

    Attributes:
        feature_dim: width of the first array the head reads (P for `image/projected`).
        num_classes: C.
        task: single_label or multi_label.
        class_counts: (C,) int64 training rows with each class, of the rows really trained on.
        classes: class table (name, count, metadata), C rows in index order.
        prompts: (T, C, P) float32 per-template class text features, not normalised; None if the
            head did not ask for text.
        logit_scale: multiplier of image-text cosines that the backbone was trained with.
        templates: T templates that `prompts` were made from; empty = not known.
        mean, std: (D,) float32 over the first array's training rows, for heads that ask for them;
            None otherwise, and when a trained head is loaded (its own tensors hold them).
        feature_dims: width of each array the head reads, by name.
        num_rows: N, rows really trained on.
        criterion: the loss on logits that the user chose, for heads with `takes_loss`; None when a
            trained head is loaded.
        cooccurrence: (C, C) int64 training rows with both classes, for heads that ask for it; None
            otherwise, and when a trained head is loaded.
        text_tower: opens the frozen text tower of the cache's backbone, for heads that learn
            prompts in it; None when a trained head is loaded.
        support: gives the features and targets of all training rows, for heads that are made of
            them rather than trained; None when a trained head is loaded.
    """

    feature_dim: int
    num_classes: int
    task: Task
    class_counts: npt.NDArray[np.int64]
    classes: pd.DataFrame
    prompts: Tensor | None
    logit_scale: float
    mean: Tensor | None = None
    std: Tensor | None = None
    templates: Sequence[str] = ()
    feature_dims: Mapping[str, int] = field(default_factory=dict)
    num_rows: int = 0
    criterion: Loss | None = None
    cooccurrence: npt.NDArray[np.int64] | None = None
    support: Callable[[], tuple[Features, Tensor]] | None = None
    text_tower: Callable[[], PromptTower] | None = None

    def width(self, array: str) -> int:
        """Last axis of an array that the head reads."""
        return self.feature_dims.get(array, self.feature_dim)


@dataclass(frozen=True)
class OptimDefaults:
    """A head's own choice where `optim` leaves a field unset.

    Attributes:
        lr: peak learning rate; weight_decay: decoupled weight decay. None: the head trains several
            side by side, named by its own options.
        epochs: passes over the training split; batch_size: most rows per optimiser step (a small
            split gets smaller batches, see `heads.optim.resolve`).
        warmup_share: part of all optimiser steps in which the learning rate rises, 0..1.
        optimizer, schedule, ema_decay: see `heads.optim.OptimConfig`.
    """

    lr: float | None = 1e-3
    weight_decay: float | None = 0.0
    epochs: int = 100
    batch_size: int = 4096
    warmup_share: float = 0.0
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    schedule: Shape = "cosine"
    ema_decay: float = 0.0


class Head(nn.Module, ABC):
    """Class logits from cached features, and the loss that trains them."""

    trainable: bool = True
    """False for heads without parameters to train (zero-shot)."""
    has_probabilities: bool = True
    """False where a multi-label logit only ranks, so that no threshold on it means anything."""

    scored_classes: Sequence[int] | None = None
    """Classes that the head has a score for, where it does not have one for all of them: metrics of
    several labels look at these alone."""

    @property
    def batch_options(self) -> Sequence[str]:
        """Options in use whose part of the loss is of a batch's rows together, none in most heads.

        Such as a mean over the classes in a batch: batches that come in pieces change what it is.
        """
        return ()

    forward: Callable[..., Tensor]
    """Class logits: one positional tensor for each array of `HeadConfig.arrays`, in that order (see
    `Features`); returns (B, C) float32, of which softmax (single label) or sigmoid (multi label)
    gives probabilities."""

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The training loss of a batch under "loss", and its parts by name for the log.

        Args:
            features: arrays of `HeadConfig.arrays`, then those of `HeadConfig.training_arrays`.
            targets: (B,) int64 class indices, or (B, C) float32 multi-hot.
            progress: share of all optimiser steps already taken, 0..1; schedules read it.
        """
        raise TypeError(f"{type(self).__name__} has nothing to train")

    @property
    def selectable(self) -> bool:
        """False while this head's candidates must not be picked as the best.

        Such as before the last of several stages; looked at after each epoch, before `after_epoch`.
        """
        return True

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimiser parameter groups; default one group with all trainable parameters.

        A group may have a "name" by which `lr_factors` speaks of it.

        Args:
            lr: peak learning rate; NaN where `optim_defaults` leaves the choice to the head.
            weight_decay: likewise.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [{"params": parameters, "lr": lr, "weight_decay": weight_decay}]

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, (B, C) logits) of each model trained side by side; most heads train just one."""
        yield "", self.forward(*features)

    def monitors(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, (B, C) logits) of what is scored after each epoch but never picked.

        Such as the parts of a head that are trained before the whole. Names differ from those of
        the candidates.
        """
        return iter(())

    def after_epoch(self, scores: Mapping[str, float]) -> None:
        """Told the main metric of each candidate and monitor, 0..1, after each epoch's validation.

        What the head keeps of them must be in registered buffers: these are saved and restored, so
        that a resumed training goes on as if it had not been interrupted.
        """

    def lr_factors(self) -> Mapping[str, float]:
        """Further factors of the learning rate in the coming epoch, by name of a parameter group.

        0 freezes a group; one that is not named keeps its rate. See `param_groups`.
        """
        return {}

    def give_sparse_gradients(self) -> None:
        """Told that the optimiser updates single rows: `loss` may give gradients of them alone."""

    @property
    def any_classes(self) -> bool:
        """Whether the head can be asked for classes by name alone, see `replace_classes`."""
        return False

    def replace_classes(self, text: Tensor) -> None:
        """Asks for other classes from now on, such as were never trained on.

        Args:
            text: (T, C', E) per-template text features of their names, made as those in training.

        Raises:
            TypeError: if the head knows the classes it was trained on only.
        """
        raise TypeError(f"{type(self).__name__} knows the classes it was trained on only")

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Tensors that training changes, by name: what `head.safetensors` holds.

        Args:
            candidate: one of the names that `candidates` gives; the tensors then fit the head that
                `HeadConfig.only(candidate)` builds.
        """
        wanted = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: t.detach() for name, t in self.state_dict().items() if name in wanted}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts tensors of `trained_state` back in place.

        Raises:
            ValueError: if names or shapes differ from this head's own.
        """
        own = self.trained_state()
        if own.keys() != state.keys():
            different = sorted(own.keys() ^ state.keys())
            raise ValueError(f"tensors {different} are not in both the file and the head")
        for name, tensor in state.items():
            if own[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
                )
        self.load_state_dict({**self.state_dict(), **state})


class HeadConfig(Config):
    """Options that every head shares."""

    needs: ClassVar[tuple[str, ...]] = ("image/projected",)
    """Arrays of the cache that the head reads, in the order in which `Head.forward` takes them."""
    takes_loss: ClassVar[bool] = False
    """Whether the head trains on `FeatureSpec.criterion`, so that `--loss` can choose it."""
    needs_prompts: ClassVar[bool] = False
    """Whether the head starts from class text features."""
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults()
    """Used where `optim` leaves a field unset."""

    kind: str
    """Head kind."""

    def arrays(self) -> tuple[str, ...]:
        """`needs`, for heads whose options decide it."""
        return self.needs

    def training_arrays(self) -> tuple[str, ...]:
        """Further arrays that only `Head.loss` reads, after those of `arrays`."""
        return ()

    def own_optim(self) -> OptimDefaults:
        """`optim_defaults`, for heads whose options decide it."""
        return self.optim_defaults

    def default_loss(self, task: Task) -> LossConfig | None:
        """The loss on logits where the user chooses none; None = what suits the task.

        Args:
            task: of the cache.
        """
        return None

    def wants_prompts(self) -> bool:
        """`needs_prompts`, for heads whose options decide it."""
        return self.needs_prompts

    def wants_text_tower(self) -> bool:
        """Whether `build` needs `FeatureSpec.text_tower`."""
        return False

    def gives_cosines(self) -> bool:
        """Whether the head can train on a loss that takes cosines (`LossConfig.needs_cosines`)."""
        return False

    def wants_cooccurrence(self) -> bool:
        """Whether `build` needs `FeatureSpec.cooccurrence`."""
        return False

    def wants_statistics(self) -> bool:
        """Whether `build` needs `FeatureSpec.mean` and `std`."""
        return False

    def with_optim(self, lr: float | None, weight_decay: float | None) -> Self:
        """This config with the choice that `optim` makes, None where it leaves a field unset.

        Only heads that train several (lr, weight decay) pairs side by side have to care.

        Raises:
            ConfigError: if the head's own options say otherwise.
        """
        return self

    def prepared(self, open_run: "Callable[[Path], LoadedRun]") -> Self:
        """This config with what other run folders state filled in, once before training.

        The result is what the run folder records, so that it never needs the others again.

        Args:
            open_run: reads a finished run folder, of a head that fits the cache to train on.
        """
        return self

    def only(self, candidate: str) -> Self:
        """The config of the head that holds that candidate alone; see `Head.candidates`."""
        return self

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """Prompt templates that the head starts from: format strings over class table columns.

        Args:
            classes: class table.
            kind: dataset kind, for heads whose templates depend on it.
        """
        return []

    @abstractmethod
    def build(self, spec: FeatureSpec) -> Head:
        """The head, freshly initialised from torch's global random generator."""
