"""What is built in, as the plug-in that is always there: importing this module registers all of it.

Registries open it when they are first asked for a name (`Registry(kind, opens=…)`), so nothing else
imports it, and a command that asks no registry pays nothing for it.
"""

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
import nanolm.finetune.tasks.write
import nanolm.finetune.tasks.write_from_source
import nanolm.model.heads
import nanolm.model.positions
import nanolm.model.relative
import nanolm.model.trunk
import nanolm.model.two_stream
import nanolm.objectives.clm
import nanolm.objectives.mlm
import nanolm.objectives.pair
import nanolm.objectives.permutation
import nanolm.objectives.prefix
import nanolm.objectives.span
import nanolm.peft.adalora
import nanolm.peft.bitfit
import nanolm.peft.bottleneck
import nanolm.peft.dora
import nanolm.peft.ia3
import nanolm.peft.lora
import nanolm.peft.prefix
import nanolm.peft.prompt
import nanolm.rules.adversarial
import nanolm.rules.distilbert
import nanolm.rules.distill
import nanolm.rules.rdrop
import nanolm.rules.replay
import nanolm.training.gradient
import nanolm.training.optim
import nanolm.training.schedules  # noqa: F401  (all are imported for what they register)
