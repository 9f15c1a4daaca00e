"""What a head is told about the cache that it is going to be trained on."""

from collections.abc import Callable

from featcache.backbones.prompt_tower import PromptTower
from featcache.errors import ConfigError
from featcache.manifest import Task
from featcache.reader import Cache
from heads import run_folder
from heads.base import FeatureSpec, HeadConfig
from heads.data import FeatureTables
from heads.losses import default_loss
from heads.losses.base import ClassStatistics, Loss, LossConfig
from heads.parts import Part, class_counts, cooccurrence
from heads.vocabulary import class_prompts


def feature_spec(
    cache: Cache,
    head: HeadConfig,
    loss: LossConfig | None,
    table: FeatureTables,
    part: Part,
    tower: Callable[[], PromptTower],
) -> FeatureSpec:
    """What a head is told about the cache: sizes, classes, statistics, class text features.

    Args:
        cache: trained on.
        head: resolved.
        loss: chosen by the user; see `build_loss`.
        table: features of the training rows.
        part: the training rows.
        tower: opens the text tower of the cache's backbone.
    """
    num_classes = cache.num_classes
    counts = class_counts(part, num_classes)
    prompts, templates = None, run_folder.template_list(cache, head)
    if head.wants_prompts():
        prompts = class_prompts(cache, templates, table.device.type)
    mean, std = table.statistics() if head.wants_statistics() else (None, None)
    dims = table.feature_dims
    return FeatureSpec(
        feature_dim=dims[head.arrays()[0]],
        num_classes=num_classes,
        task=cache.task,
        class_counts=counts,
        classes=cache.classes,
        prompts=prompts,
        logit_scale=float(cache.attributes["logit_scale"]),
        mean=None if mean is None else mean.cpu(),
        std=None if std is None else std.cpu(),
        templates=templates,
        feature_dims=dims,
        num_rows=len(part),
        criterion=build_loss(head, loss, cache.task, ClassStatistics(counts, len(part))),
        cooccurrence=cooccurrence(part, num_classes) if head.wants_cooccurrence() else None,
        support=lambda: (table.slice(0, len(table)), part.target_tensor(table.device)),
        text_tower=tower if head.wants_text_tower() else None,
    )


def build_loss(
    head: HeadConfig, chosen: LossConfig | None, task: Task, statistics: ClassStatistics
) -> Loss | None:
    """The loss on logits that the options mean; None for heads that bring their own.

    Args:
        head: that will be trained.
        chosen: by the user; None = the head's own choice, or that of the task.
        task: of the cache.
        statistics: of the rows that are trained on.

    Raises:
        ConfigError: if one is chosen that the head or the task has no use for.
    """
    if not head.takes_loss:
        if chosen is not None:
            raise ConfigError(
                f"loss={chosen.kind}: head {head.kind} has a loss of its own; leave it "
                "out, or choose another head"
            )
        return None
    loss = chosen or head.default_loss(task) or default_loss(task)
    if task not in loss.tasks:
        raise ConfigError(
            f"loss={loss.kind} is for {' and '.join(loss.tasks)} data, the cache is {task}; choose "
            "another loss"
        )
    if loss.needs_cosines and not head.gives_cosines():
        raise ConfigError(
            f"loss={loss.kind} takes cosines, head {head.kind} gives logits as it is set; "
            "use --head linear --head.cosine, or another loss"
        )
    return loss.build(statistics)
