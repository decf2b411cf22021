"""Every YAML in configs/ goes through the real schema; recipes say what they mean."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from atp.config import ATPConfig, read_yaml
from atp.data import Row, read_rows
from atp.errors import ConfigError
from atp.recipe import Recipe, apply_overrides

FOLDER = Path(__file__).parents[1] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))
MINIMAL = {"model": {"name_or_path": "m"}, "data": {"train": "t.jsonl"}, "output_dir": "runs/x"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_is_accepted_by_schema_peft_and_transformers(path, tmp_path):
    recipe = Recipe.from_yaml(path, [f"--output_dir={tmp_path}"])
    assert recipe.lora_config().target_modules == "all-linear"
    assert recipe.training_arguments().bf16
    assert read_yaml(path)["output_dir"] == f"runs/{path.stem}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_names_its_own_command(path):
    assert f"atp train configs/{path.name}" in path.read_text()


HUB_ROWS = {
    "pubmedqa": (
        {"context": {"contexts": ["A.", "B."]}, "question": "C?", "final_decision": "yes"},
        ("Question: C?", " yes"),
    ),
    "hqs": ({"CHQ": "My hand ...", "Summary": "What is wrong?"}, ("My hand ...", " What is wrong?")),
    "billsum": ({"text": "Be it enacted", "summary": "A bill."}, ("Be it enacted", " A bill.")),
    "casehold": ({"context": "The court", "endings": list("abcde"), "label": 3}, ("3: d", " 3")),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_templates_fit_the_columns_of_the_hub_sets(name, monkeypatch):
    record, (in_prompt, completion) = HUB_ROWS[name]
    data = Recipe.from_yaml(FOLDER / f"{name}_llama3_8b.yaml").data
    monkeypatch.setattr("atp.data.load_dataset", lambda *_, **__: [record])
    (row,) = read_rows(data.train, data.train_split, data.prompt, data.completion)
    assert isinstance(row, Row)
    assert in_prompt in row.prompt
    assert row.completion == completion


def test_defaults_and_round_trip(tmp_path):
    recipe = Recipe.from_dict(MINIMAL)
    assert recipe.atp == ATPConfig()
    assert (recipe.lora["r"], recipe.lora["lora_alpha"], recipe.data.max_length) == (16, 32, 256)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe


def test_paper_preset_and_numbers_that_yaml_takes_for_words():
    recipe = Recipe.from_dict(
        MINIMAL | {"atp": {"preset": "paper", "generator_lr": "1e-3"}, "training": {"learning_rate": "5e-4"}}
    )
    assert recipe.atp == ATPConfig.paper()
    assert recipe.training["learning_rate"] == 5e-4


@pytest.mark.parametrize("space", ["width+depth", "depth+width", ["width", "depth"], ["depth", "width"]])
def test_a_space_is_words_joined_or_a_list_of_them(space):
    assert Recipe.from_dict(MINIMAL | {"atp": {"space": space}}).atp == ATPConfig(space="width+depth")


@pytest.mark.parametrize("space", [None, 3, [], ["width", 3], ["width", ["depth"]], {"width": "depth"}])
def test_what_names_no_space_is_refused(space):
    with pytest.raises(ConfigError, match=r"space=.* is not allowed"):
        Recipe.from_dict(MINIMAL | {"atp": {"space": space}})


@pytest.mark.parametrize("name", ["train", "validation", "calibration"])
@pytest.mark.parametrize("sources", [["a.jsonl", 3], ["a.jsonl", None], [["a.jsonl"]]])
def test_what_names_no_file_is_refused(name, sources):
    with pytest.raises(ConfigError, match=rf"{name}=\[.*\] is not allowed: it must be a file or hub name"):
        Recipe.from_dict(MINIMAL | {"data": MINIMAL["data"] | {name: sources}})


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay", "adam_epsilon"])
def test_what_no_optimizer_takes_is_refused(name, tmp_path):
    def recipe(value):
        words = (f"--training.{name}", value, "--output_dir", str(tmp_path))
        return Recipe.from_dict(apply_overrides(MINIMAL, words))

    for value in ("-1e-3", "nan", ".inf"):
        with pytest.raises(ConfigError, match=f"training: {name}=.* is not allowed: it must be a number >= 0"):
            recipe(value).training_arguments()
    assert recipe("0").training_arguments().to_dict()[name] == 0


@pytest.mark.parametrize("name", ["save_strategy", "eval_strategy", "logging_strategy"])
def test_no_is_a_word_where_it_is_one_of_those_to_choose_from(name, tmp_path):
    def recipe(*words):
        return Recipe.from_dict(apply_overrides(MINIMAL | {"output_dir": str(tmp_path)}, words))

    assert recipe(f"--training.{name}", "no").training_arguments().to_dict()[name] == "no"
    assert recipe("--training.use_cpu", "no").training["use_cpu"] is False
    with pytest.raises(ConfigError, match="'steps'"):
        recipe(f"--training.{name}", "yes").training_arguments()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_either_name_of_a_renamed_training_argument_and_not_both(name, tmp_path):
    training = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    recipe = Recipe.from_dict(MINIMAL | {"output_dir": str(tmp_path), "training": training})
    arguments = recipe.training_arguments()
    assert arguments.gradient_checkpointing
    assert arguments.gradient_checkpointing_kwargs == {"use_reentrant": False}
    with pytest.raises(ConfigError, match="two names of one setting: give one"):
        Recipe.from_dict(MINIMAL | {"training": {"gradient_checkpointing": True, "activation_checkpointing": True}})


def test_overrides_leave_the_original_alone():
    changed = apply_overrides(MINIMAL, ["--atp.sparsity", "0.5", "--data.train=[a, b]", "--output_dir", "y"])
    assert changed["atp"] == {"sparsity": 0.5}
    assert changed["data"] == {"train": ["a", "b"]}
    assert MINIMAL["output_dir"] == "runs/x"
    assert MINIMAL["data"] == {"train": "t.jsonl"}


@pytest.mark.parametrize("name", ["model", "data", "output_dir"])
def test_missing_sections_are_named(name):
    with pytest.raises(ConfigError, match=f"`{name}` is missing"):
        Recipe.from_dict({key: value for key, value in MINIMAL.items() if key != name})


def test_missing_settings_are_named():
    with pytest.raises(ConfigError, match="data: `train` is missing"):
        Recipe.from_dict(MINIMAL | {"data": {"max_length": 4}})
    with pytest.raises(ConfigError, match="`completion` is missing"):
        Recipe.from_dict(MINIMAL | {"data": {"train": "t", "prompt": "{q}"}})


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "exclude each other"),
        ({"load_in_4bit": True, "gguf_file": "a.gguf"}, "cannot be loaded with load_in_4bit"),
    ],
)
def test_what_quantised_base_weights_exclude_is_said(model, reason):
    with pytest.raises(ConfigError, match=reason):
        Recipe.from_dict(MINIMAL | {"model": MINIMAL["model"] | model})


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_engine_has_a_file_that_accelerate_reads_and_needs_no_more_than_the_number_of_gpus(engine):
    path = FOLDER / "accelerate" / f"{engine}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.machine_rank, config.num_processes) == (1, 0, 2)
    deepspeed = getattr(config, "deepspeed_config", {}).get("deepspeed_config_file")
    assert (deepspeed is not None) == engine.startswith("zero")
    if deepspeed:
        assert json.loads((FOLDER.parent / deepspeed).read_text())["zero_optimization"]["stage"] == int(engine[-1])
