"""What commands for language models share: of a fine-tuned run they tell who answers for it."""

from __future__ import annotations

from nanolm.errors import require
from nanolm.finetune.config import TaskConfig
from nanolm.saved import Saved


def require_pretrained(saved: Saved, command: str) -> None:
    """Raises UserError for a run that was fine-tuned, whose heads answer for a task."""
    task = saved.config.objective.name
    require(
        not isinstance(saved.config, TaskConfig),
        f"{saved.folder} was fine-tuned (objective.name={task}), and `nanolm {command}` is for "
        f"pretrained models; ask it with `nanolm predict`",
    )
