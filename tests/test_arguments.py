import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields

import numpy as np
import pytest
from conftest import ROOT

from clean_query import Clean_Query
from embedding_evaluate import Embedding_Evaluation
from mining_negative_samples import MiningNegativeSamples
from utils.arguments import other_toolkits
from utils.arguments.fields import check, option
from utils.arguments.scripts import (
    DEFAULT_MODEL,
    ArgumentError,
    CleanArguments,
    EvaluateArguments,
    MiningArguments,
    build,
    input_paths,
    parse,
)
from utils.arguments.training import TrainArguments, training_arguments
from utils.models import bundled

SCRIPTS = (CleanArguments, MiningArguments, EvaluateArguments, training_arguments())


@dataclass
class Example:
    name: str = option("a", "a name", choices=("a", "beta"))
    count: int = option(3, "a count", at_least=1, at_most=9)
    rate: float = option(0.5, "a rate", above=0.0)
    limit: int | None = option(None, "a limit")
    flag: bool = option(False, "a flag")
    sizes: list[int] = option([1, 2], "sizes", at_least=1)


def parsed(*argv) -> Example:
    return parse(Example, list(argv), "An example.")


def test_flags_override_json_which_overrides_defaults(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"count": 5, "rate": 1, "limit": None, "sizes": [4]}))
    given = parsed(str(path), "--count", "7", "--flag", "true", "--sizes", "8,9")
    assert given == Example(count=7, rate=1.0, limit=None, flag=True, sizes=[8, 9])


@pytest.mark.parametrize("text", ["none", "null"])
def test_null_is_none(text):
    assert parsed("--limit", text).limit is None


def test_null_leaves_an_argument_that_needs_a_value_at_its_default(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"count": null, "rate": null, "sizes": null, "limit": null}')
    assert parsed(str(path), "--rate", "2") == Example(rate=2.0)
    assert build(Example, count=None) == Example()
    given = Example(count=None)
    with pytest.raises(ArgumentError, match="count is None; expected a whole number"):
        check(given)


@pytest.mark.parametrize("text", ["-5e-1", "-.5e0", "-0.5"])
def test_negative_numbers_are_values_in_any_form(text):
    assert parse(CleanArguments, ["--similarity_threshold", text], "").similarity_threshold == -0.5
    with pytest.raises(ArgumentError, match="sizes is -1; expected at least 1"):
        parsed("--sizes", "-1,2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_steps", "9" * 20], "max_steps is 99999999999999999999; expected at least -1 and at most 2147483647"),
        (["--pad_token_id", "-" + "9" * 20], "pad_token_id is -99999999999999999999; expected at least -2147483647"),
        (["--lora_alpha", "9" * 1000], "lora_alpha is a number of more than 100 digits; expected at least 1"),
        (["--power", "-1000"], "power is -1000.0; expected at least 0"),
        (["--dataloader_num_workers", "-8"], "dataloader_num_workers is -8; expected at least 0"),
        (["--per_device_eval_batch_size", "-1"], "per_device_eval_batch_size is -1; expected at least 1"),
        (["--weight_decay", "-1"], "weight_decay is -1.0; expected at least 0"),
        (["--max_grad_norm", "-1"], "max_grad_norm is -1.0; expected at least 0"),
        (["--local_rank", "0"], "local_rank is 0; not supported here: Paddle's launcher says which worker this is"),
    ],
)
def test_numbers_that_a_training_cannot_use_are_refused(flags, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        parse(training_arguments(), flags, "")


def test_evaluations_look_only_so_deep():
    with pytest.raises(ArgumentError, match="top_passages is 1000000000000; expected at least 0 and at most 100000"):
        build(EvaluateArguments, top_passages=10**12)


def test_commas_separate_the_items_of_a_list_in_json_too(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"sizes": "4, 5"}')
    assert parsed(str(path)).sizes == [4, 5]
    assert build(TrainArguments, dataset_name_or_path="a.jsonl,b.jsonl").dataset_name_or_path == ["a.jsonl", "b.jsonl"]
    assert build(TrainArguments, dataset_name_or_path=["a,b.jsonl"]).dataset_name_or_path == ["a,b.jsonl"]
    path.write_text('{"metrics": "mrr,map", "k_values": "5"}')
    assert parse(EvaluateArguments, [str(path)], "").metric_names() == ["mrr@5", "map@5"]
    for text, message in (("4,x", "sizes is 'x'; expected a whole number"), ("4,0", "sizes is 0; expected at least 1")):
        with pytest.raises(ArgumentError, match=message):
            build(Example, sizes=text)


def test_a_flag_alone_is_a_yes():
    assert parse(Example, ["--flag"], "").flag
    assert not parse(Example, ["--flag", "false"], "").flag


def test_a_default_file_is_read_unless_one_is_named_or_a_flag_forbids_it(tmp_path):
    for name, count in (("default", 3), ("named", 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"count": count}))
    default, named = str(tmp_path / "default.json"), str(tmp_path / "named.json")
    assert parse(Example, ["--rate", "0.5"], "", default, "name").count == 3
    assert parse(Example, [named], "", default, "name").count == 4
    assert parse(Example, ["--name", "a"], "", default, "name").count == 3  # its own default forbids nothing
    assert parse(Example, ["--name", "beta"], "", default, "name").count == Example().count


