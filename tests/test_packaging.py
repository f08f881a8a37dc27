"""What is shipped: the list of packages, the wheel, its data, and what it leaves alone."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "service", "kernels", "benchmarks")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# One worker builds the wheel once for all tests that look into it.
in_one_process = pytest.mark.xdist_group("wheel")


def folders_with_code(root: Path) -> set[str]:
    return {
        ".".join(("gptjet", *path.parent.relative_to(root).parts))
        for room in ROOMS
        for path in (root / room).rglob("*.py")
    }


def module_names(root: Path) -> list[str]:
    names = set()
    for room in ROOMS:
        for path in (root / room).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            names.add(".".join(("gptjet", *parts)).removesuffix(".__init__"))
    return sorted(names)


def test_the_list_of_packages_equals_the_tree() -> None:
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    rooms = {f"gptjet.{room}" for room in ROOMS}
    assert listed == sorted(rooms | folders_with_code(ROOT))


def test_every_folder_but_the_rooms_is_a_regular_package() -> None:
    """A room without __init__.py cannot shadow another project's `kernels` from the repository."""
    for room in ROOMS:
        assert not (ROOT / room / "__init__.py").exists()
        assert (ROOT / room / "py.typed").exists()
    rooms = {f"gptjet.{room}" for room in ROOMS}
    for package in folders_with_code(ROOT) - rooms:
        folder = ROOT.joinpath(*package.split(".")[1:])
        assert (folder / "__init__.py").exists(), folder


def test_everything_that_is_imported_is_declared() -> None:
    """A package that only comes along with another one goes when that one stops needing it."""
    project = PYPROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {canonicalize_name(Requirement(line).name) for group in groups for line in group}
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and not node.level:
                    names = [node.module or ""]
                for top in {name.split(".")[0] for name in names} - {"gptjet"}:
                    found = {canonicalize_name(name) for name in providers.get(top, [top])}
                    if top not in sys.stdlib_module_names and not found & declared:
                        undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert undeclared == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools would put its work into the tree."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output)]
    built = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = output.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh folder with what pip installs from the wheel, and nothing else."""
    target = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return target


def run_isolated(script: str, *path: Path, cwd: Path) -> str:
    """Run a script that sees only `path` and the dependencies: no editable install, no variables.

    -S keeps the .pth file of the editable install out, -I the environment and the working folder.
    """
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    search = [*map(str, path), *sorted(dependencies)]
    prelude = f"import sys; sys.path[:0] = {search!r}\n"
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", prelude + script],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@in_one_process
def test_the_wheel_holds_the_package_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = PYPROJECT["project"]["version"]
    assert {name.split("/")[0] for name in names} == {"gptjet", f"gptjet-{version}.dist-info"}


@in_one_process
def test_the_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    """Code and data alike: a kind of file that package-data does not name is found here.

    Measured results stay in the repository: nobody who runs the server needs them.
    """
    results = ROOT / "benchmarks" / "results"
    in_the_tree = {
        f"gptjet/{path.relative_to(ROOT)}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".pyc" and results not in path.parents
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.startswith("gptjet/")} == in_the_tree
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@in_one_process
def test_every_module_imports_from_the_wheel_outside_the_repository(
    installed: Path, tmp_path: Path
) -> None:
    script = f"""
import importlib, json
names = {module_names(ROOT)!r}
print(json.dumps({{name: importlib.import_module(name).__file__ for name in names}}))
"""
    files = json.loads(run_isolated(script, installed, cwd=tmp_path).splitlines()[-1])
    elsewhere = {
        name: file for name, file in files.items() if not Path(file).is_relative_to(installed)
    }
    assert elsewhere == {}


@in_one_process
def test_the_console_script_answers_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    script = "sys.argv = ['gptjet', '--version']; from gptjet.service.cli import main; main()"
    assert run_isolated(script, installed, cwd=tmp_path) == (
        f"gptjet {PYPROJECT['project']['version']}\n"
    )


@in_one_process
@pytest.mark.parametrize("where", ["beside the wheel", "in the repository"])
def test_hugging_face_kernels_is_still_hugging_face_kernels(
    installed: Path, tmp_path: Path, where: str
) -> None:
    """transformers probes for a top-level `kernels`, and must find that package, not our room.

    transformers is asked without its version limits, which are not what is tested here.
    """
    try:
        version = importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        if os.environ.get("CI"):
            raise
        pytest.skip("Hugging Face's kernels is not installed; `make test` installs it")
    script = """
import json
import gptjet.kernels, kernels
from transformers.utils.import_utils import is_kernels_available
found = is_kernels_available(MIN_VERSION="0", MAX_VERSION="9999")
ours = list(gptjet.kernels.__path__)
print(json.dumps([kernels.__file__, hasattr(kernels, "get_kernel"), found, ours]))
"""
    # As `python -m ...` in the repository's root: that folder comes first on the path.
    first = [ROOT] if where == "in the repository" else []
    output = run_isolated(script, *first, installed, cwd=tmp_path)
    file, has_get_kernel, found, ours = json.loads(output.splitlines()[-1])
    assert Path(file).is_relative_to(sysconfig.get_path("purelib"))
    assert (has_get_kernel, found) == (True, True), version
    assert ours == [str(installed / "gptjet" / "kernels")]


def files_of_the_repository() -> list[Path]:
    """What is tracked, or would be: a new file is looked at before it is committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_package_host_or_a_path_of_one_machine() -> None:
    """Which mirror serves the packages, and where a checkout lies, is each machine's own matter."""
    # This machine's own places: on whichever machine a path slips in, the test runs there, too.
    places = [rf"(?<![\w.]){re.escape(str(p))}/" for p in (ROOT, Path.home()) if p != p.parent]
    options = ["--index-url", "--extra-index-url", "--find-links"]
    index = r"https?://\S*(?:registry|pypi|/simple\b|/whl/)"
    pattern = re.compile("|".join([*places, *options, index]))
    found = []
    for path in files_of_the_repository():
        if path == Path(__file__):
            continue  # the options above
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and the like
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in pattern.findall(text)]
    assert found == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda p: p.name
)
def test_a_lock_file_pins_every_package_exactly(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert lines
    for line in lines:
        assert re.fullmatch(r"-r [a-z0-9-]+\.txt|[a-z0-9-]+==[0-9][a-z0-9.!]*", line), line


def test_the_locks_have_the_versions_that_were_found_to_work_together() -> None:
    """Triton 3.6.0 everywhere, but never in one resolution with torch 2.13.0, whose CUDA build
    brings another; numpy 2.3.5, because Triton's interpreter breaks on 2.4."""
    pins = {}
    for name in ("cpu", "t4-v100-a10", "hopper", "triton", "deepspeed"):
        text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
        pins[name] = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", text, re.MULTILINE))
    assert [pins[name]["torch"] for name in ("cpu", "t4-v100-a10", "hopper")] == [
        "2.13.0",
        "2.10.0",
        "2.11.0",
    ]
    assert {pins[name]["numpy"] for name in ("cpu", "t4-v100-a10", "hopper")} == {"2.3.5"}
    assert {pins[name]["triton"] for name in ("t4-v100-a10", "hopper", "triton")} == {"3.6.0"}
    assert "triton" not in pins["cpu"]
    assert pins["deepspeed"]["deepspeed"] == "0.19.8"
