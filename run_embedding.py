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

from utils import arguments, runtime
from utils.training_arguments import training_arguments

# What a run without an argument file starts from: the settings that suit the bundled model, unless another is named.
DEFAULT_CONFIG = str(Path(__file__).parent / "config" / "multilingual-e5-small" / "emb_argument.json")

_DESCRIPTION = (
    "Train an embedding model. Without a JSON file, and with the bundled model, what "
    "config/multilingual-e5-small/emb_argument.json says comes before the defaults below."
)


def main() -> None:
    runtime.prepare(trains=True)
    given = arguments.parse(training_arguments(), sys.argv[1:], _DESCRIPTION, DEFAULT_CONFIG, "model_name_or_path")
    from utils import report, training

    report.set_up_logging()
    result = training.train(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