@pytest.mark.parametrize(
    ("cls", "given", "meant"),
    [
        (MiningArguments, "negative_number", "num_negatives"),
        (MiningArguments, "query_instruction_for_retrieval", "query_template"),
        (TrainArguments, "train_data", "dataset_name_or_path"),
        (CleanArguments, "input_file", "input_data_path"),
        (CleanArguments, "batch_size", "batch_tokens, a number of tokens"),
        (MiningArguments, "range_max", "range_for_sampling"),
        (EvaluateArguments, "embedder_query_max_length", "max_src_len"),
        (TrainArguments, "query_max_length", "max_query_len"),
        (TrainArguments, "gradient_checkpointing", "recompute"),
        (TrainArguments, "same_dataset_within_batch", "group_by_source"),
        (TrainArguments, "lr", "learning_rate"),
        (TrainArguments, "epochs", "num_train_epochs"),
        (TrainArguments, "batch_size", "per_device_train_batch_size"),
        (TrainArguments, "knowledge_distillation", "loss_type kl"),
        (TrainArguments, "use_mrl", "embedding_matryoshka_dims"),
        (TrainArguments, "negatives_x_device", "embedding_negatives_cross_device"),
        (TrainArguments, "train_n_passages", "group_size"),
        (TrainArguments, "query_instruction", "query_template"),
        (TrainArguments, "gc_q_chunk_size", "gradcache_chunk_size"),
        (TrainArguments, "train_set_file", "dataset_name_or_path"),
        (EvaluateArguments, "document_max_length", "max_src_len"),
        (EvaluateArguments, "encoded_save_path", "embedding_cache"),
        (EvaluateArguments, "corpus_file", "corpus_path"),
        (MiningArguments, "recall_num", "range_for_sampling"),
    ],
)
def test_names_of_other_toolkits_are_known_to_flags_and_json_alike(tmp_path, cls, given, meant):
    for name in (given, given.replace("_", "-")):
        with pytest.raises(ArgumentError, match=re.escape(f"unknown argument --{name}; did you mean --{meant}?")):
            parse(cls, [f"--{name}", "3"], "")
    with pytest.raises(ArgumentError, match=re.escape(f"unknown argument {given!r}; did you mean {meant}?")):
        build(cls, **{given: 3})
    (tmp_path / "a.json").write_text(json.dumps({given: 3}))
    with pytest.raises(ArgumentError, match=re.escape(f"a.json: unknown argument {given!r}; did you mean {meant}?")):
        parse(cls, [str(tmp_path / "a.json")], "")


def test_both_lengths_are_named_with_their_dashes():
    with pytest.raises(ArgumentError, match="did you mean --max_query_len and --max_passage_len"):
        parse(TrainArguments, ["--max_seq_length", "64"], "")


@pytest.mark.parametrize("cls", SCRIPTS)
@pytest.mark.parametrize(
    "name",
    ["deepspeed", "fsdp", "lora_name_or_path", "cache_path", "cache_dir", "small_threshold", "peft_model_path",
     "save_merged_lora_model"],
)  # fmt: skip
def test_names_without_a_counterpart_get_no_hint(cls, name):
    with pytest.raises(ArgumentError) as caught:
        parse(cls, [f"--{name}", "3"], "")
    assert str(caught.value) == f"unknown argument --{name}"
    with pytest.raises(ArgumentError) as caught:
        build(cls, **{name: 3})
    assert str(caught.value) == f"unknown argument {name!r}"


@pytest.mark.parametrize("cls", SCRIPTS)
def test_names_that_need_no_argument_are_told_why(cls):
    known = {f.name for f in fields(cls)}
    tables = {"not needed": other_toolkits.NOT_NEEDED, "not supported": other_toolkits.NOT_SUPPORTED}
    for kind, table in tables.items():
        for name, why in table.items():
            if name not in known:
                with pytest.raises(ArgumentError, match=re.escape(f"unknown argument --{name}; {kind}: {why}")):
                    parse(cls, [f"--{name}", "3"], "")
    names = [name for table in (*tables.values(), other_toolkits.CALLED_ELSEWHERE) for name in table]
    assert len(names) == len(set(names))


def test_every_hint_names_an_argument_of_some_script():
    known = {f.name for cls in SCRIPTS for f in fields(cls)}
    meant = {re.match(r"\w+", hint)[0] for hints in other_toolkits.CALLED_ELSEWHERE.values() for hint in hints}
    assert meant <= known


