"""The Dockerfile as far as it can be read without a Docker engine: stages, files, and their users.

No engine builds it in CI, so what a typing error would break there is checked here.
"""

from __future__ import annotations

import re
from pathlib import Path

from gptjet.service.backends.deepspeed.op_build import covers
from gptjet.service.cli import load_command

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def stages() -> dict[str, str]:
    """Body of each stage by name, the last one, the default, under ""."""
    found = {}
    for part in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        first, _, body = part.partition("\n")
        name = first.partition(" AS ")[2].strip()
        assert name not in found, f"stage {name!r} stands twice"
        found[name] = body
    return found


def test_every_stage_that_is_used_comes_before_its_use() -> None:
    defined: set[str] = set()
    for part in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]:
        first, _, body = part.partition("\n")
        base, _, name = first.partition(" AS ")
        used = [base.strip(), *re.findall(r"--from=(\S+)", body)]
        for source in used:
            # An image of somebody else's has a tag.
            assert source in defined or ":" in source, f"{source} is not a stage above {name}"
        defined.add(name.strip())


def test_the_default_image_is_the_last_stage_and_has_no_toolkit() -> None:
    assert list(stages())[-1] == ""
    assert "cuda" not in stages()[""]


def test_every_file_that_is_named_exists_and_travels() -> None:
    files = set(re.findall(r"requirements/[\w.-]+\.txt", DOCKERFILE))
    assert files >= {"requirements/build.txt", "requirements/deepspeed.txt"}
    for file in files:
        assert (ROOT / file).is_file(), file
    kept = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    rooms = {"proto", "service", "kernels", "benchmarks", "requirements", "pyproject.toml"}
    assert {f"!{name}" for name in rooms} <= set(kept)


def test_the_targets_that_doctor_and_readme_name_exist() -> None:
    sources = [*(ROOT / "service").rglob("*.py"), ROOT / "README.md", ROOT / "Dockerfile"]
    named = {
        target
        for source in sources
        for target in re.findall(r"--target (\S+)", source.read_text(encoding="utf-8"))
        if target.startswith("deepspeed")
    }
    assert "deepspeed-sm70-sm75" in named
    assert named <= set(stages())


def test_each_deepspeed_image_has_the_op_for_the_cards_in_its_name() -> None:
    for cards in ("sm70-sm75", "sm80-sm86-sm90"):
        build = stages()[f"deepspeed-build-{cards}"]
        (arch_list,) = re.findall(r'TORCH_CUDA_ARCH_LIST="([^"]+)"', build)
        for card in re.findall(r"sm(\d)(\d)", cards):
            assert covers(arch_list, (int(card[0]), int(card[1]))), f"{card} by {arch_list}"
        assert f"--from=deepspeed-build-{cards} " in stages()[f"deepspeed-{cards}"]


def test_the_op_is_built_with_cuda_12_6_and_the_lock_of_torch_2_10() -> None:
    body = stages()["deepspeed-build"]
    assert "nvidia/cuda:12.6" in body
    assert "CUDA_HOME=/usr/local/cuda-12.6" in body
    assert "DS_BUILD_TRANSFORMER_INFERENCE=1" in body
    assert "requirements/t4-v100-a10.txt" in body
    lock = (ROOT / "requirements" / "t4-v100-a10.txt").read_text(encoding="utf-8")
    assert re.search(r"^torch==2\.10\.0$", lock, re.MULTILINE)


def test_settings_in_the_images_are_settings_of_the_server() -> None:
    from gptjet.service.config import ServerConfig

    for name in re.findall(r"GPTJET_(\w+)=", DOCKERFILE):
        assert name.lower() in ServerConfig.model_fields, name


def test_kernels_are_compiled_in_the_folder_where_the_server_looks() -> None:
    """Triton's cache holds its own path."""
    (folder,) = set(re.findall(r"--cache-dir (\S+)", stages()["warm"]))
    default = stages()[""]
    assert f"COPY --from=warm --chown=gptjet:gptjet {folder} {folder}" in default
    assert f"ENV TRITON_CACHE_DIR={folder}" in default
    # The server may add to it: without a user of that name it could not.
    assert "useradd --create-home --uid 10001 gptjet" in stages()["runtime"]


def test_flags_that_the_image_gives_to_warm_cache_exist() -> None:
    flags = {flag for parameter in load_command("warm-cache").params for flag in parameter.opts}
    given = set(re.findall(r"--[a-z][a-z-]+", stages()["warm"].partition("gptjet warm-cache")[2]))
    assert given == {"--arch", "--cache-dir"}
    assert given <= flags
