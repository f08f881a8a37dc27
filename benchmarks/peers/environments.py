"""The peers: where each is installed, how its copy of a checkpoint is made, how it is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("build/peers")
"""Environments and converted checkpoints, in the checkout that this is run from."""


class PeerError(Exception):
    """A peer cannot be set up or started; the message is one line for a person."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One library.

    requirements  its lock file, installed into an environment of its own; None: ours
    unwanted      packages that come along and must go again
    convert       (environment's bin, checkpoint, target, weight type) -> command; None: reads ours
    """

    name: str
    weight_types: tuple[str, ...]
    requirements: str | None = None
    unwanted: tuple[str, ...] = ()
    convert: Callable[[Path, Path, Path, str], list[str]] | None = None

    def folder(self, root: Path = ROOT) -> Path:
        """Its environment."""
        return root / self.name

    def python(self, root: Path = ROOT) -> Path:
        """The interpreter that has it. Raises PeerError where it is not set up."""
        if self.requirements is None:
            return Path(sys.executable)
        # Absolute, but not resolved: a link to the system's Python is what makes it an environment.
        path = (self.folder(root) / "bin" / "python").absolute()
        if not path.exists():
            raise PeerError(
                f"{self.name} is not set up: python -m gptjet.benchmarks.peers setup {self.name}"
            )
        return path


_BITS = {"int8": "8", "int4": "4"}


def _convert_ctranslate2(binaries: Path, model: Path, target: Path, weight_type: str) -> list[str]:
    quantization = {"fp32": "float32", "int8": "int8", "bf16": "bfloat16"}[weight_type]
    command = [str(binaries / "ct2-transformers-converter"), "--model", str(model)]
    return [*command, "--output_dir", str(target), "--quantization", quantization]


def _convert_openvino(binaries: Path, model: Path, target: Path, weight_type: str) -> list[str]:
    command = [str(binaries / "optimum-cli"), "export", "openvino", "--model", str(model)]
    command += ["--task", "text-generation-with-past", "--weight-format", weight_type]
    return [*command, str(target)]


PEERS = {
    peer.name: peer
    for peer in (
        Peer("transformers", ("fp32", "bf16")),
        Peer("transformers-compiled", ("fp32", "bf16")),
        Peer(
            "ctranslate2",
            ("fp32", "int8", "bf16"),
            "requirements/peers-ctranslate2.txt",
            convert=_convert_ctranslate2,
        ),
        Peer(
            "openvino",
            ("fp32", "int8"),
            "requirements/peers-openvino.txt",
            # Comes with optimum in a build for another torch, and breaks transformers' import.
            unwanted=("torchvision",),
            convert=_convert_openvino,
        ),
    )
}


def find_peer(name: str) -> Peer:
    """Raises PeerError for a name that is not in the table."""
    if name not in PEERS:
        raise PeerError(f"unknown peer {name!r}: {', '.join(PEERS)}")
    return PEERS[name]


def set_up(peer: Peer, root: Path = ROOT) -> None:
    """Make its environment; one that is complete stays. Raises PeerError."""
    if peer.requirements is None:
        return
    requirements, folder = Path(peer.requirements), peer.folder(root)
    if not requirements.exists():
        raise PeerError(f"{requirements} is not here: run this from a checkout")
    done = folder / ".installed"
    wanted = requirements.read_text(encoding="utf-8")
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return
    python = folder / "bin" / "python"
    _call([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    _call([*pip, "install", "-r", str(requirements)])
    for name in peer.unwanted:
        _call([*pip, "uninstall", "--yes", name])
    done.write_text(wanted, encoding="utf-8")


def converted(peer: Peer, model: Path, weight_type: str, root: Path = ROOT) -> Path:
    """The folder this peer reads, made from the checkpoint where it is not there yet.

    Raises PeerError where the peer has no such weight type or the conversion fails.
    """
    if weight_type not in peer.weight_types:
        raise PeerError(f"{peer.name} has {', '.join(peer.weight_types)}, not {weight_type}")
    convert = peer.convert
    if convert is None:
        return model
    binaries = peer.python(root).parent
    target = _target(model, peer.name, weight_type, root)
    return _made(target, model, lambda to: convert(binaries, model, to, weight_type))


def quantized(model: Path, weight_type: str, root: Path = ROOT) -> Path:
    """The checkpoint as `gptjet quantize` writes it, for a quantised weight type; else `model`.

    The peers' copies are made beforehand too: a server that rounds while it loads has all of the
    float weights pass through its memory. Rounded to nearest, as the peers' are. Raises PeerError.
    """
    if weight_type not in _BITS:
        return model
    command = [sys.executable, "-m", "gptjet.service.cli", "quantize", str(model)]
    flags = ["--bits", _BITS[weight_type], "--method", "rtn", "--no-evaluate"]
    target = _target(model, "gptjet", weight_type, root)
    return _made(target, model, lambda to: [*command, str(to), *flags])


def _target(model: Path, name: str, weight_type: str, root: Path) -> Path:
    return root / "models" / f"{model.resolve().name}-{name}-{weight_type}"


def _made(target: Path, model: Path, command: Callable[[Path], list[str]]) -> Path:
    """`target`, by the command that writes it to another folder, unless it is newer than `model`.

    Under another name until it is whole: a conversion that was killed is not taken for one.
    """
    if _is_newer(target, model):
        return target
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _call(command(partial))
    _fill_missing_tokens(partial / "config.json")
    partial.rename(target)
    return target


def _fill_missing_tokens(config: Path) -> None:
    """Name a token where the converter wrote null, which CTranslate2 4.8 then refuses to load.

    Any token of the vocabulary will do: prompts are ids, and none of these is asked for.
    """
    if not config.exists():
        return
    fields = json.loads(config.read_text(encoding="utf-8"))
    names = [name for name in ("bos_token", "eos_token", "unk_token") if name in fields]
    known = next((fields[name] for name in names if fields[name] is not None), None)
    if known is not None:
        fields |= {name: known for name in names if fields[name] is None}
        config.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _is_newer(target: Path, model: Path) -> bool:
    """Whether the copy was made after the checkpoint was last written."""
    if not target.is_dir():
        return False
    return target.stat().st_mtime >= max(file.stat().st_mtime for file in model.iterdir())


def _call(command: Sequence[str]) -> None:
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise PeerError(f"{Path(command[0]).name}: {error.strerror}") from error
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["it said nothing"]
        raise PeerError(f"{Path(command[0]).name} failed: {lines[-1]}")
