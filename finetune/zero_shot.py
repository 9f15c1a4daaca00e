"""Job: zero-shot classes and accuracy of a dual encoder, such as `finetune.pretrain` makes.

python -m finetune.zero_shot --images photos --backbone.model local-dir:runs/clip

The same as `heads.zero_shot`, beside the job whose results it is asked for most.
"""

from featcache.config import run_job
from heads.zero_shot import ZeroShotJobConfig, run

if __name__ == "__main__":
    run_job(ZeroShotJobConfig, run)
