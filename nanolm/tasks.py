"""Every built-in task and its heads: importing this module registers them (see `build.py`)."""

import nanolm.objectives.choose
import nanolm.objectives.choose_dual
import nanolm.objectives.choose_lm
import nanolm.objectives.classify
import nanolm.objectives.embed
import nanolm.objectives.multi
import nanolm.objectives.prompt
import nanolm.objectives.read
import nanolm.objectives.regress
import nanolm.objectives.similar
import nanolm.objectives.tag
import nanolm.objectives.write
import nanolm.task_heads  # noqa: F401  (imported for what they register)
