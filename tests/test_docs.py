"""README and docs agree with the code: links, commands, flags, names, metrics."""

import copy
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import paired_rows, perturbed, unpaired_rows
from policy_runs import scored
from test_overriding import scorer
from trl import DatasetMixtureConfig, ModelConfig, TrlParser

import halos_trl
import halos_trl.online
from halos_trl import cli
from halos_trl.cli.online import OnlineArguments

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
}
EXAMPLES = {path.name: path for path in sorted((ROOT / "examples").glob("train_*.py"))}
CONFIG_OF = {
    "kto": "KTO", "dpo": "DPO", "cdpo": "CDPO", "ipo": "IPO", "simpo": "SimPO", "slic": "SLiC", "grpo": "GRPO",
    "ppo": "PPO", "reward": "BradleyTerry",
}  # fmt: skip


def prose(text):
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", text, flags=re.S)


# -- links and commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page])):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def python_commands():
    """(where, words) of every `python FILE ...` in README, docs and the docstrings of the examples."""
    sources = PAGES | {f"examples/{name}": path.read_text().split('"""')[1] for name, path in EXAMPLES.items()}
    for where, text in sources.items():
        joined = text.replace("\\\n", " ")
        for line in re.findall(r"(?:python|FSDP\.yaml) ((?:examples|benchmarks)/\S+\.py[^`\n]*)", joined):
            yield where, shlex.split(line, comments=True)


def test_scripts_in_commands_exist():
    commands = list(python_commands())
    assert len(commands) > 10
    for where, words in commands:
        assert (ROOT / words[0]).is_file(), f"{where}: {words[0]}"
        for config in re.findall(r"configs/[\w-]+\.yaml", " ".join(words)):
            assert (ROOT / config).is_file(), f"{where}: {config}"


def flags_of(method):
    """Flags of a method's script; a script may extend its config class with flags of its own."""
    own = re.findall(r"^    (\w+): .* = field\(", EXAMPLES[f"train_{method}.py"].read_text(), flags=re.M)
    online = method == "grpo_online"
    config_class = halos_trl.online.GRPOConfig if online else getattr(halos_trl, f"{CONFIG_OF[method]}Config")
    script_arguments = OnlineArguments if online else cli.HalosScriptArguments
    parser = TrlParser((script_arguments, config_class, ModelConfig, DatasetMixtureConfig))
    return {option for action in parser._actions for option in action.option_strings} | {
        f"--{name}" for name in [*own, "config", "help"]
    }


def test_flags_in_commands_exist():
    for where, words in python_commands():
        script = re.fullmatch(r"examples/train_(\w+)\.py", words[0])
        if script:
            given = {word.split("=")[0] for word in words[1:] if word.startswith("--")}
            assert given <= flags_of(script.group(1)), f"{where}: {' '.join(words)}"


def test_flags_in_the_table_for_halos_users_exist():
    known = set().union(
        *(flags_of(method) for method in ("kto", "dpo", "cdpo", "ipo", "simpo", "slic", "grpo", "ppo"))
    )
    ours = {
        flag
        for row in re.findall(r"^\| (?!HALOs)(.*) \|$", PAGES["docs/from_halos.md"], flags=re.M)
        for cell in row.split(" | ")[1:]
        for flag in re.findall(r"(?<!\S)`?(--\w+)", cell)
    }
    assert len(ours) > 30
    assert ours <= known


