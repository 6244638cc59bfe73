"""Train an embedding model from a JSON argument file.

    python run_embedding.py                                      # toy_data, with the bundled model
    python run_embedding.py config/xlm_roberta/emb_argument.json --learning_rate 2e-5
    python -m paddle.distributed.launch --nproc_per_node 2 run_embedding.py config/bert/emb_argument.json
    python -m paddle.distributed.launch --devices 0,1,2,3 run_embedding.py config/qwen/emb_argument.json

Takes the arguments of PaddleNLP's Trainer beside its own. Writes the trained model to ``output_dir``, in a
form that every script here loads by path, and checkpoints below it; a killed run goes on from the last one.
"""

import sys
from pathlib import Path

from utils.arguments import scripts
from utils.arguments.training import training_arguments
from utils.process import runtime

# What a run without an argument file starts from: the settings that suit the bundled model, unless another is named.
DEFAULT_CONFIG = str(Path(__file__).parent / "config" / "multilingual-e5-small" / "emb_argument.json")

_DESCRIPTION = (
    "Train an embedding model. Without a JSON file, and with the bundled model, what "
    "config/multilingual-e5-small/emb_argument.json says comes before the defaults below."
)


def main() -> None:
    runtime.prepare(trains=True)
    given = scripts.parse(training_arguments(), sys.argv[1:], _DESCRIPTION, DEFAULT_CONFIG, "model_name_or_path")
    from utils.files import report
    from utils.training import job

    report.set_up_logging()
    result = job.train(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
