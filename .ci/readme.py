"""Write the README's generated sections: the module map, the checkpoint's and the app's figures.

`make readme` rewrites them; tests/test_architecture.py fails while they differ from the tree. It
needs the standard library only, so it runs before anything is installed.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("proto", "service", "kernels", "benchmarks")
EVALUATION = Path("service/embedded/evaluation.json")
RESULTS = Path("benchmarks/results")
# Of the files with such names the last one counts; their names begin with the date.
SENTIMENT_RESULTS = "*-sentiment-embedded.json"
DECIDERS = {
    "embedded": "**embedded checkpoint**",
    "vader": "VADER",
    "tfidf_lr": "TF-IDF, logistic regression",
    "tfidf_lr_balanced": "TF-IDF, logistic regression, classes balanced",
}
_SECTION = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def summary_of(source: str) -> str:
    """Return the first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(source)) or ""
    first_paragraph = " ".join(docstring.split("\n\n")[0].split())
    return first_paragraph.removesuffix(".")


def module_files(root: Path) -> Iterator[Path]:
    """Yield every module that people write, packages before what is in them."""
    for room in ROOMS:
        paths = (root / room).rglob("*.py")
        for path in sorted(paths, key=lambda path: (path.parent, path.name != "__init__.py", path)):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield path.relative_to(root)


def module_map(root: Path) -> str:
    """Return one line for each module, in a block for each folder."""
    blocks: dict[Path, list[tuple[str, str]]] = {}
    for path in module_files(root):
        summary = summary_of((root / path).read_text(encoding="utf-8"))
        block = blocks.setdefault(path.parent, [(f"{path.parent}/", "")])
        if path.name == "__init__.py":
            block[0] = (f"{path.parent}/", summary)
        else:
            block.append((f"  {path.name}", summary))
    for contract in sorted((root / "proto").rglob("*.proto")):
        folder = contract.relative_to(root).parent
        block = blocks.setdefault(folder, [(f"{folder}/", "")])
        # The first sentence of the comment that each begins with.
        summary = contract.read_text(encoding="utf-8").removeprefix("// ").partition(".")[0]
        block.append((f"  {contract.name}", summary))
    width = max((len(name) for block in blocks.values() for name, _ in block), default=0) + 2
    lines = [
        "\n".join(f"{name:{width}}{summary}".rstrip() for name, summary in block)
        for block in blocks.values()
    ]
    return "```text\n" + "\n\n".join(lines) + "\n```\n"


def checkpoint_figures(root: Path) -> str:
    """Return the measured figures of the embedded checkpoint beside the baselines'."""
    path = root / EVALUATION
    if not path.exists():
        return f"Not measured yet: `{EVALUATION}` does not exist.\n"
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["figures"]["embedded"]["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"| sentiment of {rows} held-out texts | macro-F1 | accuracy |", "|---|---|---|"]
    for name, scores in result["figures"].items():
        title = DECIDERS.get(name, name)
        lines.append(f"| {title} | {scores['macro_f1']:.3f} | {scores['accuracy']:.3f} |")
    lines += ["", f"Measured {result['date']} by `{result['command']}`: {versions}."]
    return "\n".join(lines) + "\n"


def sentiment_figures(root: Path) -> str:
    """Return what `gptjet sentiment evaluate` measured, VADER beside it on the same rows."""
    files = sorted((root / RESULTS).glob(SENTIMENT_RESULTS))
    if not files:
        return f"Not measured yet: there is no `{RESULTS / SENTIMENT_RESULTS}`.\n"
    result = json.loads(files[-1].read_text(encoding="utf-8"))
    abstaining, vader = result["abstaining"], result["vader"]
    compared = {
        "**`gptjet sentiment`**, every row decided": result["figures"],
        f'the same, "uncertain" left out ({abstaining["coverage"]:.1%} of rows answered)': (
            abstaining["figures"]
        ),
        "VADER, compound +-0.05": vader["figures"],
    }
    rows = result["figures"]["rows"]
    lines = [f"| {rows} of the {result['sample']['data']} | macro-F1 | accuracy |", "|---|---|---|"]
    for title, scores in compared.items():
        lines.append(f"| {title} | {scores['macro_f1']:.3f} | {scores['accuracy']:.3f} |")
    gain, model = vader["macro_f1_advantage"], result["model"]
    environment = result["environment"]
    lines += [
        "",
        f"Macro-F1 above VADER's by {gain['difference']:.3f} (95% interval {gain['low']:.3f} to "
        f"{gain['high']:.3f}, {gain['resamples']} paired bootstrap resamples). Expected "
        f"calibration error {result['calibration']['expected_error']:.3f}. Explanations: "
        f"{result['explanations']['given']:.1%} of rows have one, "
        f"{result['explanations']['name_missing_words']:.1%} name a word that the text does not "
        f"have, which the app says instead of quoting it.",
        "",
        f"Measured {environment['recorded_at'][:10]}, model `{model['name']}` "
        f"({model['backend']}, {model['device']}, {model['dtype']}), template "
        f"{result['options']['template']} {result['options']['template_version']}, "
        f"{result['throughput']['rows_per_second']:.1f} rows/s with "
        f"{result['options']['concurrency']} in flight, "
        f"load average {environment['load_average'][0]:.1f} on "
        f"{environment['cpu']['logical_cores']} cores: "
        f"`{files[-1].relative_to(root)}`.",
    ]
    return "\n".join(lines) + "\n"


def render(readme: str, root: Path) -> str:
    """Return the README with its generated sections made from the tree under `root`."""
    sections = {
        "module map": module_map,
        "embedded checkpoint": checkpoint_figures,
        "sentiment": sentiment_figures,
    }

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{sections[match[2]](root)}\n{match[3]}"

    return _SECTION.sub(section, readme)


def main() -> None:
    """Rewrite README.md in place; say so when nothing had to change."""
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = render(before, ROOT)
    path.write_text(after, encoding="utf-8")
    sys.stdout.write("README.md is rewritten\n" if after != before else "README.md is current\n")


if __name__ == "__main__":
    main()