def test_readme_has_one_run_and_one_test_command_of_one_line():
    for marker in ("run", "test"):
        blocks = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)```", README, flags=re.S)
        assert len(blocks) == 1
        assert len(blocks[0].strip().splitlines()) == 1
    assert "<!-- test -->" in (ROOT / ".ci" / "run").read_text(), "CI runs the README's own command"
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, flags=re.M) for target in ("check", "format"))


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_tables(page):
    """A header, a rule and rows with equal numbers of cells, as GitHub requires."""
    for block in re.findall(r"(?:^\|.*\n)+", prose(PAGES[page]), flags=re.M):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()]
        assert re.fullmatch(r"[|\- ]+", block.splitlines()[1]), f"no header: {block[:120]}"
        assert set(cells) == {cells[0]}, block[:120]


# -- the site ------------------------------------------------------------------------------------------------------


def test_navigation_of_the_site_has_every_page():
    """`mkdocs build --strict` checks the rest: links, anchors, names."""
    listed = set(re.findall(r"([\w/]+\.md)(?: #|$)", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - listed == set(), "say in mkdocs.yml under which heading the page stands"


def test_api_pages_have_every_public_name():
    shown = {name for page in PAGES.values() for name in re.findall(r"^::: halos_trl\.(\w+)$", page, flags=re.M)}
    ours = {name for name in halos_trl.__all__ if getattr(halos_trl, name).__module__.startswith("halos_trl")}
    assert ours - shown - {"RewardTrainer", "RewardConfig"} == set()


# -- names ---------------------------------------------------------------------------------------------------------


def test_readme_tables_name_everything_public():
    rows = "\n".join(re.findall(r"^\|.*\|$", README, flags=re.M))
    assert [name for name in halos_trl.__all__ if f"`{name}`" not in rows] == []


@pytest.mark.parametrize("page", PAGES)
def test_dotted_names_exist(page):
    for name in set(re.findall(r"`(halos_trl(?:\.\w+)+)`", PAGES[page])):
        module, _, attribute = name.rpartition(".")
        try:
            assert hasattr(importlib.import_module(module), attribute), name
        except ModuleNotFoundError:
            importlib.import_module(name)


def test_method_table_is_true():
    rows = re.findall(r"^\| `(\w+Trainer)` \| `(\w+Config)` \|[^|]*\| (yes|no) \| ([^|]*) \|", README, flags=re.M)
    assert len(rows) == len(CONFIG_OF)
    for trainer, config, reference, paper in rows:
        trainer_class = getattr(halos_trl, trainer)
        assert trainer_class.config_class is getattr(halos_trl, config)
        if trainer != "BradleyTerryTrainer":
            assert trainer_class.needs_reference == (reference == "yes")
        if trainer_class.method.arxiv:
            assert trainer_class.method.arxiv in paper


def test_methods_page_states_the_true_defaults():
    for section in PAGES["docs/methods.md"].split("\n## ")[1:]:
        names = re.search(r"`(\w+)Trainer`, `(\w+Config)`", section)
        defaults = re.search(r"^Defaults: (.*?)\.(?: Use|\n)", section, flags=re.M | re.S)
        if names and defaults:
            config_class = getattr(halos_trl, names.group(2))
            for name, value in re.findall(r"`(\w+)=([\d.]+)`", defaults.group(1)):
                assert config_class.__dataclass_fields__[name].default == float(value), (names.group(2), name)


# -- metrics -------------------------------------------------------------------------------------------------------


def documented_metrics():
    cells = re.findall(r"^\| (`[^|]*`) \|", PAGES["docs/metrics.md"], flags=re.M)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


RUNS = [(m, h) for m in CONFIG_OF if m != "reward" for h in (False, True)] + [("reward", False)]


@pytest.mark.parametrize(("method", "humanline"), RUNS)
def test_every_logged_metric_is_documented(model, tokenizer, make_config, method, humanline):
    name = CONFIG_OF[method]
    trainer_class, config_class = getattr(halos_trl, f"{name}Trainer"), getattr(halos_trl, f"{name}Config")
    rows = {"kto": unpaired_rows, "grpo": scored, "ppo": scored}.get(method, paired_rows)
    if method == "reward":
        model = scorer(model)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    trainer = trainer_class(
        copy.deepcopy(model), args=make_config(config_class, **settings, **({"humanline": True} if humanline else {})),
        train_dataset=rows(16), eval_dataset={"a": rows(8, seed=1)}, processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logged = {re.sub(r"^eval_(a_)?", "", key) for entry in trainer.state.log_history for key in entry} - {"step"}
    assert logged - documented_metrics() == set()
    if humanline:
        sides = set() if method in ("grpo", "ppo") else {"unclamped/chosen", "unclamped/rejected"}
        assert {"unclamped"} | sides <= logged


def test_documented_metrics_of_the_methods_are_logged(model, tokenizer, make_config):
    """The page names no metric that is gone."""
    section = PAGES["docs/metrics.md"].split("## All paired", 1)[1].split("The logged reward of a completion", 1)[0]
    promised = set(re.findall(r"^\| `([^`]+)`", section, flags=re.M)) - {"aux_loss"}
    trainer = halos_trl.DPOTrainer(
        copy.deepcopy(model), perturbed(model), make_config(halos_trl.DPOConfig, max_steps=1),
        train_dataset=paired_rows(8), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert promised <= set(trainer.state.log_history[0])


def test_formula_of_the_logged_rewards(model, tokenizer, make_config):
    """docs/metrics.md, the table of rewards: with and without the parameter, sum or mean."""
    shared = {"train_dataset": paired_rows(8), "processing_class": tokenizer}
    found = {}
    for method, parameter in (("dpo", {"beta": 0.4}), ("ipo", {"tau": 0.4}), ("simpo", {"beta": 3.0}), ("slic", {})):
        trainer_class = getattr(halos_trl, f"{CONFIG_OF[method]}Trainer")
        args = make_config(trainer_class.config_class, max_steps=1, train_sampling_strategy="sequential", **parameter)
        reference = perturbed(model) if trainer_class.needs_reference else None
        trainer = trainer_class(copy.deepcopy(model), reference, args, **shared)
        batch = next(iter(trainer.get_train_dataloader()))
        tokens = trainer.policy_tokens(trainer.model, batch)
        trainer.train()
        found[method] = trainer.state.log_history[0]["rewards/chosen"]
        logps_BT, mask_BT = tokens.logps_BT.detach()[:8], tokens.mask_BT[:8]
        if reference is not None:
            ratio = (logps_BT - trainer.reference.log_probs(batch)[:8]).sum(-1).mean().item()
            assert found[method] == pytest.approx(0.4 * ratio, rel=1e-4)
        elif method == "simpo":
            assert found[method] == pytest.approx((logps_BT.sum(-1) / mask_BT.sum(-1)).mean().item(), rel=1e-4)
        else:
            assert found[method] == pytest.approx(logps_BT.sum(-1).mean().item(), rel=1e-4)
    assert torch.isfinite(torch.tensor(list(found.values()))).all()
