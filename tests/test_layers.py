"""Who may import whom, who may see the true labels, and what the package never does: read from its source."""

import ast
import fnmatch
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

import spice_dist

PACKAGE = Path(spice_dist.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))


def where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST) -> set[str]:
    """Full dotted names of everything imported anywhere in a module, also inside functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full, so that these tests can read them"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def uses(tree: ast.AST, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports(tree))


def may_import(path: str, package: str) -> bool:
    folder, _, file = path.rpartition("/")
    allowed = {
        "ray": folder in ("distributed", "sweep") and file.startswith("ray_"),
        "ffcv": folder == "data" and file.startswith("ffcv_"),
    }
    return allowed[package]


def trees() -> Iterator[tuple[str, ast.Module]]:
    for path in MODULES:
        yield where(path), ast.parse(path.read_text(), str(path))


@pytest.mark.parametrize("package", ["ray", "ffcv"])
def test_only_the_named_files_import_ray_and_ffcv(package):
    using = [path for path, tree in trees() if uses(tree, package)]
    assert [path for path in using if not may_import(path, package)] == []
    assert using, "the rule would hold of an empty package too"


def test_only_the_command_imports_sweeps():
    using = [path for path, tree in trees() if uses(tree, "spice_dist.sweep") and not path.startswith("sweep/")]
    assert using == ["command/tune.py"]


BLIND = (
    "methods/",
    "models/",
    "data/",
    "losses.py",
    "pseudo_labels.py",
    "neighbors.py",
    "graph.py",
    "mixing.py",
    "suggest.py",
)
SEEING = (
    "spice_dist.evaluate",
    "spice_dist.metrics",
    "spice_dist.probes",
    "spice_dist.report",
)


def package_imports(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules of the package that each module imports anywhere, with the packages around them; dotted names.

    The outermost package counts where a name is imported from it that is no module: it looks for such names itself.
    """
    modules = {module_name(path): tree for path, tree in sources.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in modules.items():
        for imported in imports(tree) - {"spice_dist"}:
            while imported and imported not in modules:
                imported = imported.rpartition(".")[0]
            while imported and imported not in graph[name]:
                graph[name].add(imported)
                imported = imported.rpartition(".")[0].removesuffix("spice_dist")
        graph[name].discard(name)
    return graph


def module_name(path: str) -> str:
    return f"spice_dist.{path.removesuffix('.py').replace('/', '.')}".removesuffix("__init__").rstrip(".")


def chains_from(graph: dict[str, set[str]], start: str) -> dict[str, str]:
    """For each module that is reached from `start` by imports of imports a shortest chain, `a -> b -> c`."""
    chains = {start: start}
    queue = [start]
    for module in queue:
        new = sorted(graph.get(module, set()) - chains.keys())
        chains |= {imported: f"{chains[module]} -> {imported}" for imported in new}
        queue += new
    return chains


def chains_to(graph: dict[str, set[str]], start: str, ends: Collection[str]) -> list[str]:
    """A chain from `start` to each reached module that is among `ends` or inside of a package among them."""
    reached = chains_from(graph, start).items()
    return [chain for module, chain in reached if any(f"{module}.".startswith(f"{end}.") for end in ends)]


README = (PACKAGE / "README.md").read_text()
# the workers of a run are started by the run itself; only there is Ray needed
ARROWS_UP = {"pipeline.py": "distributed/ray_*.py"}


def layers(text: str) -> list[list[str]]:
    """The patterns of each row of the README's table, from the bottom layer up; paths below the package."""
    table = text.split("## Layers", 1)[1].split("\n## ", 1)[0]
    rows = [re.findall(r"`([^`]+)`", line) for line in table.splitlines() if line.startswith("| ")]
    return [row for row in rows if row]


def layer_of(path: str, rows: list[list[str]]) -> int:
    """The row of the longest pattern that the path matches; a folder stands for all files in it."""
    matching = [
        (len(pattern), number)
        for number, row in enumerate(rows)
        for pattern in row
        if fnmatch.fnmatch(path, pattern) or (pattern.endswith("/") and path.startswith(pattern))
    ]
    assert matching, f"{path} has no row in the table of layers in spice_dist/README.md"
    return max(matching)[1]


def climbs(sources: dict[str, ast.Module], rows: list[list[str]]) -> list[tuple[str, str]]:
    """(file, what it imports) for every import from a higher layer, also inside functions; __init__.py stands aside."""
    paths = {module_name(path): path for path in sources if not path.endswith("__init__.py")}
    graph = package_imports(sources)
    arrows = [(path, paths[name]) for module, path in paths.items() for name in sorted(graph[module] & paths.keys())]
    return [(path, imported) for path, imported in arrows if layer_of(path, rows) < layer_of(imported, rows)]


def test_a_file_imports_from_its_own_layer_and_those_below():
    up = climbs(dict(trees()), layers(README))
    assert [(path, name) for path, name in up if not fnmatch.fnmatch(name, ARROWS_UP.get(path, ""))] == []
    assert {path for path, _ in up} == ARROWS_UP.keys(), "an exception that nothing needs any more"
    assert len(ARROWS_UP) <= 2


def test_a_planted_import_from_a_higher_layer_is_found():
    sources = {path: ast.parse("") for path in ("losses.py", "data/ingest.py", "cli.py")}
    sources["losses.py"] = ast.parse("def f():\n  from spice_dist.data import ingest")
    assert climbs(sources, layers(README)) == [("losses.py", "data/ingest.py")]
    with pytest.raises(AssertionError, match="has no row"):
        climbs(sources | {"new.py": ast.parse("from spice_dist import losses")}, layers(README))


def test_nothing_that_learns_imports_what_sees_true_labels():
    sources = dict(trees())
    blind = [path for path in sources if path.startswith(BLIND)]
    assert {path.split("/")[0] for path in blind} == {name.rstrip("/") for name in BLIND}
    graph = package_imports(sources)
    assert [chain for path in blind for chain in chains_to(graph, module_name(path), SEEING)] == []


PLANTED_CHAIN = {  # the second import is inside of a function, and the third is of a package
    "methods/moco.py": "from spice_dist import losses, inference",
    "inference.py": "def predict():\n  from spice_dist.model_folder import write",
    "model_folder.py": "import spice_dist.report",
    "report/__init__.py": "",
    "losses.py": "import torch",
}


def test_a_planted_chain_of_imports_to_true_labels_is_found():
    graph = package_imports({path: ast.parse(text) for path, text in PLANTED_CHAIN.items()})
    chain = "spice_dist.methods.moco -> spice_dist.inference -> spice_dist.model_folder -> spice_dist.report"
    assert chains_to(graph, "spice_dist.methods.moco", SEEING) == [chain]
    assert chains_to(graph, "spice_dist.losses", SEEING) == []
    for path in PLANTED_CHAIN:  # without any one of its links there is no chain
        cut = {other: ast.parse("" if other == path else text) for other, text in PLANTED_CHAIN.items()}
        expected = [chain] if path in ("losses.py", "report/__init__.py") else []
        assert chains_to(package_imports(cut), "spice_dist.methods.moco", SEEING) == expected


def in_circles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that import themselves by way of others; that a module is inside of a package is no import of it."""
    modules = {
        name: {other for other in imported if not name.startswith(f"{other}.")} for name, imported in graph.items()
    }
    return [name for name in modules if any(name in chains_from(modules, other) for other in modules[name])]


def test_no_modules_import_each_other_in_a_circle():
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    assert in_circles(package_imports(dict(trees()))) == []


def test_pure_math_knows_no_worker_configuration_or_file():
    outside = (
        "spice_dist.distributed",
        "spice_dist.config",
        "spice_dist.task",
        "spice_dist.data",
        "spice_dist.methods",
    )
    pure = (
        "losses.py",
        "pseudo_labels.py",
        "neighbors.py",
        "metrics.py",
        "graph.py",
        "mixing.py",
        "suggest.py",
        "verdict.py",
    )
    assert [(path, name) for path, tree in trees() if path in pure for name in outside if uses(tree, name)] == []


def names_of_true_labels(tree: ast.AST) -> list[str]:
    """Texts that name the file of the true labels; the files of labels that stage 3 learns from are others."""
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    paths = [text for text in texts if "labels.npy" in text and " " not in text]
    return [text for text in paths if text not in ("reliable/labels.npy", "given_labels/labels.npy")]


READERS = {"true_labels", "true_labels_file"}  # functions of artifacts.py


def mentions_readers(tree: ast.AST) -> bool:
    """Whether a function that reads or finds true labels is defined, imported, called or named in a text."""
    for node in ast.walk(tree):
        names = (getattr(node, field, None) for field in ("id", "attr", "name", "asname", "value"))
        if any(isinstance(name, str) and name in READERS for name in names):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "spice_dist.artifacts" and node.names[0].name == "*":
            return True
    return False


def test_only_evaluate_probes_and_given_labels_read_the_true_labels_and_only_ingest_writes_them():
    assert [path for path, tree in trees() if names_of_true_labels(tree)] == [
        "artifacts.py",
        "data/ingest.py",
        "data/packed_files.py",
    ]
    assert [path for path, tree in trees() if mentions_readers(tree)] == [
        "artifacts.py",
        "evaluate.py",
        "methods/given_labels.py",
        "probes.py",
    ]
    functions = ast.parse((PACKAGE / "artifacts.py").read_text()).body
    seeing = [node for node in functions if names_of_true_labels(node) or mentions_readers(node)]
    assert [getattr(node, "name", "") for node in seeing if not isinstance(node, ast.Expr)] == sorted(READERS)[::-1]
    reads = [
        node
        for file in ("data/ingest.py", "data/packed_files.py")
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "open", "numpy.load")
    ]
    assert [ast.unparse(node) for node in reads if names_of_true_labels(node)] == []


FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}  # re.compile and model.eval are others
FORBIDDEN_METHODS = {"system", "popen", "extractall", "read_pickle", "load_pickle"}
FORBIDDEN_CALLS = {"torch.save"}
FORBIDDEN_OPTIONS = {("allow_pickle", True), ("shell", True), ("weights_only", False)}


def dangers(tree: ast.AST) -> list[str]:
    """What could run code that is hidden in a file or an argument."""
    found = sorted(imports(tree) & FORBIDDEN_IMPORTS)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safely = any(
                option.arg == "weights_only" and ast.unparse(option.value) == "True" for option in node.keywords
            )
            if called == "torch.load" and not safely:
                found.append(called)
            if called in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS or called.rpartition(".")[2] in FORBIDDEN_METHODS:
                found.append(called)
            for option in node.keywords:
                value = option.value.value if isinstance(option.value, ast.Constant) else None
                known = {name for name, _ in FORBIDDEN_OPTIONS}
                if (option.arg, value) in FORBIDDEN_OPTIONS or (option.arg in known and not isinstance(value, bool)):
                    found.append(ast.unparse(option))
    return found


@pytest.mark.parametrize("path", MODULES, ids=where)
def test_no_module_can_be_made_to_run_code_from_data(path):
    assert dangers(ast.parse(path.read_text())) == []


PLANTED = [
    *("import pickle", "from pickle import loads", "import joblib", "import yaml", "torch.load(path)"),
    *("torch.load(path, weights_only=False)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=trust)"),
    *("eval(text)", "exec(text)", "os.system(text)", "subprocess.run(text, shell=True)", "def f():\n  import pickle"),
    *("archive.extractall(folder)", "pd.read_pickle(path)", "compile(text, '', 'exec')"),
]
HARMLESS = [
    "torch.load(path, weights_only=True)",
    "model.eval()",
    "np.load(path, allow_pickle=False)",
    "re.compile(text)",
    "subprocess.run([a])",
]


def test_every_planted_danger_is_found_and_nothing_harmless_is():
    assert [text for text in PLANTED if not dangers(ast.parse(text))] == []
    assert [text for text in HARMLESS if dangers(ast.parse(text))] == []
    assert uses(ast.parse("def f():\n  from spice_dist import metrics"), "spice_dist.metrics")
    assert not uses(ast.parse("from sklearn import metrics\nimport rayon"), "ray")
    assert names_of_true_labels(ast.parse("np.load(run / 'data/labels.npy')"))
    reading = (
        "artifacts.true_labels(run)",
        "from spice_dist.artifacts import true_labels as x",
        "from spice_dist.artifacts import *",
        "read = artifacts.true_labels_file",
        "getattr(artifacts, 'true_labels')(run)",
    )
    assert [text for text in reading if not mentions_readers(ast.parse(text))] == []
    assert not mentions_readers(ast.parse("artifacts.reliable_labels(run), artifacts.given_labels_file(run)"))


def test_help_comes_at_once_and_loads_nothing_heavy():
    def run(*options: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *options, "-m", "spice_dist.cli", "--help"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)

    def used() -> float:
        spent = resource.getrusage(resource.RUSAGE_CHILDREN)
        return spent.ru_utime + spent.ru_stime

    seconds = []  # of a core: other work on the machine is not our delay
    for _ in range(3):
        before = used()
        run()
        seconds.append(used() - before)
    done = run("-X", "importtime")
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in loaded
    assert loaded & {"torch", "ray", "numpy", "timm", "scipy", "sklearn", "PIL", "ffcv", "jinja2"} == set()
    assert "fit" in done.stdout
    assert statistics.median(seconds) < 0.5


@pytest.mark.parametrize(
    ("given", "found"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
    ids=str,
)
def test_idle_threads_sleep_soon_if_nobody_said_otherwise_before_torch_reads_it(given, found):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = "import sys, os, spice_dist; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", found]


def test_training_code_loads_neither_ray_nor_ffcv():
    code = "; ".join(
        [
            "import sys",
            *(f"import spice_dist.methods.{name}" for name in ("moco", "spice_self", "reliable", "spice_semi")),
            "import spice_dist.config, spice_dist.recipes, spice_dist.distributed.worker",
            "print(sorted({name.split('.')[0] for name in sys.modules} & {'ray', 'ffcv', 'torch'}))",
        ]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "['torch']\n"
