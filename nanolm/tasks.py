"""Every built-in task and its heads: importing this module registers them (see `build.py`)."""

import nanolm.finetune.tasks.choose
import nanolm.finetune.tasks.choose_dual
import nanolm.finetune.tasks.choose_lm
import nanolm.finetune.tasks.classify
import nanolm.finetune.tasks.embed
import nanolm.finetune.tasks.heads
import nanolm.finetune.tasks.multi
import nanolm.finetune.tasks.prompt
import nanolm.finetune.tasks.read
import nanolm.finetune.tasks.regress
import nanolm.finetune.tasks.similar
import nanolm.finetune.tasks.tag
import nanolm.finetune.tasks.write  # noqa: F401  (imported for what they register)
