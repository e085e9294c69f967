"""Settings: flags, defaults, bounds, presets, and what is refused before torch is imported."""

import dataclasses

import pytest
from runs import ROOT, names, one_line, python

import config
from config import OBJECTIVES, Config, Objective, build_parser, flag_fields, flags_page, parse_args
from rldatasets import DATASETS
from tiny_models import RECIPES

FLAGS = {field.name: field for _, field in flag_fields()}
NUMBERS = [
    name for name, field in FLAGS.items() if any(value is not None for value in field.metadata["bounds"].values())
]


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """-> a function that parses flags, which must be refused, and returns the line on stderr."""
    monkeypatch.chdir(tmp_path)

    def refusal(flags: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse_args(flags.split())
        assert stop.value.code == 2 and names(tmp_path) == []
        return one_line(capsys.readouterr().err)

    return refusal


# ---------------------------------------------------------------------------------------------------------------------
# Help and the page of flags


def test_help_is_quick_and_names_every_flag():
    done, seconds = python("main.py", "--help")
    assert done.returncode == 0 and seconds < 1
    assert all(f"--{name}" in done.stdout.split() for name in FLAGS)


def test_a_wrong_flag_is_refused_quickly(tmp_path):
    done, seconds = python("main.py", "--dataset_name", "colck", "--output_dir", tmp_path / "run")
    assert done.returncode == 2 and done.stdout == "" and seconds < 1
    assert "clock" in one_line(done.stderr) and names(tmp_path) == []


def test_flags_are_parsed_without_torch():
    program = (
        "import sys, config\n"
        "for flags in ('--help', '--objective grp', '--dataset_name colck', '--model_path tiny', ''):\n"
        "    try: config.parse_args(flags.split())\n"
        "    except SystemExit: pass\n"
        "print('imported:', {'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done, _ = python("-c", program)
    assert done.stdout.endswith("imported: set()\n"), done.stderr


def test_the_page_of_flags_is_up_to_date():
    """Otherwise: python config.py > docs/flags.md"""
    assert (ROOT / "docs/flags.md").read_text() == flags_page()


def test_the_page_has_a_row_for_every_flag():
    rows = [line for line in flags_page().splitlines() if line.startswith("| `--")]
    assert [row.split("`")[1].split()[0] for row in rows] == [f"--{name}" for name in FLAGS]


def test_every_flag_has_a_help_text():
    assert all(len(field.metadata["help"]) > 10 for field in FLAGS.values())


# ---------------------------------------------------------------------------------------------------------------------
# Each setting is written once


def test_each_setting_is_one_field():
    of_config = {field.name for field in dataclasses.fields(Config)}
    of_objective = {field.name for field in dataclasses.fields(Objective)}
    assert not of_config & of_objective
    assert len(FLAGS) == len(flag_fields()) == len(of_config | of_objective) - len({"argv", "name"})


def test_flags_are_the_fields():
    actions = [action.dest for action in build_parser()._actions if action.dest != "help"]
    assert actions == list(FLAGS)


def test_settings_do_not_change():
    settings = parse_args([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.max_steps = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.objective.beta = 0.5


def test_defaults_are_those_of_the_fields():
    settings = parse_args([])
    for name, field in FLAGS.items():
        if name != "output_dir" and hasattr(settings, name):
            default = {} if field.metadata["more"].get("metavar") == "KEY=VALUE" else field.default
            assert getattr(settings, name) == default, name
    assert settings.output_dir == "runs/gsm8k-Qwen2.5-1.5B-Instruct"


@pytest.mark.parametrize("name", NUMBERS)
def test_defaults_are_within_their_bounds(name):
    bounds, values = FLAGS[name].metadata["bounds"], [FLAGS[name].default]
    values += [getattr(objective, name) for objective in OBJECTIVES.values() if hasattr(objective, name)]
    for value in values:
        if value is not None:
            assert config.bounded(type(value), **bounds)(str(value)) == value


def test_config_json_holds_every_flag():
    flags = parse_args(["--objective", "gspo", "--beta", "0.1"]).flags()
    assert flags.keys() == {*FLAGS}
    assert flags["objective"] == "gspo" and flags["beta"] == 0.1 and flags["epsilon_high"] == 4e-4


# ---------------------------------------------------------------------------------------------------------------------
# Objectives


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_its_preset(name):
    assert parse_args(["--objective", name]).objective == OBJECTIVES[name]


def test_a_choice_changes_one_setting_of_a_preset():
    flags = "--objective dapo --normalizer completions --beta 0.1 --dynamic_sampling 0"
    expected = dataclasses.replace(OBJECTIVES["dapo"], normalizer="completions", beta=0.1, dynamic_sampling=False)
    assert parse_args(flags.split()).objective == expected


def test_zero_is_a_choice():
    assert parse_args(["--beta", "0"]).objective.beta == 0
    assert parse_args(["--objective", "dapo", "--overlong_buffer", "0"]).objective.overlong_buffer == 0


# ---------------------------------------------------------------------------------------------------------------------
# Tiny models bring defaults


@pytest.mark.parametrize("task", RECIPES)
def test_tiny_models_bring_their_defaults(task):
    settings = parse_args(["--model_path", "tiny", "--dataset_name", task])
    assert settings.output_dir == f"runs/{task}-tiny"
    flags = settings.flags()
    assert {name: flags[name] for name in RECIPES[task].defaults} == RECIPES[task].defaults
    assert RECIPES[task].defaults != {name: FLAGS[name].default for name in RECIPES[task].defaults}


def test_given_flags_win_over_tiny_defaults():
    flags = "--model_path tiny --dataset_name correlation --learning_rate 0.5 --max_steps 7"
    settings = parse_args(flags.split())
    assert settings.learning_rate == 0.5 and settings.max_steps == 7


def test_given_options_join_those_of_the_recipe():
    options = RECIPES["correlation"].defaults["dataset_options"]
    flags = "--model_path tiny --dataset_name correlation --dataset_options style=classic"
    assert parse_args(flags.split()).dataset_options == {**options, "style": "classic"}


# ---------------------------------------------------------------------------------------------------------------------
# The number of steps


@pytest.mark.parametrize(
    "flags, steps",
    [
        ("", 10),
        ("--num_train_epochs 0.25", 3),  # rounded up
        ("--num_train_epochs 0.01", 1),
        ("--num_iterations 3", 30),
        ("--num_train_epochs 2 --num_iterations 2", 40),
        ("--max_steps 7 --num_train_epochs 2 --num_iterations 2", 7),
    ],
)
def test_number_of_steps(flags, steps):
    assert parse_args(flags.split()).with_steps(steps_per_epoch=10).max_steps == steps


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: one line, exit status 2, nothing written


@pytest.mark.parametrize(
    "flags, hint",
    [
        ("--num_generation 4", "--num_generations"),
        ("--num_generation=4", "--num_generations"),
        ("--objective grp", "grpo"),
        ("--objective gpro", "'grpo'"),  # gspo is as near, but has other letters
        ("--dataset_name colck", "clock"),
        ("--dataset_name xxxx", ", ".join(DATASETS)),
        ("--dataset_name clock --dataset_options stile=bold", "style"),
        ("--dataset_name clock --dataset_options style", "KEY=VALUE"),
        ("--dataset_name gsm8k --dataset_options size=5", "size"),
        ("--dataset_name gsm8k --model_path tiny --dataset_options shots=2", "shots"),
        ("--max_steps many", "invalid int value: 'many'"),
        ("--max_steps 2.5", "invalid int value: '2.5'"),
        ("--kl_estimator k4", "k3"),
        ("--scale_rewards std", "batch"),
        ("--dynamic_sampling perhaps", "1 or 0"),
        ("--resume --overwrite_output_dir", "--overwrite_output_dir"),
        ("--sync_ref_model --beta 0", "--beta"),
        ("--sync_ref_model --objective dapo", "--beta"),
        ("--epsilon", "--epsilon"),
    ],
)
def test_a_wrong_flag_is_refused_with_a_hint(refusal, flags, hint):
    assert hint in refusal(flags)


@pytest.mark.parametrize(
    "flag, bad, good",
    [
        ("num_generations", "1", "2"),
        ("prompts_per_step", "0", "1"),
        ("max_steps", "0", "1"),
        ("eval_steps", "-1", "0"),
        ("learning_rate", "-1", "0"),
        ("learning_rate", "nan", "0.1"),
        ("learning_rate", "inf", "0.1"),
        ("temperature", "0", "0.01"),
        ("num_train_epochs", "0", "0.01"),
        ("max_minutes", "0", "0.01"),
        ("warmup_ratio", "1.5", "1"),
        ("adam_beta1", "1", "0.999"),
        ("learning_rate", "1.5", "1"),
        ("temperature", "101", "100"),
        ("adam_beta2", "-0.1", "0"),
        ("overlong_buffer", "2", "1"),
        ("ref_model_mixup_alpha", "1.1", "1"),
        ("seed", "-1", "0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(refusal, flag, bad, good):
    bounds = [f"{value:,}" for value in FLAGS[flag].metadata["bounds"].values() if value is not None]
    error = refusal(f"--{flag} {bad}")
    assert f"--{flag}" in error and bad in error and all(bound in error for bound in bounds)
    assert parse_args([f"--{flag}", good]).flags()[flag] == float(good)


@pytest.mark.parametrize("name", [name for name, field in FLAGS.items() if field.metadata["choices"]])
def test_only_the_choices_are_accepted(refusal, name):
    choices = [choice for choice in FLAGS[name].metadata["choices"] if choice != "flash_attention_2"]  # if installed
    assert [parse_args([f"--{name}", choice]).flags()[name] for choice in choices] == choices
    error = refusal(f"--{name} nonsense")
    assert f"--{name}" in error and all(choice in error for choice in choices)


def test_abbreviated_flags_are_refused(refusal):
    """--num_gen would change its meaning when a flag is added."""
    assert "--num_gen" in refusal("--num_gen 4")


def test_chat_template_keywords_are_read_as_values():
    flags = "--chat_template_kwargs enable_thinking=false depth=3 style=plain"
    assert parse_args(flags.split()).chat_template_kwargs == {"enable_thinking": False, "depth": 3, "style": "plain"}


def test_resume_takes_an_optional_checkpoint():
    assert parse_args([]).resume is None
    assert parse_args(["--resume"]).resume == "newest"
    assert parse_args(["--resume", "runs/a/checkpoints/step_000004", "--seed", "1"]).resume.endswith("step_000004")


def test_arguments_are_kept_as_given():
    argv = ["--seed", "3", "--dataset_name", "clock"]
    assert parse_args(argv).argv == tuple(argv)
