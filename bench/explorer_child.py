"""Builds latents.db of a made-up run, and prints the name of each step as it begins: a process of bench/explorer.py.

python -m bench.explorer_child FOLDER ROWS
"""

import sys
from pathlib import Path

from saefast.analysis.evaluation import load_finished, run_source
from saefast.data.mapped_source import MappedSource
from saefast.harvest.harvested_model import harvested_model, harvested_tokenizer
from saefast.latents.build import build_latents
from saefast.latents.schema import LATENTS_DB


def main(folder: Path, rows: int) -> None:
    steps = [""]

    def shown(step: str, _share: float) -> None:
        if step not in ("", steps[-1]):
            steps.append(step)
            print(step, flush=True)

    print("loading", flush=True)
    sae = load_finished(folder)
    source = run_source(folder, sae)
    assert isinstance(source, MappedSource)
    assert source.folder is not None
    index = source.folder.index
    model = harvested_model(index, head="AutoModelForCausalLM")
    tokenizer = harvested_tokenizer(index)
    build_latents(sae, source, folder / LATENTS_DB, tokenizer=tokenizer, model=model, rows=rows, progress=shown)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
