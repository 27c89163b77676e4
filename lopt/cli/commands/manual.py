"""What `--help` of the commands says beside their options: examples."""

from __future__ import annotations

TRAIN = """
\b
Examples:
  lopt train digits-lstm
  lopt train quadratic-lstm --out runs/q --set trainer.steps=500 --set rule.hidden=16
  lopt train my.toml
  lopt train --resume runs/q --time-limit 30m
  torchrun --nproc-per-node 2 --max-restarts 3 -m lopt train quadratic-lstm --set trainer.threads=1

Under torchrun the processes share the tasks of every outer step; one that is lost is started again, and the run goes on
from its last checkpoint. docs/train.md has more.
"""

SWEEP = """
\b
Examples:
  lopt sweep digits-lstm --vary trainer.learning_rate=1e-3,3e-3,1e-2 --vary rule.hidden=10,20
  lopt sweep mixture --vary trainer.learning_rate=1e-4:1e-2:log --vary estimator.sigma=0.003:0.1:log --samples 16
  lopt sweep mixture --vary trainer.learning_rate=1e-4:1e-2:log --samples 16 --halve-every 100
  lopt sweep --resume runs/sweep-mixture

Every trial is a run of its own, which `lopt report` and TensorBoard show. The best one is that with the best
validation, which flatters it: `lopt eval` judges its rule on other tasks.
"""

EVAL = """
\b
Examples:
  lopt eval digits-lstm
  lopt eval runs/q --steps 200 --seeds 50
  lopt eval my.safetensors --task mlp --set width=40 --set activation=relu --baselines adam,nesterov

RULE is a shipped name (see `lopt list shipped`), a rule file or the folder of a run. Without --task, --set and --steps
it is judged on all settings that its training card names.
"""

IMPORT = """
\b
Examples:
  lopt import celo.theta.state --rule celo -o celo.safetensors --licence MIT --source "arXiv 2501.12670"
  lopt import small_fc.pth --rule small_fc -o small_fc.safetensors --set step_mult=0.01
  lopt import theta.npz --rule velo -o velo.safetensors --set bugged_loss_features=false --name my-velo

FILE is flax msgpack, a numpy .npz archive or what torch.save wrote of a dict of tensors; no code in it is executed.
"""
