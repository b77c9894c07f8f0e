"""The package stays one that a newcomer reads in an afternoon."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "trainer").rglob("*.py"))
NAMES = [str(path.relative_to(ROOT)) for path in FILES]

# Each layer may import from those above it, never from those below. Modules of one line may import each other.
LAYERS = [
    {"errors", "exits", "json_text", "names", "terminal", "cores", "doctor_finding"},
    {"stop", "claims", "bench"},
    {
        "streams",
        "provenance",
        "memory",
        "place",
        "meeting",
        "ranks",
        "gradients",
        "inject",
        "ingredients.base",
        "data.order",
        "range_rules",
        "race",
        "range_race",
    },
    {"ingredients"},
    {
        "check",
        "tree",
        "load",
        "settings",
        "data.index",
        "data.listing",
        "data.columns",
        "data.shards",
        "data.parquet",
        "data.hf",
        "data.packed",
        "bench_data",
    },
    {"overrides", "profiles", "sections"},
    {"recipe"},
    {"explain", "adapt", "plan", "start"},
    {
        "data",
        "models",
        "recompute",
        "small_maps",
        "compiled",
        "checkpoint",
        "kept_file",
        "board",
        "disk",
        "saver",
        "pictures",
    },
    {"results", "failures", "row_urls", "evaluate", "log", "statistics", "held_out", "floor"},
    {"state", "room", "pieces", "ramp"},
    {"export", "train", "run_folder", "trial", "ending"},
    {"job", "launch", "bench_run", "bench_timm", "bench_targets", "bench_gpu"},
    {"designs", "budget", "cells", "ablation", "pace"},
    {"cell_run", "dry_run", "local_cells", "ray_cells", "ablate", "sweep_table"},
    {
        "drill",
        "rescore",
        "parity",
        "show",
        "matrix",
        "ranks_cli",
        "range_command",
        "range_files",
        "range_pictures",
        "range_test",
        "range_show",
    },
    {"comparisons"},
    {"questions", "row_index"},
    {
        "tables",
        "table_notes",
        "table_query",
        "table_texts",
        "table_formats",
        "table_latex",
        "table_rows",
        "compare",
    },
    {"report_curves", "report_scales", "report_figures", "report_page", "report", "report_hparams"},
    {"reproduce", "table_show"},
    {"range_ranks", "ablate_cli", "ablation_cli"},
    {
        "verify_curves",
        "verify",
        "verify_show",
        "doctor_probes",
        "doctor_steps",
        "doctor",
        "doctor_show",
    },
    {
        "cli",
        "bench_cli",
        "data_cli",
        "drill_cli",
        "slurm_cli",
        "lr_find_cli",
        "table_cli",
        "doctor_cli",
        "verify_cli",
    },
    {"__main__"},
]
FORBIDDEN_WORDS = ("config", "args", "iteration", "utils", "manager", "handler", "helper")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "trainer").with_suffix("").parts)


def layer_of(module: str) -> int:
    named = [place for place, layer in enumerate(LAYERS) if module in layer]
    inside = [place for place, layer in enumerate(LAYERS) if module.split(".")[0] in layer]
    assert named or inside, f"{module} has no layer"
    return (named or inside)[0]


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trainer":
            inside = (node.module or "").partition(".")[2]
            for name in node.names:
                target = ROOT / "trainer" / inside.replace(".", "/")
                is_module = (target / f"{name.name}.py").exists() or (target / name.name).is_dir()
                found.add(".".join(filter(None, (inside, name.name if is_module else ""))))
    return found


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_run_one_way(path):
    module = module_of(path)
    if module.endswith("__init__"):
        assert not imports_of(path)
        return
    for target in imports_of(path):
        assert layer_of(target) <= layer_of(module), f"{module} imports {target}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_and_functions_are_small(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_public_names_have_docstrings(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "the file"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            is_short = isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno < 8
            assert is_short or ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_one_word_per_idea(path):
    """The design's forbidden words name nothing of ours (pydantic's model_config and timm's config.json are theirs)."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        if isinstance(node, ast.arg):
            names.append(node.arg)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append(node.id)
        for name in names:
            words = name.lower().split("_")
            assert name == "model_config" or not set(words) & set(FORBIDDEN_WORDS), (
                f"{path.name}: {name}"
            )


def test_nothing_heavy_is_imported_for_the_help():
    """`rsb --help` must answer before torch, timm or pydantic could be imported."""
    import subprocess
    import sys

    script = "import sys; from trainer.cli.main import app; bad = {'torch', 'timm', 'pydantic', 'numpy'} & set(sys.modules); print(bad); sys.exit(bool(bad))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_every_module_has_its_tests():
    """tests/ mirrors trainer/; what has no file of its own is tested where it is used, as listed here."""
    elsewhere = {
        "__main__": "test_cli", "cli": "test_cli", "show": "test_cli", "job": "test_job", "stop": "test_resume",
        "state": "test_resume", "train": "test_story", "errors": "test_load", "check": "test_load", "tree": "test_recipe",
        "overrides": "test_recipe", "adapt": "test_plan", "log": "test_story", "pictures": "test_story",
        "export": "test_story", "rescore": "test_story", "provenance": "test_job", "data.opened": "test_story", "data.ffcv_loader": "data/test_ffcv_stream", "data_cli": "test_parity",
        "data.prepare": "test_story", "data.columns": "data/test_parquet", "data.members": "data/test_packed", "data.listing": "data/test_packed", "evaluate": "test_story", "ingredients.base": "test_recipe",
        "ingredients.augment": "test_recipe", "sections": "test_recipe", "memory": "test_story",
        "names": "test_security", "exits": "test_ending", "terminal": "test_security", "json_text": "test_security", "cores": "test_settings",
        "doctor_finding": "test_doctor", "doctor_probes": "test_doctor", "doctor_steps": "test_doctor", "doctor_show": "test_doctor", "doctor_cli": "test_doctor",
        "verify_curves": "test_verify", "verify_show": "test_verify", "verify_cli": "test_verify",
        "drill_cli": "test_drill", "bench_cli": "test_bench", "bench_run": "test_bench", "bench_data": "test_bench", "bench_targets": "test_bench_gpu", "data.faulty": "test_inject", "data.evaluation": "data/test_loader", "data.workers": "data/test_loader", "recompute": "test_pieces", "place": "test_launch", "ranks_cli": "test_launch", "slurm_cli": "test_launch", "meeting": "test_ranks", "gradients": "test_ranks",
        "run_folder": "test_job", "race": "test_range_race", "range_show": "test_lr_find_cli", "table_notes": "test_tables", "table_texts": "test_table_formats", "table_latex": "test_table_formats", "table_show": "test_table_cli", "report_scales": "test_report_figures", "row_index": "test_table_rows", "range_ranks": "test_lr_find_cli",
        "range_command": "test_range_test", "budget": "test_ablation", "pace": "test_ablation", "ablation_cli": "test_ablation",
    }  # fmt: skip
    tests = ROOT / "tests"
    for path in FILES:
        module = module_of(path)
        if path.name == "__init__.py" or module.startswith("ingredients.pixels"):
            continue
        own = tests / path.relative_to(ROOT / "trainer").with_name(f"test_{path.name}")
        there = own if module not in elsewhere else tests / f"{elsewhere[module]}.py"
        assert there.exists() or own.exists(), f"{module}: no {there.relative_to(ROOT)}"
