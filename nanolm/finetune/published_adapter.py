"""The adapter of a fine-tuning run for `peft`: low-rank changes, and the task's head whole.

base = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
PeftModel.from_pretrained(base, "adapter")
"""

from __future__ import annotations

import json
from typing import Any

from nanolm.finetune.published import (
    Note,
    described_folder,
    families_of,
    proved,
    scaled,
    their_model,
)
from nanolm.hub.adapter_files import CONFIG, config_bytes
from nanolm.hub.keys import Tensors
from nanolm.inference.export_peft import (
    base_tensors,
    can_prove_adapter,
    in_theirs,
    require_low_rank,
    with_adapter,
)
from nanolm.saved import Saved


def task_adapter(
    saved: Saved, note: Note = print
) -> tuple[Tensors, dict[str, bytes], dict[str, Any]]:
    """(tensors, files, figures of the proof) of a fine-tuning run's adapter.

    Raises UserError when it has none that peft has, transformers has no such head, or computes
    something else.
    """
    adapter = require_low_rank(saved)
    families = families_of(saved)
    base, model = base_tensors(saved.learner), saved.config.model
    own = {k: v for k, v in adapter.tensors(saved.learner).items() if k.startswith("heads.")}
    heads = scaled(saved.config.objective.name, saved.config.objective, own)
    named, described, model_class = described_folder(saved, base | heads, families)
    facts = json.loads(described["config.json"])
    family = families[facts["model_type"]]
    published = family.table.to_theirs(heads, model)
    tensors, adapter_facts = in_theirs(saved, family, base, published, None)
    files = {CONFIG: config_bytes(adapter_facts)}
    figures: dict[str, Any] = {"largest_difference": None, "greedy_tokens": None}
    if can_prove_adapter(note):
        theirs = their_model(model_class, facts)
        trunk = {name: tensor for name, tensor in named.items() if name not in published}
        theirs.load_state_dict(trunk, strict=False)  # its head is the adapter's to bring
        figures["largest_difference"] = proved(saved, with_adapter(theirs, tensors, files), note)
    return tensors, files, figures
