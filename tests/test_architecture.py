"""Rules of the code base: import direction, private names, the file map, no machine-specific paths."""

import ast
import re
from pathlib import Path

import pytest

import halos_trl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "halos_trl"
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
HOSTS = ("trl", "transformers", "accelerate", "peft")

# What each part may import from the package. A part is a module, or a folder with everything in it.
MATHEMATICS = {
    "records": set(),
    "logprobs": {"records"},
    "humanline": {"records", "logprobs"},
    "losses": {"records", "logprobs", "humanline"},
    "advantages": {"records", "logprobs"},
    "metrics": {"records", "humanline"},
}
MAY_IMPORT = MATHEMATICS | {
    "data": {"records", "advantages"},
    "sharded": set(),
    "storage": {"sharded"},
    "forward": set(),
    "value_head": {"sharded"},
    "_trl": {"forward", "records", "humanline", "metrics", "sharded", "storage", "value_head", "data"},
    "reference": {"forward", "records", "sharded", "storage", "value_head", "_trl"},
    "configs": {"humanline", "_trl"},
    "model_card": {"_trl"},
    "trainers": {
        "run_folder",
        *MATHEMATICS,
        "data",
        "sharded",
        "storage",
        "forward",
        "value_head",
        "_trl",
        "reference",
        "configs",
        "model_card",
    },
    "scoring": {"data", "spelling", "trainers"},
    "online": {"humanline", "_trl", "reference", "configs", "trainers"},
    "toy": set(),
    "merge": {"_trl", "model_card", "value_head"},
    "spelling": set(),
    "memory": set(),
    "sampling": {"data"},
    "run_folder": set(),
    "report": {"run_folder"},
    "pictures_callback": {"report"},
    "generation": {"sampling", "scoring", "data", "_trl", "run_folder", "trainers"},
    "cli": {
        "pictures_callback",
        "generation",
        "report",
        "scoring",
        "spelling",
        "sampling",
        "memory",
        *MATHEMATICS,
        "data",
        "_trl",
        "configs",
        "model_card",
        "merge",
        "trainers",
        "toy",
    },
    "patching": {"configs", "trainers"},
    "__init__": {*MATHEMATICS, "_trl", "configs", "trainers", "data", "patching", "generation"},
}


def part_of(module):
    return module.split("/")[0].removesuffix(".py")


