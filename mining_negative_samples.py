"""Mine hard negatives: passages near each query that do not answer it.

    python mining_negative_samples.py                            # toy_data, with the bundled model
    python mining_negative_samples.py config/mining_negative_samples.json --num_negatives 7
    python -m paddle.distributed.launch --nproc_per_node 2 mining_negative_samples.py [config.json] [--name value]
    python -m paddle.distributed.launch --devices 0,1,2,3 mining_negative_samples.py [config.json] [--name value]

Candidates are a query's nearest passages; known positives are never taken, and what comes so near a
positive that it probably answers the query too is dropped. Writes the rows with ``neg_passage`` and
``<output>.report.json``, which counts every drop by its reason.
"""

import sys

from utils.api import MiningNegativeSamples
from utils.arguments import scripts
from utils.arguments.scripts import MiningArguments
from utils.process import runtime

__all__ = ["MiningNegativeSamples", "main"]


def main() -> None:
    runtime.prepare()
    given = scripts.parse(MiningArguments, sys.argv[1:], "Mine hard negatives for queries with known positives.")
    from utils.files import report
    from utils.mining import job

    report.set_up_logging()
    result = job.mine(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