def test_all_unknown_names_are_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"cuont": 3, "rate": 1, "deepspeed": null, "epochs": 1, "flga": true}')
    with pytest.raises(ArgumentError) as caught:
        parsed(str(path))
    expected = "unknown arguments 'cuont' (did you mean count?), 'deepspeed', 'epochs', 'flga' (did you mean flag?)"
    assert str(caught.value) == f"{path}: {expected}"
    with pytest.raises(ArgumentError) as caught:
        parsed(str(path), "--cuont", "3", "--rate", "1", "--deepspeed=a", "b", "--flga", "--cuont", "-4")
    assert str(caught.value) == (
        "unknown arguments --cuont (did you mean --count?), --deepspeed, --flga (did you mean --flag?)"
    )
    with pytest.raises(ArgumentError) as caught:
        build(Example, cuont=3, deepspeed=None)
    assert str(caught.value) == "unknown arguments 'cuont' (did you mean count?), 'deepspeed'"


def test_what_is_left_over_without_an_unknown_flag_is_refused():
    with pytest.raises(ArgumentError, match=r"^unknown arguments 'b\.json', 'count' \(did you mean --count\?\)$"):
        parsed("a.json", "b.json", "count")
    with pytest.raises(ArgumentError, match=r"^unknown argument -count; did you mean --count\?$"):
        parsed("-count", "3")


def test_a_file_of_data_makes_no_endless_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(dict.fromkeys(map(str, range(2000)))))
    with pytest.raises(ArgumentError, match=r"'49' and 1,950 more$"):
        parsed(str(path))


@pytest.mark.parametrize(
    ("cls", "name"),
    [(CleanArguments, "template"), (TrainArguments, "query_template"), (CleanArguments, "passage_template")],
)
def test_backslash_n_is_a_new_line_in_a_template_given_as_a_flag(tmp_path, cls, name):
    text = "Instruct: a\\nQuery: {text}"
    assert getattr(parse(cls, [f"--{name}", text], ""), name) == "Instruct: a\nQuery: {text}"
    assert getattr(build(cls, **{name: text}), name) == text
    (tmp_path / "a.json").write_text(json.dumps({name: text}))
    assert getattr(parse(cls, [str(tmp_path / "a.json")], ""), name) == text


def test_backslash_n_stays_in_a_path_given_as_a_flag():
    assert parse(CleanArguments, ["--input_data_path", "a\\new.json"], "").input_data_path == "a\\new.json"


def test_rows_where_arguments_are_expected(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a"}\n{"query": "b"}\n')
    with pytest.raises(ArgumentError, match="Rows go into --input_data_path"):
        parse(CleanArguments, [str(path)], "")


def test_what_a_run_reads_is_what_names_files(tmp_path):
    """The file of arguments is among it, the output and other words are not."""
    path = tmp_path / "arguments.json"
    path.write_text(
        '{"input_data_path": "rows", "output_data_path": "auto", "dtype": "auto", "embedding_cache": "kept"}'
    )
    assert sorted(input_paths(parse(CleanArguments, [str(path)], ""))) == sorted(["rows", str(path)])
    flags = ["--input_data_path", "rows", "--output_data_path", "list", "--embedding_cache", "kept"]
    mining = parse(MiningArguments, [*flags, "--candidate_pool", "pool", "--answer_key", "answers"], "")
    assert sorted(input_paths(mining)) == ["pool", "rows"]
    training = ["--dataset_name_or_path", "a,b", "--output_dir", "out", "--model_name_or_path", "base"]
    assert sorted(input_paths(parse(TrainArguments, training, ""))) == ["a", "b", "base"]


def test_arguments_that_are_no_regular_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArgumentError, match="is no regular file"):
        parse(CleanArguments, [str(tmp_path / "pipe")], "")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cuont", "3"], "unknown argument --cuont; did you mean --count?"),
        (["--count", "0"], "count is 0; expected at least 1 and at most 9"),
        (["--count", "ten"], "count is 'ten'; expected a whole number"),
        (["--count", "1.5"], "count is '1.5'; expected a whole number"),
        (["--rate", "0"], "rate is 0.0; expected more than 0.0"),
        (["--rate", "nan"], "rate is nan; expected a finite number"),
        (["--name", "bata"], "did you mean beta?"),
        (["--flag", "maybe"], "flag is 'maybe'; expected true or false"),
        (["--sizes", "1,0"], "sizes is 0; expected at least 1"),
        (["--count"], "expected one argument"),
        (["none.json"], "none.json: no such file"),
    ],
)
def test_bad_flags(argv, message):
    with pytest.raises((ArgumentError, FileNotFoundError)) as caught:
        parsed(*argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"cuont": 3}', "unknown argument 'cuont'; did you mean count?"),
        ('{"count": "3"}', "count is '3'; expected a whole number"),
        ('{"count": true}', "count is True; expected a whole number"),
        ("[1]", "expected one JSON object"),
        ('{"count": 3,}', ":1: not JSON"),
        ('{"count": ' + "9" * 5000 + "}", "a.json: holds a number of more than 4,300 digits; expected a shorter one"),
        ("[" * 100_000, "a.json: JSON nested too deeply; expected one flat JSON object"),
        ('{"count": 3, "rate": 1, "count": 3}', 'a.json: "count" is given twice; expected it once'),
        ('{"sizes": []}', "sizes is an empty list; expected at least one whole number"),
    ],
)
def test_bad_json(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ArgumentError) as caught:
        parsed(str(tmp_path / "a.json"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_threshold": 2}, "similarity_threshold is 2.0; expected at least -1.0 and at most 1.0"),
        ({"similarity_threshold": 10**400}, "similarity_threshold is out of range"),
        ({"template": "\ud800{text}"}, "expected valid Unicode"),
        ({"similarity_treshold": 0.5}, "did you mean similarity_threshold?"),
        ({"template": "query: "}, 'expected exactly one "{text}"'),
        ({"template": "{text}", "query_template": "{text}"}, "both given"),
        ({"dtype": "fp32"}, "expected one of"),
        ({"embeddings_path": "a", "reference_data_path": "b"}, "both given"),
    ],
)
def test_clean_arguments(options, message):
    with pytest.raises(ArgumentError) as caught:
        build(CleanArguments, **options)
    assert message in str(caught.value)


