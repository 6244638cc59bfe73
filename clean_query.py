"""Remove near-duplicate queries from a JSONL file by a cosine threshold.

    python clean_query.py                                        # toy_data
    python clean_query.py config/clean_query.json --similarity_threshold 0.8
    python -m paddle.distributed.launch --nproc_per_node 2 clean_query.py config/clean_query.json
    python -m paddle.distributed.launch --devices 0,1,2,3 clean_query.py config/clean_query.json

Rows are taken in file order; a row is removed when its query's cosine with some kept row's reaches
``similarity_threshold``. Writes the kept rows, ``<output>.removed.jsonl`` and ``<output>.report.json``.
"""

import sys

from utils.api import Clean_Query
from utils.arguments import scripts
from utils.arguments.scripts import CleanArguments
from utils.process import runtime

__all__ = ["Clean_Query", "main"]


def main() -> None:
    runtime.prepare()
    given = scripts.parse(CleanArguments, sys.argv[1:], "Remove near-duplicate queries.")
    from utils.cleaning import job
    from utils.files import report

    report.set_up_logging()
    result = job.clean(given)
    if runtime.rank() == 0:
        runtime.tell(result.summary())


if __name__ == "__main__":
    runtime.run(main)
