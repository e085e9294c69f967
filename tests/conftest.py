"""Models that several test files use, built once: a random one of each family, and two warmed up on a task."""

import dataclasses

import pytest
import torch
from small_models import TASK_OPTIONS, build

import tiny_models

torch.set_num_threads(1)  # the models are too small for more, and sums are then added in one order


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """-> a function from a family's name to the folder of its random model."""
    folders = {}

    def folder(family: str):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                build(family, folders[family])
        return folders[family]

    return folder


@pytest.fixture
def load(model_folder):
    """-> a function that loads a new copy of a family's model, by default in float64."""
    from llms import load_llm  # imports transformers, which takes seconds and which many test files do not need

    return lambda family, dtype="float64", attention=None: load_llm(model_folder(family), "cpu", dtype, attention)


@pytest.fixture(scope="session")
def task_models(tmp_path_factory):
    """Folders by task: models small enough for fast steps, warmed up until they often write the asked format."""
    sizes = {"hidden": 32, "mlp": 64, "layers": 2, "vision_width": 32, "vision_depth": 1, "learning_rate": 1e-2}
    amounts = {
        "arithmetic": {"vocabulary": 500, "examples": 640, "batch": 16},
        "correlation": {"vocabulary": 420, "examples": 256, "batch": 8, "labels": 6},
    }
    cache = tmp_path_factory.mktemp("cache")
    return {
        task: tiny_models.tiny_model(
            task,
            dataset_options=TASK_OPTIONS[task],
            cache_dir=cache,
            say=lambda line: None,
            recipe=dataclasses.replace(tiny_models.RECIPES[task], **sizes, **amount),
        )
        for task, amount in amounts.items()
    }


@pytest.fixture(autouse=True)
def denormal_numbers():
    """`load_llm` flushes denormal numbers to zero; hypothesis draws them, so each test starts without flushing."""
    torch.set_flush_denormal(False)