def test_numpy_scalars_are_numbers():
    given = build(Example, count=np.int64(4), rate=np.float32(0.5))
    assert (given.count, given.rate) == (4, 0.5)
    assert type(given.count) is int


def test_the_default_model_is_the_bundled_one():
    assert bundled.NAME == DEFAULT_MODEL


@pytest.mark.parametrize(("names", "cls"), [("clean*.json", CleanArguments), ("mining*.json", MiningArguments)])
def test_every_shipped_config_is_accepted(names, cls):
    for path in (ROOT / "config").glob(names):
        parse(cls, [str(path)], "")


@pytest.mark.parametrize("flags", [["--help"], ["--similarity_treshold", "0.5"], ["--similarity_threshold", "2"]])
def test_help_and_refusals_import_neither_numpy_nor_paddle(flags):
    code = (
        f"import sys; sys.argv = ['clean_query.py', *{flags!r}]; sys.path.insert(0, '.')\n"
        "import clean_query\n"
        "try: clean_query.main()\n"
        "except (SystemExit, ValueError): pass\n"
        "else: raise AssertionError('the job ran')\n"
        "assert not {'numpy', 'paddle', 'faiss'} & set(sys.modules), 'heavy import'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_the_classes_take_paddlenlps_arguments_in_its_order():
    usual = ("m", "t", "in", "out", "q {text}", 16, 128, False, "float32")
    cleaned = Clean_Query(*usual, 0.7).arguments
    assert cleaned.similarity_threshold == 0.7
    evaluated = Embedding_Evaluation(*usual).arguments
    assert (evaluated.dev_path, evaluated.neg_path, evaluated.dimension) == ("in", "out", [16])
    mined = MiningNegativeSamples(*usual).arguments
    for given in (cleaned, mined):
        assert (given.input_data_path, given.output_data_path, given.dimension) == ("in", "out", 16)
    for given in (cleaned, mined, evaluated):
        found = (
            given.model_path,
            given.tokenizer_path,
            given.template,
            given.max_src_len,
            given.normalize,
            given.dtype,
        )
        assert found == ("m", "t", "q {text}", 128, False, "float32")
    assert Clean_Query("m", None, None, None).arguments == build(CleanArguments, model_path="m")


def test_paddlenlps_names_of_the_dev_files_are_taken(tmp_path):
    names = {"query_pos_passage_path": "dev", "neg_passage_path": "neg"}
    expected = build(EvaluateArguments, dev_path="dev", neg_path="neg")
    assert Embedding_Evaluation(**names).arguments == expected
    for flags in (
        [f"--{name}={value}" for name, value in names.items()],
        [f"--{name.replace('_', '-')}={value}" for name, value in names.items()],
    ):
        assert parse(EvaluateArguments, flags, "") == expected
    (tmp_path / "a.json").write_text(json.dumps(names))
    assert parse(EvaluateArguments, [str(tmp_path / "a.json")], "").dev_path == "dev"
    assert parse(EvaluateArguments, [str(tmp_path / "a.json"), "--dev_path", "other"], "").dev_path == "other"
    with pytest.raises(ArgumentError, match="query_pos_passage_path and dev_path are both given; they are one"):
        Embedding_Evaluation(dev_path="x", **names)
