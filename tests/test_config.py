"""`ATPConfig`. Oracle: the ranges its docstring promises."""

import pytest
import yaml

from atp.config import ATPConfig, read_yaml
from atp.errors import ConfigError
from atp.generator.sampling import EULER_GAMMA


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("sparsity", 0, "(0, 1)"),
        ("sparsity", 1.0, "(0, 1)"),
        ("sparsity", float("nan"), "(0, 1)"),
        ("sparsity", "0.4", "(0, 1)"),
        ("sparsity", True, "(0, 1)"),
        ("space", "heads", "width, hidden, depth, values, disp"),
        ("space", "width+disp", "several of width, hidden, depth"),
        ("mode", "both", "joint, alternating"),
        ("init", "zeros", "activation"),
        ("init_ranking", "row", "block, global"),
        ("round_to", 0, "positive integer or null"),
        ("protect", (1, -1), "two non-negative integers"),
        ("freeze_at", 1.1, "[0, 1]"),
        ("start_at", 0.9, "[0, freeze_at="),
        ("distill", -1.0, ">= 0"),
        ("refit_rows", 0, "positive integer"),
        ("reader_rounds", 0, "positive integer"),
        ("refit_first_tokens", -1, "integer >= 0"),
        ("init_floor", 1.5, "[0, 1]"),
        ("init_trials", -1, "integer >= 0"),
        ("init_tilt", -21.0, "[-20, 20]"),
        ("init_attention", 1000.0, "[-20, 20]"),
        ("temperature", 0.0, "positive number"),
        ("generator_every", 1.5, "positive integer"),
        ("lasso", -0.1, ">= 0"),
        ("seed", -1, ">= 0"),
        ("uniform", 1, "true or false"),
    ],
)
def test_a_value_outside_its_range_is_named_with_what_is_allowed(name, value, allowed):
    with pytest.raises(ConfigError) as error:
        ATPConfig(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r}")
    assert allowed in str(error.value)


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(ConfigError, match="unknown setting 'sparcity': did you mean 'sparsity'"):
        ATPConfig.from_dict({"sparcity": 0.5})


def test_a_key_like_no_other_lists_the_known_ones():
    with pytest.raises(ConfigError, match="known settings: .*sparsity"):
        ATPConfig.from_dict({"xyzzy": 1})


def test_combinations_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="uniform=True makes nothing plain"):
        ATPConfig(uniform=True, space="disp")
    with pytest.raises(ConfigError, match="multiple of generator_heads"):
        ATPConfig(generator_hidden_size=10, generator_heads=4)


@pytest.mark.parametrize("config", [ATPConfig(), ATPConfig.paper(), ATPConfig(protect=(2, 1), round_to=8)])
def test_yaml_round_trip(config, tmp_path):
    path = tmp_path / "atp.yaml"
    config.to_yaml(path)
    assert ATPConfig.from_yaml(path) == config


def test_paper_preset():
    paper = ATPConfig.paper(sparsity=0.3)
    assert (paper.mode, paper.init, paper.compensate) == ("alternating", "ones", "none")
    assert (paper.temperature, paper.budget_weight) == (0.4, 5.0)
    assert paper.logit_bias == pytest.approx(3.0 + EULER_GAMMA, abs=1e-4), "centred noise lacks the Gumbel mean"
    assert ATPConfig.from_dict({"preset": "paper", "sparsity": 0.3}) == paper
    with pytest.raises(ConfigError, match="preset='papr'"):
        ATPConfig.from_dict({"preset": "papr"})


def test_bad_yaml_says_the_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("sparsity: 0.4\nspace: [width\n")
    with pytest.raises(ConfigError, match=r"bad\.yaml, line 3: not valid YAML"):
        read_yaml(path)
    path.write_text("sparsity: 0.4\nspace: width\nsparsity: 0.5\n")  # of which YAML itself takes the last
    with pytest.raises(ConfigError, match=r"bad\.yaml, line 3: not valid YAML: 'sparsity' is there twice: remove one"):
        read_yaml(path)
    path.write_text(yaml.safe_dump(["a", "list"]))
    with pytest.raises(ConfigError, match="must hold a mapping"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "missing.yaml")


@pytest.mark.parametrize("given", [["depth", "width"], ("width", "depth"), "depth+width"])
def test_spaces_may_be_joined_in_any_order_and_form(given):
    config = ATPConfig(space=given)
    assert config.space == "width+depth"
    assert ATPConfig.from_dict(config.to_dict()) == config
