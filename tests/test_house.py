"""The rules that keep the code readable: sizes, types, imports, and where a task may be named."""

import ast
import re

import pytest
from runs import ROOT

from rldatasets import DATASETS

TYPED = (
    *("main", "config", "evaluator", "rldatasets", "rollout", "prompts", "logprobs", "optimizer", "run", "batch"),
    *("progress", "model_checks", "number_checks", "answers", "llms", "layers", "adapters", "one_step"),
    *("turns", "environments", "visual_environments", "scene_generator", "data_files", "reporting", "memory"),
    "parallel",
)
WITHOUT_TASKS = (
    *("main", "llms", "prompts", "logprobs", "rollout", "run", "run_folder", "batch", "optimizer", "layers"),
    *("adapters", "parallel", "turns", "memory"),
)
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def nodes(room: str, *kinds: type) -> list:
    return [node for node in ast.walk(ast.parse((ROOT / f"{room}.py").read_text())) if isinstance(node, kinds)]


def test_main_has_at_most_400_lines():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 400


def test_main_imports_nothing_inside_functions():
    functions = nodes("main", *FUNCTION)
    imports = [node for f in functions for node in ast.walk(f) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert functions and not imports


@pytest.mark.parametrize("room", TYPED)
def test_functions_have_at_most_65_lines(room):
    sizes = {f.name: f.end_lineno - f.lineno + 1 for f in nodes(room, *FUNCTION)}
    assert {name: size for name, size in sizes.items() if size > 65} == {}


@pytest.mark.parametrize("room", TYPED)
def test_every_parameter_is_typed(room):
    untyped = []
    for function in nodes(room, *FUNCTION):
        given = function.args
        every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        untyped += [
            f"{function.name}({one.arg})"
            for one in every
            if one and one.annotation is None and one.arg not in ("self", "cls")
        ]
    assert untyped == []


def words_of_the_code(source: str) -> set[str]:
    """The words in the names and texts of a file, docstrings and comments aside: is_clock has `is` and `clock`."""
    tree = ast.parse(source)
    docstrings = [
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTION)) and ast.get_docstring(node) is not None
    ]
    texts: set[str] = set()
    for node in ast.walk(tree):
        for value in (getattr(node, field) for field in node._fields):
            if isinstance(value, str) and node not in docstrings:  # names, attributes, parameters, keywords, constants
                texts.add(value)
    return {word.lower() for text in texts for word in re.findall(r"[^\W_]+", text)}


def test_words_of_the_code_finds_names_and_texts():
    source = '"""A clock."""\ndef is_gsm8k(arithmetic):\n    x.shape_of(f"{a} correlation b")  # tiny\n'
    assert words_of_the_code(source) >= {"is", "gsm8k", "arithmetic", "shape", "correlation"}
    assert not words_of_the_code(source) & {"clock", "tiny"}


@pytest.mark.parametrize("room", WITHOUT_TASKS)
def test_no_task_is_named_outside_its_rooms(room):
    assert not words_of_the_code((ROOT / f"{room}.py").read_text()) & ({*DATASETS} - {"look"})  # an English word


@pytest.mark.parametrize("room", [path.stem for path in sorted(ROOT.glob("*.py"))])
def test_importing_a_room_only_defines(room):
    """llms.py changed how torch and malloc work as soon as it was imported."""
    tree = ast.parse((ROOT / f"{room}.py").read_text())
    defines = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.ClassDef, *FUNCTION)
    conditional = (ast.If, ast.Try)  # `if __name__ == "__main__"`, `if TYPE_CHECKING`, an import that may fail
    others = [ast.unparse(node) for node in tree.body[1:] if not isinstance(node, (*defines, *conditional))]
    assert ast.get_docstring(tree) and others == []
    tests = {ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)}
    assert tests <= {"TYPE_CHECKING", "__name__ == '__main__'"}