def imports(path):
    """(dotted module, imported name or None) of every import, relative ones resolved to `halos_trl...`."""
    package = ["halos_trl", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def parts_imported(path):
    for module, name in imports(path):
        parts = module.split(".")
        if parts[0] == "halos_trl":
            yield parts[1] if len(parts) > 1 else name


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_point_downwards(module):
    part = part_of(module)
    assert part in MAY_IMPORT, f"say in MAY_IMPORT what {module} may import"
    assert set(parts_imported(MODULES[module])) - {part} <= MAY_IMPORT[part]


def test_table_has_no_cycle_and_no_stale_row():
    assert set(MAY_IMPORT) == {part_of(module) for module in MODULES}
    rest = dict(MAY_IMPORT)
    while rest:
        lowest = [part for part, needs in rest.items() if not needs & rest.keys()]
        assert lowest, f"a cycle among {sorted(rest)}"
        for part in lowest:
            del rest[part]


def test_no_module_is_longer_than_400_lines():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    assert {module: lines for module, lines in lengths.items() if lines > 400} == {}


@pytest.mark.parametrize("module", [m for m in MODULES if part_of(m) in MATHEMATICS])
def test_mathematics_needs_torch_and_the_standard_library_only(module):
    import sys

    outside = {name.split(".")[0] for name, _ in imports(MODULES[module])} - {"halos_trl", "torch"}
    assert outside <= set(sys.stdlib_module_names)


# -- few classes above a method --------------------------------------------------------------------------------------

BASES = {
    halos_trl.PairedPreferenceTrainer: ("CDPO", "DPO", "IPO", "SLiC", "SimPO"),
    halos_trl.UnpairedPreferenceTrainer: ("KTO",),
    halos_trl.ScoredTrainer: ("GRPO", "PPO"),
}
METHODS = [(getattr(halos_trl, f"{name}Trainer"), base) for base, names in BASES.items() for name in names]


@pytest.mark.parametrize(("method", "base"), METHODS)
def test_a_batch_becomes_metrics_in_the_class_of_the_method_and_its_base(method, base):
    """Hooks that `trainers/loss.py` calls on a trainer are defined in one of these two modules."""
    assert method.__bases__[0] is base
    for hook in ("record", "loss", "checked", "own_rows", "metric_sums", "batch_size", "check_rows"):
        owner = next(c for c in method.__mro__ if hook in vars(c))
        assert owner in (method, base), f"{hook} of {method.__name__} is that of {owner.__name__}"


@pytest.mark.parametrize("method", [*(method for method, _ in METHODS), halos_trl.BradleyTerryTrainer])
def test_classes_of_trainers_above_a_method(method):
    """The public base class and the mixins before the host classes in `_trl/`."""
    above = [c.__name__ for c in method.__mro__[1:] if c.__module__.startswith("halos_trl.trainers")]
    has_reference = method is not halos_trl.BradleyTerryTrainer
    assert above == [*([method.__mro__[1].__name__, "AlignmentTrainer"] if has_reference else []), "TrainingRun"]


# -- one door to private names -------------------------------------------------------------------------------------


def private(name):
    return name.startswith("_") and not name.startswith("__")


def names_of_our_own():
    """Underscored names that the package itself introduces."""
    own = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and path.parent.name != "_trl":
                own.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return own


# Underscored but documented, or torch's own: torch is not a host whose insides we extend.
# `_attn_implementation` is the name that transformers' documentation gives the setting; only its setter is public.
TOLERATED = {
    "_attn_implementation",
    "_asdict",
    "_replace",
    "_fields",
    "_foreach_copy_",
    "_foreach_mul_",
    "_foreach_add_",
    "_version",
}


def test_private_names_of_the_hosts_are_touched_in_one_folder_only():
    own = names_of_our_own()
    found = []
    for module, path in MODULES.items():
        if part_of(module) == "_trl":
            continue
        for host, name in imports(path):
            parts = [*host.split("."), *([name] if name else [])]
            if parts[0] in HOSTS and any(map(private, parts)):
                found.append(f"{module}: {'.'.join(parts)}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | TOLERATED:
                found.append(f"{module}:{node.lineno}: {node.attr}")
    assert found == [], "take them through halos_trl/_trl/"


def test_insides_of_trl_are_imported_in_one_folder_only():
    """TRL promises only what `trl` itself exports; its submodules move between releases."""
    deep = {part_of(m) for m, path in MODULES.items() for host, _ in imports(path) if host.startswith("trl.")}
    assert deep <= {"_trl"}


def test_classes_of_trl_are_bound_when_a_module_is_imported():
    """Frameworks replace `trl.DPOTrainer` and others by subclasses of these trainers, which a lookup would find."""
    found = []
    for module, path in MODULES.items():
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.Lambda)]
        for node in [inner for function in functions for inner in ast.walk(function)]:
            late_import = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl"
            by_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "trl"
            if late_import or (by_name and node.attr[0].isupper()):
                found.append(f"{module}:{node.lineno}")
    assert found == []


# -- no traces -----------------------------------------------------------------------------------------------------


def text_files():
    suffixes = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".sh", ""}
    folders = ("halos_trl", "examples", "configs", "docs", "tests", "benchmarks", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [
        ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "CITATION.cff",
            "mkdocs.yml",
            "pyproject.toml",
            "Makefile",
        )
    ]
    return [path for path in files if path.suffix in suffixes and "__pycache__" not in path.parts]


def test_no_file_mentions_a_path_of_one_machine():
    machine_path = re.compile(r"(?<![\w.~/])/" + r"(root|work|home|Users|mnt)/\w")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if machine_path.search(line)
    ]
    assert found == []


def test_no_function_prints_outside_of_the_command_line():
    for module, path in MODULES.items():
        if part_of(module) in ("cli", "toy"):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], module


# -- the file map ----------------------------------------------------------------------------------------------------


def mapped_files():
    """Paths in docs/file_map.md: each row of its tables starts with `path`."""
    text = (ROOT / "docs" / "file_map.md").read_text()
    return re.findall(r"^\| `([\w./-]+)`", text, flags=re.M)


def test_file_map_has_every_file_once_and_no_other():
    mapped = mapped_files()
    patterns = (
        "halos_trl/**/*.py",
        "examples/*.py",
        "configs/*.yaml",
        "docs/**/*.md",
        "tests/*.py",
        "benchmarks/*.py",
    )
    files = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern)}
    files = {path for path in files if not path.endswith("/__init__.py")}
    assert sorted(set(mapped)) == sorted(mapped), "a file stands in the map twice"
    assert files - set(mapped) == set(), "give each a line in docs/file_map.md"
    assert [path for path in mapped if not (ROOT / path).exists()] == []
